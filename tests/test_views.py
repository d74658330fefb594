"""Views of images against torchvision's, one by one, and what an encoder that learns from them is given."""

import math

import pytest
import torch
from torchvision.transforms.v2 import functional as F

from datamodules.loader import BatchLoader
from datamodules.views import Views, hue_rotation, recolour, resample

BOXES = [[0, 0, 32, 32], [3, 5, 20, 11], [10, 2, 9, 30], [0, 0, 5, 5], [31, 31, 1, 1], [7, 7, 16, 16], [5, 5, 27, 26]]
MANY = [
    Views(2, 32, (0.2, 1.0), True, (0.4, 0.4, 0.4, 0.1), 0.2),
    Views(3, 16, (0.1, 0.4), True, (0.4, 0, 0, 0.1), 0.5),
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count=8, seed=0):
    return torch.rand(count, 3, 32, 32, generator=generator(seed))


def pixels(count=24, seed=0):
    return torch.randint(256, (count, 32, 32, 3), generator=generator(seed), dtype=torch.uint8)


@pytest.mark.parametrize("size", [32, 16, 40])
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_box_gives_torchvisions_resized_crop(size, mirrored):
    boxes, x = torch.tensor(BOXES).float(), images(len(BOXES))
    ours = resample(x, boxes, torch.full((len(boxes),), mirrored), size)
    for image, (top, left, height, width), own in zip(x, BOXES, ours):
        theirs = F.resized_crop(image, top, left, height, width, [size, size], antialias=True)
        torch.testing.assert_close(own, F.horizontal_flip(theirs) if mirrored else theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name, column, factor",
    [("brightness", 0, 1.3), ("contrast", 1, 0.6), ("saturation", 2, 1.4), ("saturation", 2, 0.0)],
)
def test_a_colour_operation_is_torchvisions(name, column, factor):
    x = 0.3 + 0.3 * images()  # nothing is cut off
    factors = torch.tensor([1.0, 1, 1, 0, 0]).repeat(len(x), 1)
    factors[:, column] = factor
    theirs = torch.stack([getattr(F, f"adjust_{name}")(image, factor) for image in x])
    torch.testing.assert_close(recolour(x, factors), theirs, rtol=0, atol=2e-4)


def test_colour_operations_come_in_the_order_that_the_docstring_gives():
    x = 0.3 + 0.3 * images(2)
    factors = torch.tensor([[1.1, 0.8, 1.3, 0, 0], [0.7, 1.2, 0.5, 0, 1]])
    for image, own, (b, c, s, _, grey) in zip(x, recolour(x, factors), factors.tolist()):
        theirs = F.adjust_saturation(F.adjust_contrast(F.adjust_brightness(image, b), c), s)
        theirs = F.rgb_to_grayscale(theirs, 3) if grey else theirs
        torch.testing.assert_close(own, theirs, rtol=0, atol=2e-4)
    assert recolour(10 * x, factors).max() == 1


def test_hue_turns_colours_about_the_greys():
    turns = torch.tensor([1 / 3, 0.1, -0.2])[:, None, None]
    rotations = hue_rotation(turns)
    red, grey = torch.tensor([1.0, 0, 0]), torch.ones(3)
    torch.testing.assert_close(rotations[0] @ red, torch.tensor([0.0, 1, 0]), rtol=0, atol=1e-6)
    for rotation, turn in zip(rotations, turns.flatten()):
        torch.testing.assert_close(rotation @ grey, grey)
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(3), rtol=0, atol=1e-6)
        # A rotation's trace is 1 + 2 cos of its angle.
        assert math.isclose(rotation.trace(), 1 + 2 * math.cos(2 * math.pi * turn), abs_tol=1e-5)


def test_what_is_drawn_has_its_distribution():
    top, left, height, width, mirrored, *factors, grey = MANY[0].draw(20_000, generator()).unbind(1)
    assert min(top.min(), left.min()) == 0 and (top + height).max() == (left + width).max() == 32
    assert math.isclose((height * width).mean() / 1024, 0.6, abs_tol=0.02)  # the mean of scale 0.2..1
    assert 0.7 < (width / height).min() < 0.75  # 3/4 but for the rounding to whole pixels
    assert math.isclose(mirrored.mean(), 0.5, abs_tol=0.02) and math.isclose(grey.mean(), 0.2, abs_tol=0.02)
    for factor, centre, jitter in zip(factors, (1, 1, 1, 0), MANY[0].jitter):
        assert math.isclose((factor == centre).float().mean(), 0.2, abs_tol=0.02)
        assert math.isclose(factor.mean(), centre, abs_tol=0.01)
        assert centre - jitter <= factor.min() < factor.max() <= centre + jitter


def test_the_options_do_not_change_what_is_drawn_beside_them():
    plain, varied = Views(2), Views(2, 16, jitter=(0.0, 0.3, 0.0, 0.0))
    one, two = (view.draw(50, generator()) for view in (plain, varied))
    assert torch.equal(one[:, 7:], two[:, 7:]) and not torch.equal(one[:, 6], two[:, 6])


def test_a_view_that_changes_nothing_is_the_image():
    data = pixels()
    x = Views(2).make(data, Views(2).draw(len(data), generator()))
    assert x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x, data.permute(0, 3, 1, 2).float().div(255).repeat_interleave(2, 0))


def test_views_of_an_image_lie_behind_each_other():
    data, flipped = pixels(), Views(6, flip=True)
    x = flipped.make(data, flipped.draw(len(data), generator())).unflatten(0, (len(data), 6))
    plain = data.permute(0, 3, 1, 2).float() / 255
    own = [torch.isclose(x, y[:, None], atol=1e-6).flatten(2).all(2) for y in (plain, plain.flip(-1))]
    assert (own[0] | own[1]).all() and own[0].any() and own[1].any()


@pytest.mark.parametrize("options", [{}, {"translate": 2, "cutout": 8, "flip": True}])
@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_draw_together_what_one_would(options, world_size):
    data, labels = pixels(30), torch.arange(30)
    made = {"seed": 5, "views": MANY, **options}
    alone = list(BatchLoader(data, labels, 12, **made))
    loaders = [BatchLoader(data, labels, 12, rank=r, world_size=world_size, **made) for r in range(world_size)]
    assert len(alone) == 2 and [len(x) for x in alone[0][0]] == [24, 36]
    for (sizes, own_labels), *parts in zip(alone, *loaders):
        assert torch.equal(own_labels, torch.cat([y for _, y in parts]))
        for size, x in enumerate(sizes):
            torch.testing.assert_close(x, torch.cat([views[size] for views, _ in parts]), rtol=0, atol=1e-6)


def test_a_resumed_loader_draws_the_same_and_every_epoch_others():
    data, labels = pixels(30), torch.arange(30)
    loader = BatchLoader(data, labels, 10, seed=5, views=MANY[:1])
    batches = [x for x, _ in loader]
    resumed = BatchLoader(data, labels, 10, seed=5, views=MANY[:1])
    resumed.load_state_dict({"epoch": 0, "batch": 2})
    assert torch.equal(next(iter(resumed))[0], batches[2])
    fixed = BatchLoader(data, labels, 10, seed=5, views=MANY[:1], reshuffle=False)  # the same images in every epoch
    first, own = next(iter(fixed))
    fixed.set_epoch(1)
    second, same = next(iter(fixed))
    assert torch.equal(own, same) and not torch.isclose(first, second, atol=1e-3).flatten(1).all(1).any()


def test_views_of_an_evaluation_never_change():
    data, labels = pixels(30), torch.arange(30)
    alone = list(BatchLoader(data, labels, 8, views=MANY[:1]))
    assert [len(views) for _, _, views in alone] == [16, 16, 16, 12]
    assert torch.equal(torch.cat([x for x, *_ in alone]), data.permute(0, 3, 1, 2).float() / 255)
    shared = [
        b for r in range(3) for b in BatchLoader(data, labels, 8, views=MANY[:1], rank=r, world_size=3) if len(b[1])
    ]
    for one, two in zip(alone, shared, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, two))


VIEWS = ["--data.views=2", "--data.crop_scale=[0.3,1]", "--data.color_jitter=0.5", "--data.small_views=2"]
SMALL = "--model.encoder.init_args.widths=[8,8,8]"


@pytest.mark.parametrize(
    "option, words",
    [
        ("data.views=0", ["data.views 0", "at least 1"]),
        ("data.small_views=-1", ["data.small_views -1"]),
        ("data.small_size=4", ["data.small_size 4", "8..32"]),
        ("data.crop_scale=[0.5]", ["data.crop_scale [0.5]", "[0.2, 1]"]),
        ("data.crop_scale=[0.9,0.2]", ["data.crop_scale"]),
        ("data.small_scale=[0,1]", ["data.small_scale"]),
        ("data.color_jitter=[0.4,0.4]", ["data.color_jitter", "four"]),
        ("data.color_jitter=2", ["data.color_jitter 2"]),
        ("data.greyscale=1.5", ["data.greyscale 1.5"]),
        ("model.positives=views", ["positives", "views"]),
        ("model.z_hidden=0", ["model.z_hidden 0"]),
        ("model.z_dim=null", ["model.z_hidden"]),
        ("model.muon_lr=0", ["model.muon_lr 0"]),
        ("model.encoder=ReportEncoder", ["data.small_size 16", "ReportEncoder"]),
    ],
)
def test_options_of_views_are_checked(refused, option, words):
    refused("fit", "label_free_encoder", f"--{option}", words=words)


def test_positives_that_are_views_need_views(refused):
    refused(
        "fit", "label_free_encoder", "--data.views=1", "--data.small_views=0", words=["data.views 1", "positives view"]
    )


@pytest.mark.parametrize("options", [
    ["--model.encoder=RandomPatches", "--model.encoder.patches=4", "--model.optimizer=sgd"],
    ["--model.encoder.init_args.widths=[8,8,8]", "--data.small_size=10"],
])  # fmt: skip
def test_small_views_go_through_networks_of_few_places_and_without_weights(run, options):
    assert run("fit", "label_free_encoder", "--pictures=false", *options).trainer.global_step == 4


def test_views_must_differ(refused):
    plain = ["--data.crop_scale=null", "--data.color_jitter=0", "--data.greyscale=0"]
    refused("fit", "label_free_encoder", *plain, words=["views that differ", "data.crop_scale [0.2,1]"])


def test_without_its_config_the_loss_over_views_decides_too(run):
    cli = run("fit", "triplet_encoder", "--model.positives=view", *VIEWS, SMALL, "--pictures=false")
    kept = cli.trainer.checkpoint_callback
    assert (kept.monitor, kept.mode) == ("val/loss", "min") and kept.best_model_score == kept.kth_value


def test_a_label_free_encoder_is_fitted_tested_and_probed(run, tmp_path):
    found = run("fit", "label_free_encoder", SMALL).trainer.callback_metrics
    folder = tmp_path / "runs/label_free_encoder/version_0"
    assert (folder / "views.png").stat().st_size and (folder / "curves.png").stat().st_size
    names = {"train/view_accuracy", "val/view_accuracy", "val/loss", "val_sample/knn_accuracy"}
    names |= {f"val_sample/{name}" for name in ("view_alignment", "view_uniformity", "effective_rank")}
    assert names <= found.keys() and "val/accuracy" not in found
    tested = run("test", "label_free_encoder", SMALL, "--ckpt_path=best").trainer.callback_metrics
    assert {"test/view_accuracy", "test/knn_accuracy", "test/loss"} <= tested.keys()
    validated = run("validate", "label_free_encoder", SMALL, "--ckpt_path=best").trainer.callback_metrics
    assert math.isclose(validated["val/loss"], found["val/loss"], rel_tol=1e-6)
    run("fit", "linear_probe", f"--frozen_encoder.run={folder}")


def test_classes_reach_no_gradient_of_a_label_free_encoder(run, tmp_path):
    """With the same split, fits on all labels and on permuted names of classes end with the same bits."""
    weights = []
    for classes in ("[0,1,2,3]", "[3,2,1,0]"):
        cli = run("fit", "label_free_encoder", SMALL, f"--data.classes={classes}", "--pictures=false")
        weights.append(cli.model.state_dict())
    for name, value in weights[0].items():
        if not name.startswith("means."):
            assert torch.equal(value, weights[1][name]), name


def test_a_batch_of_labelled_views_repeats_its_labels(run):
    outputs = []

    def keep(module, batch, index):
        outputs.append(step(module, batch, index))
        return outputs[-1]

    from lightning_modules import TripletEncoder

    step = TripletEncoder.training_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TripletEncoder, "training_step", keep)
        run("fit", "triplet_encoder", *VIEWS, SMALL, "--trainer.limit_train_batches=1", "--pictures=false")
    labels = outputs[0]["labels"]
    assert len(labels) == 240 and torch.equal(labels.view(60, 4), labels.view(60, 4)[:, :1].expand(60, 4))
    assert len(labels.unique()) == 10 and len(outputs[0]["features"]) == 60


@pytest.mark.parametrize("config", ["softmax_regression", "linear_probe", "supervised_encoder"])
def test_classifiers_learn_from_views(run, config):
    if config == "linear_probe":
        run("fit", "triplet_encoder", SMALL)
    cli = run("fit", config, "--data.views=2", "--data.color_jitter=0.5", *([SMALL] if "encoder" in config else []))
    assert 0 <= cli.trainer.callback_metrics["train/accuracy"] <= 1
