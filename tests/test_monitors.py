"""What the monitors see in real fits, healthy and provoked."""

import json
import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CONFIGS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.mining_monitor import MiningMonitor
from lightning_modules import losses
from lightning_modules.mining import diagnose, effective_rank, measure
from lightning_modules.retrieval import knn_probabilities, retrieval_statistics
from main import main

ZERO = torch.tensor(0.0)
SMALL = "--model.encoder.init_args.widths=[8,8,8]"


@pytest.fixture
def fit(tmp_path):
    """Fits a triplet encoder on digits, measuring in every step; returns the CLI and what the monitor said."""

    def call(*more):
        args = ["--config", str(CONFIGS / "triplet_encoder.yaml"), "--data=DigitsDataModule", "--data.batch_size=64"]
        args += [SMALL, "--mining_monitor.every_n_steps=1", "--mining_monitor.patience=2", "--pictures=false"]
        runs = f"--trainer.logger.save_dir={tmp_path / 'runs'}"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            cli = main(["fit", *args, runs, "--trainer.accelerator=cpu", "--trainer.max_epochs=1", *more])
        said = [str(w.message) for w in caught if str(w.message).startswith("step ")]
        return cli, said

    return call


def test_a_healthy_fit_is_measured_and_nothing_is_said(fit, tmp_path):
    cli, said = fit("--model.lr=0.05")
    assert said == []
    events = EventAccumulator(str(tmp_path / "runs/triplet_encoder/version_0")).Reload()
    names = ("loss", "active", "misordered", "positive", "negative", "norm", "spread", "effective_rank")
    assert {f"mining/{n}" for n in names} <= set(events.Tags()["scalars"])
    assert {"mining/d_ap", "mining/d_an", "mining/spread_by_dimension"} <= set(events.Tags()["histograms"])
    assert not set(events.Tags()["scalars"]) & set(events.Tags()["histograms"])  # TensorBoard shows a tag as one kind
    assert "val_sample/knn_accuracy" in cli.trainer.progress_bar_metrics
    assert len(events.Scalars("mining/active")) == 16
    sample = {
        f"val_sample/{n}"
        for n in ("knn_accuracy", "precision_at_1", "r_precision", "map_at_r", "alignment", "uniformity")
    }
    assert sample <= set(events.Tags()["scalars"])
    assert events.Scalars("mining/active")[-1].value < events.Scalars("mining/active")[0].value
    assert events.Scalars("val_sample/knn_accuracy")[-1].value > 0.4


def test_views_that_are_too_alike_are_said_in_the_first_epoch(fit):
    views = ["--model.positives=view"]
    _, said = fit(*views, "--data.views=2", "--data.translate=0", "--data.color_jitter=0.01", "--model.lr=0.05")
    assert said and "too alike to learn from" in said[0] and "data.crop_scale" in said[0]
    _, said = fit(*views, "--data.views=2", "--data.translate=0", "--data.crop_scale=[0.2,1]", "--model.lr=0.05")
    assert not said


def test_views_that_hardly_tell_images_apart_are_said(fit):
    views = ["--model.positives=view"]
    views += ["--data.views=2", "--data.translate=0", "--data.crop_scale=[0.02,0.05]", "--model.lr=1e-9"]
    _, said = fit(*views)
    assert said and re.search("hardly tell images apart.*weaken the views", said[0])


MARGIN = ["--model.loss=TripletMarginLoss", "--model.lr=1e-9"]


@pytest.mark.parametrize(
    "options, words",
    [
        # A learning rate at which batch-hard pulls all embeddings together.
        (["--model.loss=SoftMarginTripletLoss", "--model.lr=30", "--model.warmup=0"], "collapsed"),
        ([*MARGIN, "--model.loss.margin=0.000001"], "margin 1e-06 of .* is out of range"),
        ([*MARGIN, "--model.loss.margin=5000"], "margin 5000 of .* is out of range"),
        (["--model.loss.temperature=30"], "temperature 30 of PrototypicalLoss is out of range .*weigh alike"),
        (["--model.loss.temperature=0.001"], "temperature 0.001 .*hardest pair"),
    ],
)
def test_what_is_wrong_is_said_once_with_what_to_change(fit, options, words):
    _, said = fit(*options, "--trainer.limit_train_batches=10", "--trainer.limit_val_batches=1")
    assert said and re.search(words, said[0]), said
    assert len(set(said)) == len(said) <= 3
    assert re.search("lower|raise|give", said[0])


@pytest.mark.parametrize(
    "loss, words",
    [
        (
            ["TripletMarginLoss", "triplets=all", "distance=EuclideanDistance", "distance.normalize=true"],
            "pinned at the margin 1",
        ),
        (["SoftMarginTripletLoss", "triplets=random", "distance=CosineDistance"], "pinned at ln 2"),
        (["LMNNLoss"], "hardly tell classes apart"),
        (["MultiNegativeLoss"], "hardly tell classes apart"),
    ],
)
def test_labels_that_say_nothing_about_the_images(fit, tiny, loss, words):
    rng = np.random.default_rng(1)
    with np.load(tiny / "cifar10_train.npz") as file:
        np.savez(tiny / "cifar10_train.npz", images=file["images"], labels=rng.integers(0, 10, len(file["labels"])))
    data = ["--data=CIFAR10DataModule", f"--data.root={tiny}", "--data.val_size=50", "--data.batch_size=60"]
    _, said = fit(
        f"--model.loss={loss[0]}",
        *(f"--model.loss.{x}" for x in loss[1:]),
        *data,
        "--model.lr=1e-6",
        "--trainer.max_epochs=4",
    )
    assert len(said) == 1 and words in said[0] and "lower model.lr" in said[0]


def test_nothing_active_any_more(fit):
    # Two classes that are told apart at once.
    options = [
        "--data.classes=[0,1]",
        "--data.batch_size=32",
        "--model.loss=TripletMarginLoss",
        "--model.loss.triplets=all",
    ]
    cli, said = fit(
        *options, "--model.loss.margin=0.5", "--model.lr=0.05", "--trainer.max_epochs=20", "--mining_monitor.stop=true"
    )
    assert len(said) == 1 and "nothing is active any more" in said[0]
    assert cli.trainer.current_epoch < 20  # stopped


def test_what_semihard_mining_leaves_out_is_said(fit):
    sphere = [
        "--model.loss.distance=EuclideanDistance",
        "--model.loss.distance.normalize=true",
        "--model.loss.margin=0.5",
    ]
    # A rate at which the classes stay on each other.
    _, said = fit(
        "--model.loss=TripletMarginLoss",
        "--model.loss.triplets=semihard",
        *sphere,
        "--model.lr=1e-6",
    )
    assert len(said) == 1 and "semi-hard mining leaves out" in said[0] and "choose triplets: all" in said[0]


@pytest.mark.parametrize("seen, said_at", [("xxx", 3), ("xx.xx", 5), ("x.x.x.x.x.", None), ("xx...xx.", None)])
def test_a_measurement_without_a_finding_takes_one_off(seen, said_at):
    monitor = MiningMonitor()
    trainer = SimpleNamespace(global_step=0, loggers=[], is_global_zero=True, should_stop=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for trainer.global_step, letter in enumerate(seen, 1):
            monitor._judge(trainer, {"collapsed": "collapsed"} if letter == "x" else {})
            monitor.load_state_dict(json.loads(json.dumps(monitor.state_dict())))  # resumed after every step
        said = [str(w.message) for w in caught]
    assert said == ([f"step {said_at}: collapsed"] if said_at else [])


def test_a_batch_of_one_class_is_said(tmp_path):
    measured, _ = measure(losses.MultiNegativeLoss(), torch.randn(8, 4), torch.zeros(8, dtype=torch.long), ZERO)
    found = diagnose(losses.MultiNegativeLoss(), measured)
    assert list(found) == ["triplets"] and "raise data.batch_size" in found["triplets"]


@pytest.mark.parametrize("size, named", [(1, ["spread_by_dimension"]), (4, ["d_ap", "spread_by_dimension"])])
def test_a_batch_without_negatives_has_histograms_of_what_there_is(size, named):
    measured, histograms = measure(losses.LMNNLoss(), torch.randn(size, 4), torch.zeros(size, dtype=torch.long), ZERO)
    assert np.isfinite([*measured.values()]).all() and sorted(histograms) == named


def test_embeddings_that_are_0_have_numbers_for_neighbours():
    z, labels = torch.zeros(6, 4), torch.arange(6) % 2
    for loss in (losses.PrototypicalLoss(), losses.TripletMarginLoss("all"), losses.LMNNLoss()):
        measured, _ = measure(loss, z, labels, ZERO)
        assert np.isfinite([*measured.values()]).all() and "collapsed" in diagnose(loss, measured)
    assert retrieval_statistics(z, labels, z, labels, 2).isfinite().all()
    assert knn_probabilities(z, z, labels, 2).sum(1).tolist() == pytest.approx([1] * 6)


def test_a_loss_that_passes_its_margin_on_the_way_down_is_not_pinned():
    healthy = {
        "loss": 0.5,
        "triplets": 9,
        "relative_spread": 1,
        "effective_rank": 5,
        "active": 0.3,
        "misordered": 0.2,
        "positive": 0.8,
        "negative": 1.2,
    }
    assert diagnose(losses.TripletMarginLoss("hard", 0.5), healthy) == {}
    assert "pinned" in diagnose(losses.TripletMarginLoss("hard", 0.5), {**healthy, "positive": 1.19})


def test_effective_rank():
    generator = torch.Generator().manual_seed(0)
    assert float(effective_rank(torch.randn(20000, 6, generator=generator))) == pytest.approx(6, abs=0.01)
    line = torch.randn(50, 1, generator=generator) @ torch.randn(1, 6, generator=generator)
    assert float(effective_rank(line)) == pytest.approx(1, abs=0.01)
    assert float(effective_rank(torch.ones(5, 3))) == 0


def test_measured_share_of_active_triplets_is_a_count():
    generator = torch.Generator().manual_seed(0)
    z, labels = torch.randn(12, 3, generator=generator), torch.randint(3, (12,), generator=generator)
    measured, histograms = measure(losses.TripletMarginLoss("all", 0.5), z, labels, ZERO)
    d = torch.cdist(z, z)
    triplets = [(a, p, n) for a in range(12) for p in range(12) for n in range(12)
                if a != p and labels[a] == labels[p] and labels[a] != labels[n]]  # fmt: skip
    active = sum(bool(d[a, p] - d[a, n] + 0.5 > 0) for a, p, n in triplets)
    misordered = sum(bool(d[a, p] > d[a, n]) for a, p, n in triplets)
    assert measured["misordered"] == pytest.approx(misordered / len(triplets)) and misordered < active
    assert measured["triplets"] == len(triplets) and measured["active"] == pytest.approx(active / len(triplets))
    assert len(histograms["d_ap"]) + len(histograms["d_an"]) == 12 * 11


@pytest.mark.parametrize(
    "option",
    ["mining_monitor.every_n_steps", "mining_monitor.patience", "retrieval_monitor.bank", "retrieval_monitor.queries"],
)
def test_impossible_options(refused, option):
    refused("fit", "triplet_encoder", f"--{option}=0", words=[f"{option} 0", "at least 1"])


@pytest.mark.parametrize(
    "options, words",
    [
        (["--model.loss=torch.nn.MSELoss"], ["MSELoss"]),
        (["--model.loss=NoSuchLoss"], ["NoSuchLoss"]),
        (["--model.loss=SoftMarginTripletLoss", "--model.loss.triplets=semihard"], ["semihard"]),
        (["--model.loss=TripletMarginLoss", "--model.loss.triplets=easy"], ["easy"]),
        (["--model.loss=TripletMarginLoss", "--model.loss.margin=-1"], ["margin -1", "above 0"]),
        (["--model.loss.temperature=0"], ["temperature 0", "above 0"]),
        ([*MARGIN, "--model.loss.distance=MahalanobisDistance", "--model.loss.distance.dim=64"],
         ["TripletMarginLoss", "width 128"]),
        (["--data.batch_size=2"], ["batch_size 2", "at least 3"]),
        (["--model.encoder=TorchvisionEncoder", "--model.encoder.model=resnet19"],
         ["resnet19", "no such classification model"]),
    ],
)  # fmt: skip
def test_losses_and_miners_that_do_not_fit_are_refused(options, words, refused):
    refused("fit", "triplet_encoder", *options, words=words)
