"""Many linear probes at once are the probes that they would be alone."""

from pathlib import Path

import pytest
import torch

from checkpoint_file import load_checkpoint

GRID = ["--model=LinearProbeGrid", "--model.lr_factors=[0.1,3]", "--model.weight_decay_factors=[0,100]"]
SETTINGS = [(0.001, 0.0), (0.001, 0.01), (0.03, 0.0), (0.03, 0.01)]


@pytest.fixture
def encoder_run(run):
    return run("fit", "triplet_encoder", "--model.encoder.init_args.widths=[8,8,16]")


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_each_setting_is_trained_as_alone_and_the_best_is_chosen(encoder_run, run, optimizer):
    # In batches of 33 no class is exactly a tenth, where the first gradient of its bias is rounding alone, out of which
    # Adam makes a step of full length.
    shared = ["--trainer.max_epochs=3", f"--model.optimizer={optimizer}", "--data.batch_size=33"]
    grid = run("fit", "linear_probe", *GRID, *shared)
    alone = []
    for i, (lr, decay) in enumerate(SETTINGS):
        cli = run("fit", "linear_probe", *shared, f"--model.lr={lr}", f"--model.weight_decay={decay}")
        close = {"rtol": 1e-4, "atol": 1e-6 if optimizer == "sgd" else 1e-3 * lr}
        torch.testing.assert_close(grid.model.head.weights[i], cli.model.head.weight, **close)
        torch.testing.assert_close(grid.model.head.biases[i], cli.model.head.bias, **close)
        metrics = cli.trainer.callback_metrics
        logged = grid.trainer.callback_metrics[f"grid/lr_{lr:g}_weight_decay_{decay:g}"]
        assert float(logged) == pytest.approx(float(metrics["val/accuracy"]))
        alone.append((float(metrics["val/accuracy"]), -float(metrics["val/loss"])))
    best = max(range(4), key=lambda i: alone[i])
    assert int(grid.model.chosen) == best
    assert float(grid.trainer.callback_metrics["val/accuracy"]) == pytest.approx(alone[best][0])
    assert float(grid.trainer.callback_metrics["val/loss"]) == pytest.approx(-alone[best][1], rel=1e-4)


def test_test_and_predict_follow_the_choice(encoder_run, run):
    fitted = run("fit", "linear_probe", *GRID, "--trainer.max_epochs=3")
    checkpoint = load_checkpoint(Path(fitted.trainer.checkpoint_callback.best_model_path))
    validated = run("validate", "linear_probe", *GRID, "--ckpt_path=best").trainer.callback_metrics
    assert float(validated["val/accuracy"]) == pytest.approx(float(fitted.trainer.checkpoint_callback.best_model_score))
    cli = run("test", "linear_probe", *GRID, "--ckpt_path=best", "--trainer.precision=32-true")
    chosen = int(checkpoint["state_dict"]["chosen"])
    found = cli.trainer.callback_metrics
    assert (float(found["chosen/lr"]), float(found["chosen/weight_decay"])) == pytest.approx(SETTINGS[chosen])
    images, labels = cli.datamodule.split("test")
    model = cli.model.eval()
    with torch.no_grad():
        features = model.standardize(model.encoder.embed(images.permute(0, 3, 1, 2).float() / 255))
        logits = features @ model.head.weights[chosen].T + model.head.biases[chosen]
    assert float(found["test/accuracy"]) == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    run("predict", "linear_probe", *GRID, "--ckpt_path=best")


def test_what_a_grid_cannot_do_is_refused_in_one_line(encoder_run, run, refused):
    run("fit", "linear_probe", *GRID)
    other = ["--model=LinearProbeGrid", "--model.lr_factors=[0.1,2]", "--model.weight_decay_factors=[0,100]"]
    refused("test", "linear_probe", *other, "--ckpt_path=best", words=["grid", "config.yaml"])
    for option, words in {
        "--model.lr_factors=[0]": ["lr_factors"],
        "--model.weight_decay_factors=[]": ["weight_decay_factors"],
        "--model.l2_lambda=0.1": ["l2_lambda"],
        "--trainer.gradient_clip_val=1": ["gradient_clip_val"],
    }.items():
        refused("fit", "linear_probe", *GRID, option, words=words)
