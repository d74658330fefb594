"""What the modules do in a fit: loss terms, schedules, metrics, identity."""

import pytest
import torch
from pytorch_lightning import Trainer

from datamodules import DigitsDataModule
from errors import InputError
from lightning_modules import LogisticRegression, SoftmaxRegression
from lightning_modules.optimization import triangle
from lightning_modules.regression import PixelLinear


def fit(model, data=None, **options):
    torch.manual_seed(0)
    data = data or DigitsDataModule(translate=0, batch_size=359)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(**{"accelerator": "cpu", "max_epochs": 1, "num_sanity_val_steps": 0, **quiet, **options})
    trainer.fit(model, datamodule=data)
    return trainer


def test_a_step_of_gradient_descent_with_l2_is_the_closed_form():
    data = DigitsDataModule(translate=0, batch_size=1077)
    model = SoftmaxRegression(lr=0.1, momentum=0.0, l2_lambda=0.5)
    start = torch.randn(10, 3072, generator=torch.Generator().manual_seed(0)) * 0.01
    with torch.no_grad():
        model.linear.weight.copy_(start)
    fit(model, data)
    x, y = data.split("train")
    x = x.permute(0, 3, 1, 2).float() / 255
    x = ((x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True, correction=0)).flatten(1)
    error = (x @ start.T).softmax(1) - torch.nn.functional.one_hot(y, 10)
    expected = start - 0.1 * (error.T @ x / len(x) + 0.5 * start)
    torch.testing.assert_close(model.linear.weight.detach(), expected, rtol=1e-4, atol=1e-5)


def test_pixels_are_normalised_whatever_their_memory_format():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (20, 32, 32, 3), generator=generator, dtype=torch.uint8)
    layer = PixelLinear(4)
    layer.initialize(images)
    torch.nn.init.normal_(layer.weight, generator=generator)
    x = images.permute(0, 3, 1, 2).float() / 255
    normalised = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True, correction=0)
    expected = normalised.flatten(1) @ layer.weight.T
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layer(x.contiguous()), layer(x.contiguous(memory_format=torch.channels_last)))


def test_logged_validation_metrics_are_those_of_all_validation_images():
    data = DigitsDataModule(translate=0, batch_size=100)
    model = SoftmaxRegression(lr=0.01)
    trainer = fit(model, data)
    x, y = data.split("val")
    logits = model(x.permute(0, 3, 1, 2).float() / 255).detach()
    assert float(trainer.callback_metrics["val/accuracy"]) == pytest.approx(
        float((logits.argmax(1) == y).float().mean())
    )
    expected = float(torch.nn.functional.cross_entropy(logits, y))
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(expected, rel=1e-5)


def test_logistic_regression_is_softmax_regression_with_two_classes():
    data = {"translate": 0, "batch_size": 50, "classes": [3, 8]}
    one, two = LogisticRegression(lr=0.02), SoftmaxRegression(num_classes=2, lr=0.01)
    fit(one, DigitsDataModule(**data))
    fit(two, DigitsDataModule(**data))
    # σ(z) = softmax(0, z): with w = w₁ − w₀, each moves half as far for the same rate, hence 0.02 and 0.01.
    difference = two.linear.weight[1] - two.linear.weight[0]
    torch.testing.assert_close(one.linear.weight[0], difference, rtol=1e-3, atol=1e-5)
    x = torch.rand(5, 3, 32, 32)
    torch.testing.assert_close(one.predict_step((x,), 0), two.predict_step((x,), 0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16-true", "32-true"])
def test_means_count_every_image_in_any_precision(precision):
    data = DigitsDataModule(translate=0, batch_size=1)
    trainer = fit(SoftmaxRegression(lr=0.01), data, precision=precision, limit_train_batches=1)
    right = float(trainer.callback_metrics["val/accuracy"]) * len(data.split("val").labels)
    assert right == pytest.approx(round(right), abs=1e-4)  # in bfloat16, 256 + 1 is 256


def test_triangle_rises_to_one_and_falls_to_just_above_zero():
    factors = [triangle(10, 0.2)(s) for s in range(10)]
    assert factors == pytest.approx([0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    assert [triangle(1, 0.2)(0), triangle(2, 0.0)(0)] == [1, 1]


@pytest.mark.parametrize(
    "options, steps",
    [({"max_epochs": 4}, 12), ({"max_epochs": 4, "max_steps": 5}, 5), ({"max_epochs": 2, "limit_train_batches": 2}, 4)],
)
def test_triangle_ends_with_the_fit(options, steps):
    model = SoftmaxRegression(lr=0.5, schedule="triangular", warmup=0.0)
    trainer = fit(model, **options)
    assert trainer.global_step == steps == model.total_steps
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0)  # the rate of the step after the last


def test_plateau_decays_the_learning_rate():
    # A rate so small that no validation after the first is better by the scheduler's relative 1e-4.
    model = SoftmaxRegression(lr=1e-7, momentum=0.0, schedule="plateau", plateau_factor=0.5, plateau_patience=1)
    trainer = fit(model, max_epochs=5)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-7 * 0.5**2)


@pytest.mark.parametrize(
    "options",
    [{"lr": 0.0}, {"momentum": 1.0}, {"l2_lambda": -1.0}, {"warmup": 1.0}, {"plateau_factor": 1.0}, {"num_classes": 1}],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        SoftmaxRegression(**options)


def test_logistic_regression_wants_two_classes():
    with pytest.raises(InputError, match=r"--data.classes '\[0,1\]'"):
        LogisticRegression(num_classes=10)
