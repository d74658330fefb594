"""What TensorBoard holds after a fit."""

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

CONFIG = ["--trainer.log_every_n_steps=2", "--trainer.max_epochs=3", "--data.batch_size=50", "--model.momentum=0"]


@pytest.fixture
def events(tmp_path):
    return lambda stage, version=0: EventAccumulator(str(tmp_path / "runs" / stage / f"version_{version}")).Reload()


def test_speed_gradient_norm_and_rate_are_logged_every_so_many_steps(run, events):
    cli = run("fit", "softmax_regression", *CONFIG, "--model.schedule=constant", "--model.l2_lambda=0")
    found = events("softmax_regression")
    assert [e.step for e in found.Scalars("step/gradient_norm")] == [2, 4, 6, 8, 10, 12, 14]  # 15 steps of 50 images
    assert [e.step for e in found.Scalars("step/images_per_s")] == [4, 8, 10, 14]  # not across an epoch's end
    assert all(e.value > 0 for e in found.Scalars("step/images_per_s"))
    assert all(e.value == pytest.approx(cli.model.lr) for e in found.Scalars("step/lr"))
    # Of plain SGD's last two steps, the one logged moved the weights by lr × the norm.
    again = run(
        "fit",
        "softmax_regression",
        *CONFIG,
        "--model.schedule=constant",
        "--model.l2_lambda=0",
        "--trainer.max_steps=13",
    )
    before = torch.cat([p.detach().flatten() for p in again.model.parameters()])
    again = run(
        "fit",
        "softmax_regression",
        *CONFIG,
        "--model.schedule=constant",
        "--model.l2_lambda=0",
        "--trainer.max_steps=14",
    )
    after = torch.cat([p.detach().flatten() for p in again.model.parameters()])
    norm = found.Scalars("step/gradient_norm")[-1].value
    assert float((after - before).norm()) == pytest.approx(again.model.lr * norm, rel=1e-3)


def test_accumulated_batches_are_one_step(run, events):
    run("fit", "softmax_regression", *CONFIG, "--trainer.accumulate_grad_batches=2")
    assert [e.step for e in events("softmax_regression").Scalars("step/gradient_norm")] == [2, 4, 6, 8]


def test_curves_share_a_chart_and_runs_can_be_compared(run, events, tmp_path):
    cli = run("fit", "triplet_encoder", "--model.encoder.init_args.widths=[8,8,8]")
    found = events("triplet_encoder")
    layout = Layout.FromString(found.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [list(chart.multiline.tag) for chart in layout.category[0].chart] == [
        ["train/loss", "val/loss"],
        ["train/accuracy", "val/accuracy"],
    ]
    content = found.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    session = HParamsPluginData.FromString(content).session_start_info
    assert session.hparams["triplet_loss"].string_value == "PrototypicalLoss"
    assert session.hparams["lr"].number_value == pytest.approx(cli.model.lr)
    assert session.hparams["batch_size"].number_value == cli.datamodule.batch_size
    (accuracy,) = found.Scalars("last/val/accuracy")
    assert accuracy.value == pytest.approx(float(cli.trainer.callback_metrics["val/accuracy"]))


def test_an_encoders_features_can_be_looked_at(run, events, tmp_path):
    cli = run("fit", "triplet_encoder", "--model.encoder.init_args.widths=[8,8,16]", "--trainer.max_epochs=2")
    assert [e.step for e in events("triplet_encoder").Images("val_sample/pca")] == [4, 8]
    (folder,) = (tmp_path / "runs/triplet_encoder/version_0").glob("*/features")
    assert (folder / "sprite.png").is_file()
    head, *rows = (folder / "metadata.tsv").read_text().splitlines()
    points = [list(map(float, line.split("\t"))) for line in (folder / "tensors.tsv").read_text().splitlines()]
    assert head == "class\tnearest neighbour's class" and len(rows) == len(points) == 250
    names, nearest = zip(*(row.split("\t") for row in rows))
    assert sorted(names) == sorted(cli.model.class_names[c] for c in cli.datamodule.split("train").labels)
    unit = torch.nn.functional.normalize(torch.tensor(points), dim=1)
    expected = (unit @ unit.T).fill_diagonal_(-1).argmax(1)
    assert sum(names[j] == n for j, n in zip(expected, nearest)) > 245  # the file's digits are rounded
