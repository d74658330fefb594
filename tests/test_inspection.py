"""What a validation or test shows of a classifier's errors and of its confidence, and what the figures bear."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import Inspection, PredictionWriter, figures, inspection
from callbacks.inspection import calibration_error
from callbacks.tsne import project
from datamodules.loader import BatchLoader

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
    confidence, predicted = probabilities.max(1)
    assert calibration_error(confidence, predicted == labels, 15) == pytest.approx(expected, abs=1e-6)


def test_calibration_error_is_nought_for_the_sure_and_right_and_one_for_the_sure_and_wrong():
    for correct, expected in ((True, 0.0), (False, 1.0)):
        assert calibration_error(torch.ones(6), torch.full((6,), correct), 10) == pytest.approx(expected, abs=1e-6)


def test_the_most_confident_errors_stand_beside_the_nearest_training_images(run, tmp_path, monkeypatch):
    small = [
        "supervised_encoder",
        "--model.encoder.init_args.widths=[8,8,16]",
        "--trainer.precision=32-true",
        "--model.lr=0.01",
    ]
    run("fit", *small, "--pictures=false")
    drawn = []
    monkeypatch.setattr(inspection, "draw_gallery", lambda rows, title: drawn.append(rows) or Figure())
    for command, split in (("validate", "val"), ("test", "test")):
        cli = run(command, *small, "--ckpt_path=best")
        folder = tmp_path / "runs" / "supervised_encoder" / "version_0" / f"{command}_0"
        assert all((folder / name).stat().st_size > 1000 for name in FIGURES)
        assert 0 <= float(cli.trainer.callback_metrics[f"{split}/ece"]) <= 1
        (images, labels), (bank, _) = cli.datamodule.split(split), cli.datamodule.split("train")
        model = cli.model.eval()
        with torch.no_grad():
            pixels, others = (x.permute(0, 3, 1, 2).float() / 255 for x in (images, bank))
            confidence, predicted = model(pixels, shifted=split == "test").softmax(1).max(1)
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


def test_errors_of_a_limited_test_keep_the_numbers_of_their_images():
    stage = SimpleNamespace(probabilities=lambda output: output)
    for rank, first in ((0, 0), (1, 40)):  # three batches of 20 on two processes
        loader = BatchLoader(torch.zeros(60, 32, 32, 3, dtype=torch.uint8), None, 20, rank=rank, world_size=2)
        trainer, callback = SimpleNamespace(state=SimpleNamespace(fn="test"), test_dataloaders=loader), Inspection()
        callback.on_test_batch_end(trainer, stage, {"output": torch.eye(2)}, (None, torch.arange(2)), 0)
        assert callback._seen[0][0].tolist() == [first, first + 1]


def test_two_classes_and_no_error(run, tmp_path):
    run("fit", "logistic_regression", "--data.batch_size=10", "--trainer.max_epochs=5", "--pictures=false")
    cli = run("test", "logistic_regression", "--ckpt_path=best")
    assert float(cli.trainer.callback_metrics["test/accuracy"]) == 1
    folder = tmp_path / "runs" / "logistic_regression" / "version_0" / "test_0"
    assert [(folder / name).is_file() for name in FIGURES] == [True, True, False]


ODD_NAMES = ["$^$", "a_b$x_y$", r"\$", "_private", "two\nlines\tand a tab", "x" * 500, "a|b", "<b>", "猫", "قط"]


def test_whatever_classes_are_called_figures_name_them_without_a_word(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "folder_of", lambda trainer: tmp_path)
    trainer, labels = SimpleNamespace(is_global_zero=True, loggers=[]), torch.arange(120) % 10
    points = torch.randn(120, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gallery = [[(torch.zeros(32, 32, 3, dtype=torch.uint8), figures.plain(name))] for name in ODD_NAMES]
    drawn = {
        "confusion": figures.draw_confusion(labels, labels, ODD_NAMES),
        "pca": figures.draw_pca(points, labels, ODD_NAMES),
        "tsne": figures.draw_tsne({"after": points}, labels, ODD_NAMES),
        "errors": figures.draw_gallery(gallery, "errors"),
    }
    for name, figure in drawn.items():
        figures.save(trainer, figure, file=f"{name}.png")  # a warning is an error
    named = [text.get_text() for text in drawn["confusion"].axes[0].get_yticklabels()]
    assert named[:3] == [r"\$^\$", r"a_b\$x_y\$", r"\\$"] and max(map(len, named)) <= figures.LONGEST + 2
    legend = drawn["pca"].axes[0].get_legend()
    assert [text.get_text().strip() for text in legend.get_texts()] == named


def test_odd_class_names_leave_tables_whole(tmp_path, monkeypatch):
    names, logger = ["a|b", "two\nlines\tand a tab"], TensorBoardLogger(tmp_path, name="", version="")
    trainer = SimpleNamespace(is_global_zero=True, loggers=[logger], global_step=0)
    project(trainer, torch.eye(4), torch.zeros(4, 32, 32, 3, dtype=torch.uint8), torch.tensor([0, 1, 1, 0]), names)
    rows = (tmp_path / "00000" / "features" / "metadata.tsv").read_text().splitlines()
    assert len(rows) == 5 and {row.count("\t") for row in rows} == {1}

    trainer.datamodule, writer = SimpleNamespace(test_files=None), PredictionWriter()
    writer._blocks = [(torch.arange(2), torch.eye(2), None)]
    monkeypatch.setattr("callbacks.prediction_writer.folder_of", lambda trainer: tmp_path)
    writer.on_predict_end(trainer, SimpleNamespace(class_names=names))
    logger.experiment.flush()
    event = EventAccumulator(str(tmp_path)).Reload().Tensors("predictions (first 100)/text_summary")[0]
    table = event.tensor_proto.string_val[0].decode().splitlines()
    assert table[2:] == [r"| 0 | a\|b | 1.000000 |", "| 1 | two lines and a tab | 1.000000 |"]


def test_a_run_of_classes_with_odd_names(tiny, run):
    files = [f"--data.{split}_npz={tiny}/cifar10_{split}.npz" for split in ("train", "test")]
    own = [*files, f"--data.class_names={json.dumps(ODD_NAMES)}", "--model.encoder.init_args.widths=[8,8,16]"]
    folder = run("fit", "supervised_encoder", *own, "--tsne.samples=20", "--trainer.max_steps=1").run.folder
    for command in ("test", "predict"):
        run(command, "supervised_encoder", *own, "--ckpt_path=best")
    assert (folder / "test_0" / "errors.png").is_file() and (folder / "tsne.png").is_file()
    assert "&lt;b&gt;" in (folder / "test_0" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("classes", [2, 20, 21, 300, 2500])
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
    assert confusion.axes[0].images[0].get_array().size <= 1000**2
    assert len(confusion.axes[1].patches) <= 50


def test_classes_that_share_a_cell_of_the_confusion_matrix_keep_their_own_accuracy():
    labels = torch.arange(2500)
    predicted = labels.clone()
    predicted[0] = 1  # within a cell: right there, wrong as a class
    matrix, bars = figures.draw_confusion(predicted, labels, [f"class {c}" for c in range(2500)]).axes
    assert matrix.images[0].get_array().diagonal().min() == 1
    assert bars.patches[0].get_data().values.tolist() == [0.0] + [1.0] * 2499


@pytest.mark.parametrize(
    "option, words",
    [("bins=0", "at least 1"), ("errors=101", "1..100"), ("neighbours=21", "1..20"), ("bank=0", "at least 1")],
)
def test_impossible_options(refused, option, words):
    refused(
        "fit", "softmax_regression", f"--inspection.{option}", words=[f"inspection.{option.replace('=', ' ')}", words]
    )
