"""What a validation or test shows of a classifier's errors and of its confidence."""

import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from callbacks import inspection

FIGURES = ("confusion_matrix.png", "reliability.png", "errors.png")


def test_calibration_error_equals_its_definition():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(500, 4, generator=generator).mul(2).softmax(1)
    probabilities[0] = torch.tensor([0.0, 1, 0, 0])  # the upper edge of the last bin
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
    count, confidence, accuracy = inspection.reliability_diagram(probabilities, labels, 15)
    assert count.sum() == 500
    assert inspection.expected_calibration_error(count, confidence, accuracy) == pytest.approx(expected)


def test_calibration_error_is_nought_for_the_sure_and_right_and_one_for_the_sure_and_wrong():
    sure = F.one_hot(torch.arange(6) % 3).float()
    for shift, expected in ((0, 0.0), (1, 1.0)):
        found = inspection.reliability_diagram(sure, (torch.arange(6) + shift) % 3, 10)
        assert inspection.expected_calibration_error(*found) == expected


@pytest.mark.parametrize("command", ["validate", "test"])
def test_the_most_confident_errors_stand_beside_the_nearest_training_images(run, tmp_path, monkeypatch, command):
    run("fit", "triplet_encoder", "--model.encoder.init_args.widths=[8,8,16]")
    run("fit", "linear_probe")
    drawn = []

    def draw(rows):
        drawn.append(rows)
        return Figure()

    monkeypatch.setattr(inspection, "draw_gallery", draw)
    cli = run(command, "linear_probe", "--ckpt_path=best", "--trainer.precision=32-true")
    folder = tmp_path / "runs" / "linear_probe" / "version_0" / f"{command}_0"
    assert all((folder / name).stat().st_size > 1000 for name in FIGURES)
    split = {"validate": "val", "test": "test"}[command]
    assert 0 <= float(cli.trainer.callback_metrics[f"{split}/ece"]) <= 1

    (images, labels), (bank, _) = cli.datamodule.split(split), cli.datamodule.split("train")
    model = cli.model.eval()
    with torch.no_grad():
        pixels, others = (x.permute(0, 3, 1, 2).float() / 255 for x in (images, bank))
        confidence, predicted = model(pixels).softmax(1).max(1)
        similarity = (
            F.normalize(model.encoder.embed(pixels, shifted=False))
            @ F.normalize(model.encoder.embed(others, shifted=False)).T
        )
    wrong = sorted((predicted != labels).nonzero().flatten().tolist(), key=lambda i: -float(confidence[i]))[:8]
    ((*rows,),) = drawn
    assert len(rows) == len(wrong) > 0
    for i, row in zip(wrong, rows):
        assert torch.equal(row[0][0], images[i]) and cli.model.class_names[predicted[i]] in row[0][1]
        nearest = similarity[i].topk(4).values
        shown = [int((bank == image).flatten(1).all(1).nonzero()[0]) for image, _ in row[1:]]
        torch.testing.assert_close(similarity[i][shown], nearest)


def test_pixels_are_inspected_too_and_a_test_needs_no_training_file(run, tmp_path):
    run("fit", "softmax_regression", "--model.lr=1e-6")
    run("test", "softmax_regression", "--ckpt_path=best")
    (tmp_path / "data" / "cifar10_train.npz").unlink()
    with pytest.warns(UserWarning, match="no nearest training images"):
        run("test", "softmax_regression", "--ckpt_path=best", "--data.download=false")
    folder = tmp_path / "runs" / "softmax_regression" / "version_0"
    assert all((folder / f"test_{k}" / name).is_file() for k in (0, 1) for name in FIGURES)


def test_two_classes_and_no_error(run, tmp_path):
    run("fit", "logistic_regression", "--data.batch_size=10", "--trainer.max_epochs=5")
    cli = run("test", "logistic_regression", "--ckpt_path=best")
    assert float(cli.trainer.callback_metrics["test/accuracy"]) == 1
    folder = tmp_path / "runs" / "logistic_regression" / "version_0" / "test_0"
    assert [(folder / name).is_file() for name in FIGURES] == [True, True, False]
