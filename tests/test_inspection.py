"""What a validation or test shows of a classifier's errors and of its confidence, and what the figures bear."""

import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from callbacks import figures
from callbacks.inspection import calibration_error

FIGURES = ("confusion_matrix.png", "reliability.png", "errors.png")


def test_calibration_error_equals_its_definition():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(500, 4, generator=generator).mul(2).softmax(1)
    probabilities[:20] = torch.tensor([0.0, 1, 0, 0])  # the upper edge of the last bin, which others are in too
    labels = torch.randint(4, (500,), generator=generator)
    expected = 0.0
    for k in range(15):
        inside = [
            (float(p.double().max()), int(p.argmax()) == int(y))
            for p, y in zip(probabilities, labels)
            if min(int(float(p.double().max()) * 15), 14) == k
        ]
        if inside:
            confidence, right = (sum(column) / len(inside) for column in zip(*inside))
            expected += len(inside) / 500 * abs(confidence - right)
    assert calibration_error(probabilities, labels, 15) == pytest.approx(expected, abs=1e-6)


def test_calibration_error_is_nought_for_the_sure_and_right_and_one_for_the_sure_and_wrong():
    sure = F.one_hot(torch.arange(6) % 3).float()
    for shift, expected in ((0, 0.0), (1, 1.0)):
        assert calibration_error(sure, (torch.arange(6) + shift) % 3, 10) == pytest.approx(expected, abs=1e-6)


def test_the_most_confident_errors_stand_beside_the_nearest_training_images(run, tmp_path, monkeypatch):
    small = [
        "supervised_encoder",
        "--model.encoder.init_args.widths=[8,8,16]",
        "--trainer.precision=32-true",
        "--model.lr=0.01",
    ]
    run("fit", *small, "--pictures=false")
    drawn = []
    monkeypatch.setattr(figures, "draw_gallery", lambda rows: drawn.append(rows) or Figure())
    for command, split in (("validate", "val"), ("test", "test")):
        cli = run(command, *small, "--ckpt_path=best")
        folder = tmp_path / "runs" / "supervised_encoder" / "version_0" / f"{command}_0"
        assert all((folder / name).stat().st_size > 1000 for name in FIGURES)
        assert 0 <= float(cli.trainer.callback_metrics[f"{split}/ece"]) <= 1
        (images, labels), (bank, _) = cli.datamodule.split(split), cli.datamodule.split("train")
        model = cli.model.eval()
        with torch.no_grad():
            pixels, others = (x.permute(0, 3, 1, 2).float() / 255 for x in (images, bank))
            confidence, predicted = model(pixels).softmax(1).max(1)
            seen, known = (F.normalize(model.encoder.embed(x, shifted=False)) for x in (pixels, others))
            similarity = seen @ known.T
        wrong = sorted((predicted != labels).nonzero().flatten().tolist(), key=lambda i: -float(confidence[i]))[:8]
        rows = drawn.pop()
        assert len(rows) == len(wrong) > 0 and drawn == []
        for i, row in zip(wrong, rows):
            assert torch.equal(row[0][0], images[i]) and cli.model.class_names[predicted[i]] in row[0][1]
            nearest = similarity[i].topk(4).values
            shown = [int((bank == image).flatten(1).all(1).nonzero()[0]) for image, _ in row[1:]]
            torch.testing.assert_close(similarity[i][shown], nearest)


def test_pixels_are_inspected_too_and_a_test_needs_no_training_file(run, tmp_path):
    run("fit", "softmax_regression", "--model.lr=1e-6", "--pictures=false")
    run("test", "softmax_regression", "--ckpt_path=best", "--inspection.errors=2", "--inspection.neighbours=1")
    run("test", "softmax_regression", "--ckpt_path=best", "--pictures=false")
    (tmp_path / "data" / "cifar10_train.npz").unlink()
    with pytest.warns(UserWarning, match="no nearest training images"):
        run("test", "softmax_regression", "--ckpt_path=best", "--data.download=false")
    folder = tmp_path / "runs" / "softmax_regression" / "version_0"
    assert all((folder / f"test_{k}" / name).is_file() for k in (0, 2) for name in FIGURES)
    assert not list(folder.glob("test_1/*.png")) and (folder / "test_1" / "report.html").is_file()


def test_two_classes_and_no_error(run, tmp_path):
    run("fit", "logistic_regression", "--data.batch_size=10", "--trainer.max_epochs=5", "--pictures=false")
    cli = run("test", "logistic_regression", "--ckpt_path=best")
    assert float(cli.trainer.callback_metrics["test/accuracy"]) == 1
    folder = tmp_path / "runs" / "logistic_regression" / "version_0" / "test_0"
    assert [(folder / name).is_file() for name in FIGURES] == [True, True, False]


@pytest.mark.parametrize("classes", [2, 20, 21, 300])
def test_figures_of_many_classes_stay_readable(classes):
    generator = torch.Generator().manual_seed(0)
    labels, predicted = torch.randint(classes, (2, 900), generator=generator)
    names = [f"class {c}" for c in range(classes)]
    points = torch.randn(900, 4, generator=generator, dtype=torch.float64)
    confusion = figures.draw_confusion(predicted, labels, names)
    scatters = figures.draw_pca(points, labels, names), figures.draw_tsne({"before": points[:, :2]}, labels, names)
    for figure in (confusion, *scatters):
        assert max(figure.get_size_inches()) <= 18
        figure.canvas.draw()
    assert len(confusion.axes[0].texts) == (classes**2 if classes <= 20 else 0)
    assert len(confusion.axes[0].get_xticklabels()) <= 50
    for figure in scatters:
        assert len(figure.axes[0].get_legend().get_texts()) == min(classes, 20)
        assert sum(len(dots.get_offsets()) for dots in figure.axes[0].collections) == 900


@pytest.mark.parametrize(
    "option, words",
    [("bins=0", "at least 1"), ("errors=101", "1..100"), ("neighbours=21", "1..20"), ("bank=0", "at least 1")],
)
def test_impossible_options(refused, option, words):
    refused(
        "fit", "softmax_regression", f"--inspection.{option}", words=[f"inspection.{option.replace('=', ' ')}", words]
    )
