"""What tests/test_pretend_gpu.py runs in a process with a pretend GPU; each part writes what it found as JSON."""

import json
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
from conftest import CONFIGS, write_tiny
from pretend_gpu import Rules
from pytorch_lightning import Callback
from worker import LOSSES

from datamodules import in_memory
from errors import InputError
from lightning_modules.mining import measure
from main import main

ON = {
    "cpu": ["--trainer.accelerator=cpu"],
    "pretend": ["--trainer.accelerator=pretend", "--trainer.strategy=pretend"],
}
SMALL, EXACT, PLAIN = "--model.encoder.init_args.widths=[8,8,8]", "--trainer.precision=64-true", "--pictures=false"
SHORT = ["--trainer.max_epochs=1", "--data.val_size=50", "--data.batch_size=100"]
AUGMENTED = ["--data.translate=4", "--data.cutout=12", "--model.encoder.init_args.residual=true"]
# Every stage in the order in which one hands over to the next, with the options of a short fit.
STAGES = {
    "triplet_encoder": [SMALL],
    "supervised_encoder": [SMALL, *AUGMENTED],
    "label_free_encoder": [SMALL],
    "softmax_regression": ["--data.flip=true", "--data.translate=0"],
    "logistic_regression": ["--data.classes=[0,1]", "--data.batch_size=20"],
    "linear_probe": [],
    "mlp_probe": ["--model.dropout=0.2", "--data.translate=1"],  # features are computed anew in every step
    "random_patches_linear_probe": ["--frozen_encoder.encoder.init_args.patches=5"],
    "grid": ["--model=LinearProbeGrid"],
    "fine_tune": [],
}


def command(verb: str, stage: str, device: str, folder: str | Path, *more: str):
    """A command on 300 images; they and the runs are in `folder`."""
    config = "linear_probe" if stage == "grid" else stage
    if not (Path(folder) / "data").exists():
        write_tiny(Path(folder) / "data")
    given = ["--config", str(CONFIGS / f"{config}.yaml"), f"--data.root={folder}/data", *SHORT, *STAGES[stage]]
    logger = [f"--trainer.logger.save_dir={folder}/runs", f"--trainer.logger.name={stage}"]
    return main([verb, *given, *logger, *ON[device], *more])


def metrics(cli) -> dict[str, float]:
    return {name: float(value) for name, value in cli.trainer.callback_metrics.items()}


def stages(device: str, *more: str, names=tuple(STAGES)) -> dict:
    """The metrics of the fit and test of the stages, and their predictions."""
    found = {}
    with tempfile.TemporaryDirectory() as runs:
        for stage in names:
            for verb in ("fit", "test", "predict"):
                checkpoint = [] if verb == "fit" else ["--ckpt_path=best"]
                cli = command(verb, stage, device, runs, *checkpoint, *more)
                found[f"{verb} {stage}"] = metrics(cli)
            lines = (cli.run.folder / "predictions.csv").read_text().splitlines()
            found[f"predict {stage}"] = [line.split(",")[1] for line in lines[1:]]
    return found


def every_stage(rules: Rules) -> dict:
    """Exact metrics on both devices; and what a GPU's usual precisions do, with all figures."""
    found = {device: stages(device, EXACT, PLAIN) for device in ON}
    # Images that do not fit on the device: they travel in batches, and a probe's features lie there all the same.
    with patch.object(in_memory, "free_memory", lambda device: 0.0):
        found["travelling"] = stages("pretend", EXACT, PLAIN, names=("triplet_encoder", "linear_probe"))
    with tempfile.TemporaryDirectory() as runs:
        for precision in ("bf16-mixed", "16-mixed", "32-true"):
            at = [f"--trainer.precision={precision}", f"--pictures={precision == '32-true'}"]
            found[f"{precision} triplet_encoder"] = metrics(command("fit", "triplet_encoder", "pretend", runs, *at))
        command("fit", "mlp_probe", "pretend", runs, *at)
        found["32-true test"] = metrics(command("test", "mlp_probe", "pretend", runs, *at, "--ckpt_path=best"))
    return found


def every_loss(rules: Rules) -> dict:
    """For each loss: the largest difference of its value and gradient on both devices, and a host's waits for them and
    for what MiningMonitor measures."""
    found = {}
    z, labels = torch.randn(60, 8, dtype=torch.float64), torch.arange(60) % 7
    labels[50:] = labels[50:] % 3  # classes of several sizes
    for name, made in LOSSES.items():
        values, waits = [], []
        for device in ON:
            loss, x, y = made().double().to(device), z.detach().to(device).requires_grad_(), labels.to(device)
            rules.waits.clear()
            value = loss(x, y, torch.Generator().manual_seed(0))
            value.backward()
            waits.append(len(rules.waits))
            measure(loss, x, y, value)
            waits.append(len(rules.waits) - waits[-1])
            values.append(torch.cat([value.detach().view(1), x.grad.flatten()]).cpu())
        found[name] = {"difference": float((values[0] - values[1]).abs().max()), "waits": waits[2:]}
    return found


class Mark(Callback):
    """Tells the rules which step it is."""

    def on_train_batch_start(self, trainer, *args) -> None:
        RULES[0].step = trainer.global_step + 1


RULES: list[Rules] = []  # of this process; Lightning makes the callbacks


def waiting(rules: Rules) -> dict:
    """Where in steps 6 to 20 a host would wait, with every callback; they measure every fifth step."""
    found = {}
    short = ["--trainer.max_steps=21", "--data.batch_size=10"]
    short += ["--trainer.limit_val_batches=1", "--mining_monitor.every_n_steps=5", "--trainer.log_every_n_steps=5"]
    margin = ["--model.loss=TripletMarginLoss", "--model.loss.margin=0.3", "--model.loss.triplets=all"]
    stages = [("margin, all", "triplet_encoder", margin)]
    names = ("triplet_encoder", "supervised_encoder", "softmax_regression", "linear_probe", "grid")
    stages += [(name, name, []) for name in names]
    # As on a machine of Apple's, whose GPUs have no float64.
    with tempfile.TemporaryDirectory() as runs, patch("torch.backends.mps.is_available", lambda: True):
        command("fit", "triplet_encoder", "cpu", runs, PLAIN)
        for precision in ("32-true", "bf16-mixed"):
            # The others' steps have no half precision of their own.
            for name, stage, more in stages if precision == "32-true" else stages[:2]:
                rules.waits.clear()
                given = [f"--trainer.precision={precision}", PLAIN, "--trainer.callbacks+=pretend_jobs.Mark"]
                command("fit", stage, "pretend", runs, *short, *more, *given)
                found[f"{name}, {precision}"] = [wait for wait in rules.waits if 6 <= wait[0] <= 20]
    return found


class Poison(Callback):
    """Makes the weights of one process NaN before a step, and touches `file` then."""

    def __init__(self, step: int, rank: int = 0, file: str | None = None) -> None:
        self.step, self.rank, self.file = step, rank, file

    def on_train_batch_start(self, trainer, pl_module, *args) -> None:
        if trainer.global_step + 1 == self.step and trainer.global_rank == self.rank:
            for weight in pl_module.parameters():
                weight.data.fill_(float("nan"))
            if self.file:
                Path(self.file).touch()


def not_finite(rules: Rules) -> dict:
    """How fits end whose weights are NaN from a step on; and whether any checkpoint holds such weights."""
    found = {}
    cases = {
        "at max_steps": (12, ["--trainer.max_steps=13"]),
        "before a validation": (2, ["--trainer.val_check_interval=3"]),
        "in the last step": (16, ["--trainer.max_epochs=1"]),
        "every step's checkpoint": (3, ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_top_k=-1",
                                        "--trainer.callbacks.every_n_train_steps=1"]),
        "every step's weights": (4, ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_top_k=-1",
                                     "--trainer.callbacks.every_n_train_steps=1",
                                     "--trainer.callbacks.save_weights_only=true"]),
        "at an exception": (5, ["--trainer.callbacks+=OnExceptionCheckpoint", "--trainer.callbacks.dirpath=RUNS"]),
    }  # fmt: skip
    for name, (step, more) in cases.items():
        with tempfile.TemporaryDirectory() as runs:
            poison = ["--trainer.callbacks+=pretend_jobs.Poison", f"--trainer.callbacks.step={step}"]
            more = [word.replace("RUNS", runs) for word in more]
            given = ["--data.batch_size=15", *more, *poison, "--trainer.precision=32-true", PLAIN]
            try:
                command("fit", "softmax_regression", "pretend", runs, *given)
                found[name] = "ended well"
            except InputError as error:
                found[name] = str(error)
            for path in Path(runs).rglob("*.ckpt"):
                weights = torch.load(path, weights_only=True)["state_dict"].values()
                if not all(x.isfinite().all() for x in weights):
                    found[name] += f"; {path.name} is not finite"
    return found


def run(part: str, file: str) -> int:
    parts = {"every_stage": every_stage, "every_loss": every_loss, "waiting": waiting, "not_finite": not_finite}
    with Rules() as rules:
        RULES.append(rules)
        found = parts[part](rules)
    found = {"found": found, "operators": sorted(rules.names), "float64": sorted(rules.float64)}
    Path(file).write_text(json.dumps(found), encoding="utf-8")
    return 0
