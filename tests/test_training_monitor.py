"""What a fit shows while it runs, and what its TensorBoard events and `metrics.csv` hold afterwards."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import ModelSummary
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tqdm import tqdm

from callbacks import ModelParts, Progress, TrainingMonitor
from callbacks.curves import read_rows
from datamodules import DigitsDataModule
from lightning_modules import FastEncoder, PrototypicalLoss, SoftmaxRegression, TripletEncoder

CONFIG = ["--trainer.log_every_n_steps=2", "--trainer.max_epochs=3", "--data.batch_size=50", "--model.momentum=0"]
PLAIN = ["softmax_regression", *CONFIG, "--model.schedule=constant", "--model.l2_lambda=0", "--pictures=false"]
SMALL = ["triplet_encoder", "--model.encoder.init_args.widths=[8,8,16]"]


@pytest.fixture
def events(tmp_path):
    return lambda stage, version=0: EventAccumulator(str(tmp_path / "runs" / stage / f"version_{version}")).Reload()


def test_speed_gradient_norm_and_rate_are_logged_every_so_many_steps(run, events):
    cli = run("fit", *PLAIN)
    found = events("softmax_regression")
    assert [e.step for e in found.Scalars("step/gradient_norm")] == [2, 4, 6, 8, 10, 12, 14]  # 15 steps of 50 images
    assert [e.step for e in found.Scalars("step/images_per_s")] == [4, 8, 10, 14]  # not across an epoch's end
    assert all(e.value > 0 for e in found.Scalars("step/images_per_s"))
    assert all(e.value == pytest.approx(cli.model.lr) for e in found.Scalars("step/lr"))
    # Of plain SGD's last two steps, the one logged moved the weights by lr × the norm.
    before, after = (
        torch.cat([p.detach().flatten() for p in run("fit", *PLAIN, f"--trainer.max_steps={n}").model.parameters()])
        for n in (13, 14)
    )
    norm = found.Scalars("step/gradient_norm")[-1].value
    assert float((after - before).norm()) == pytest.approx(cli.model.lr * norm, rel=1e-3)


def test_accumulated_batches_are_one_step(run, events):
    run("fit", *PLAIN, "--trainer.accumulate_grad_batches=2")
    assert [e.step for e in events("softmax_regression").Scalars("step/gradient_norm")] == [2, 4, 6, 8]


def test_curves_share_a_chart_runs_can_be_compared_and_features_looked_at(run, events, tmp_path):
    cli = run("fit", *SMALL, *CONFIG, "--trainer.max_epochs=2", "--tsne.samples=250")
    found, folder = events("triplet_encoder"), tmp_path / "runs/triplet_encoder/version_0"
    layout = Layout.FromString(found.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [list(chart.multiline.tag) for chart in layout.category[0].chart] == [
        ["train/loss", "val/loss"],
        ["train/accuracy", "val/accuracy"],
    ]
    content = found.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    session = HParamsPluginData.FromString(content).session_start_info
    assert session.hparams["loss"].string_value == "PrototypicalLoss"
    assert session.hparams["encoder"].string_value == "FastEncoder"
    assert session.hparams["lr"].number_value == pytest.approx(cli.model.lr)
    assert session.hparams["batch_size"].number_value == cli.datamodule.batch_size
    (accuracy,) = found.Scalars("last/val/accuracy")
    assert accuracy.value == pytest.approx(float(cli.trainer.callback_metrics["val/accuracy"]))

    assert [e.step for e in found.Images("val_sample/pca")] == [10]
    assert found.Images("curves") and found.Images("tsne") and (folder / "tsne.png").is_file()
    (folder,) = folder.glob("*/features")
    assert (folder / "sprite.png").is_file()
    head, *rows = (folder / "metadata.tsv").read_text().splitlines()
    points = [list(map(float, line.split("\t"))) for line in (folder / "tensors.tsv").read_text().splitlines()]
    assert head == "class\tnearest neighbour's class" and len(rows) == len(points) == 250
    names, nearest = zip(*(row.split("\t") for row in rows))
    assert sorted(names) == sorted(cli.model.class_names[c] for c in cli.datamodule.split("train").labels)
    unit = torch.nn.functional.normalize(torch.tensor(points), dim=1)
    expected = (unit @ unit.T).fill_diagonal_(-1).argmax(1)
    assert sum(names[j] == n for j, n in zip(expected, nearest)) > 245  # the file's digits are rounded


def test_without_pictures_the_metrics_are_the_same(run, events, tmp_path):
    for pictures in ("true", "false"):
        run("fit", *SMALL, f"--pictures={pictures}", "--tsne.samples=20", "--trainer.precision=32-true")
    shown, plain = (tmp_path / "runs/triplet_encoder" / f"version_{k}" for k in (0, 1))
    assert sorted(p.name for p in shown.glob("*.png")) == ["curves.png", "pca.png", "tsne.png"]
    assert list(plain.rglob("*.png")) == [] and events("triplet_encoder", 1).Tags()["images"] == []
    assert (plain / "metrics.csv").read_text() == (shown / "metrics.csv").read_text()
    assert events("triplet_encoder", 0).Tags()["scalars"] == events("triplet_encoder", 1).Tags()["scalars"]


def test_monitors_of_triplets_do_nothing_for_other_stages(run, events, tmp_path):
    run("fit", "softmax_regression", "--mining_monitor.every_n_steps=1")
    assert not any(tag.startswith(("mining", "val_sample")) for tag in events("softmax_regression").Tags()["scalars"])
    assert events("softmax_regression").Tags()["images"] == ["curves"]
    assert [p.name for p in (tmp_path / "runs/softmax_regression/version_0").glob("*.png")] == ["curves.png"]


def test_metrics_are_written_whole_or_not_at_all(run, tmp_path):
    run("fit", *PLAIN, "--trainer.max_epochs=1")
    path = tmp_path / "runs/softmax_regression/version_0/metrics.csv"
    before = path.read_text()
    os.link(path, tmp_path / "before.csv")  # in-place writing would change what this name shows, half a line at a time
    run("fit", *PLAIN, "--trainer.max_epochs=2", "--ckpt_path=last")
    assert (tmp_path / "before.csv").read_text() == before
    assert path.read_text().startswith(before) and path.read_text().count("\n") == 3
    # A kill of an older program, or a disk's fault.
    text = path.read_text()
    path.write_text(text[: text.rindex(".") + 2])
    with pytest.warns(UserWarning, match=r"metrics.csv: damaged lines are dropped \(1\)"):
        run("fit", *PLAIN, "--trainer.max_epochs=3", "--ckpt_path=last")
    assert path.read_text().startswith(before)
    assert [line.split(",")[0] for line in path.read_text().splitlines()] == ["step", "5", "15"]


@pytest.mark.parametrize(
    "line, damaged",
    [("7,2,0.5,0.25\n", 0), ("7,2,,0.25\n", 0), ("7,2,0.5,0.2", 1), ("7,2,0.5\n", 1), ("7,2,0.5,0.25,1\n", 1),
     ("7,2,0.x,0.25\n", 1), ("x,2,0.5,0.25\n", 1), ("7,,0.5,0.25\n", 1), ("\n", 1), ('7,"2,0.5,0.25\n', 1)],
)  # fmt: skip
def test_readable_rows_of_damaged_metrics_are_kept(line, damaged):
    good = ["step,epoch,lr,val/loss\n", "5,1,0.5,0.375\n", "9,3,0.5,0.125\n"]
    rows, found = read_rows("".join([*good, line]))
    assert found == damaged and set(rows) == ({5, 9} if damaged else {5, 7, 9})
    assert rows[5] == {"epoch": 1, "lr": 0.5, "val/loss": 0.375}
    assert read_rows("") == ({}, 0) and read_rows("\x00\ufffd\n1,1\n") == ({}, 1)


class Terminal:
    """A pseudo-terminal of 80 columns; `text` is what was written into it."""

    def __init__(self):
        self.text, (self.master, slave) = b"", pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.file = os.fdopen(slave, "w")
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        try:
            while block := os.read(self.master, 2**16):
                self.text += block
        except OSError:  # the other end is closed
            pass

    def close(self):
        self.file.close()
        self.reader.join()
        os.close(self.master)
        return self.text.decode()


def test_the_progress_bar_is_one_line_of_80_columns(monkeypatch):
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal.file)
        trainer = Trainer(
            max_epochs=2, callbacks=[Progress(), TrainingMonitor()], logger=False, enable_checkpointing=False,
            enable_model_summary=False, log_every_n_steps=1, num_sanity_val_steps=0, accelerator="cpu",
        )  # fmt: skip
        trainer.fit(SoftmaxRegression(), datamodule=DigitsDataModule(batch_size=200))
    frames = terminal.close().rstrip().split("\r")
    assert len(frames) > 10 and all(len(frame) <= 80 and "\n" not in frame and "\x1b" not in frame for frame in frames)
    last = r"SoftmaxRegression 2/2, loss=[\d.]+, val=0\.\d{3}, left=00:00, img/s=[\d.]+[kM]? █+"
    assert re.fullmatch(last, frames[-1].rstrip()), frames[-1]
    # The longest that is likely.
    longest = "LogisticRegression 100/100", "loss=1.2e-05, val=0.912, left=12:34:56, img/s=12.3k"
    line = tqdm.format_meter(1, 2, 1, 80, longest[0], bar_format="{desc}{postfix} {bar}", postfix=longest[1])
    assert len(line) == 80 and line.startswith(", ".join(longest))


def test_the_model_summary_has_the_parts_with_weights(monkeypatch):
    shown = []
    monkeypatch.setattr(ModelSummary, "summarize", staticmethod(lambda columns, *_, **__: shown.append(dict(columns))))
    model = TripletEncoder(FastEncoder([8, 8, 8]), PrototypicalLoss(), z_dim=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ModelParts().on_fit_start(SimpleNamespace(strategy=None, is_global_zero=True), model)
    assert shown[0]["Name"] == ["encoder", "head"] and all(len(cells) == 2 for cells in shown[0].values())
