"""What a command prints when it has ended: what it has written, and the command that follows."""

import inspect
import json
import shlex
from pathlib import Path

from jsonargparse import Namespace
from pytorch_lightning import Trainer

from callbacks.best_checkpoint import best_checkpoint
from callbacks.run_files import peak_memory
from datamodules.in_memory import InMemoryDataModule
from errors import local_path
from lightning_modules import TripletEncoder

PROJECT = Path(__file__).parent
WRITTEN = {
    "validate": "config and TensorBoard events of this validation",
    "test": "report.html, config and TensorBoard events of this test",
    "predict": "predictions.csv, config and TensorBoard events",
}
PROBE_BATCH = 512  # of configs/linear_probe.yaml
FILES = ("checkpoints", "config.yaml", "curves.png", "metrics.csv", "finished.json")
VIEWS = ("views", "crop_scale", "color_jitter", "greyscale", "small_views", "small_size", "small_scale")
AUGMENTATION = ("batch_size", "flip", "translate", "cutout", *VIEWS)  # a probe's config has its own


def after_fit(trainer: Trainer, data: InMemoryDataModule, run: Path | None, config: Namespace) -> str:
    """The lines after a fit; `run` is the folder that it has written into, if any."""
    saved = best_checkpoint(trainer)
    if run is None:
        return "fit ended; nothing is written"
    lines = [f"{run}: {', '.join(name for name in FILES if (run / name).exists())}"]
    if saved is not None and saved.best_model_score is not None:
        score = float(saved.best_model_score)
        lines.append(f"Best: {Path(saved.best_model_path).name}, {saved.monitor} {score:.4f}")
    if trainer.checkpoint_callbacks and (then := following(trainer, data, run, config)):
        lines.append(f"Next: {then}")
    return "\n".join([*lines, look(run.parent.parent)])


def after_evaluation(command: str, run: Path | None) -> str:
    """The lines after validate, test or predict."""
    return f"{command} ended; nothing is written" if run is None else f"{run}: {WRITTEN[command]}. {look(run.parent)}"


def following(trainer: Trainer, data: InMemoryDataModule, run: Path, config: Namespace) -> str:
    """The command after a fit, ready to paste: a probe's, or the test (a validation, where there is no test file, and
    nothing where there are no validation images either)."""
    images = len(data.split("train").images)  # read now where only processes that were spawned have read them
    if not isinstance(trainer.lightning_module, TripletEncoder) or not data.labelled:
        more = data_options(data, config.data) if Path.cwd() != PROJECT else []
        verb = "test" if data.has_test and data.labelled else "validate"
        if verb == "validate" and not data.val_size:
            return ""
        return command(verb, "--config", shown(run / "config.yaml"), "--ckpt_path", shown(run), *more)
    size = [f"--data.batch_size={images}"] if images < PROBE_BATCH else []
    more = [*data_options(data, config.data), *size, "--frozen_encoder.run", shown(run)]
    return command("fit", "--config", shown(PROJECT / "configs" / "linear_probe.yaml"), *more)


def command(*words: str) -> str:
    line = shlex.join(["python", "main.py", *words])
    return f"{line}" if Path.cwd() == PROJECT else f"{line}\nThat command starts in {PROJECT}."


def data_options(data: InMemoryDataModule, config: Namespace) -> list[str]:
    """The options that say which images a run has: the module, and what differs from its defaults."""
    known = {}
    for kind in reversed(type(data).__mro__):
        known |= {name: p.default for name, p in inspect.signature(kind.__init__).parameters.items()}
    given = {k: v for k, v in config.init_args.items() if k not in AUGMENTATION and v != known.get(k)}
    files = {k: shown(local_path(v)) for k, v in given.items() if k in ("root", "train_npz", "test_npz")}
    texts = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in (given | files).items()}
    return ["--data", type(data).__name__, *(f"--data.{k}={v}" for k, v in texts.items())]


def shown(path: Path) -> str:
    """A path as the working directory's user would type it, or whole where the command starts elsewhere."""
    path = path.absolute()
    return str(path.relative_to(PROJECT) if Path.cwd() == PROJECT and path.is_relative_to(PROJECT) else path)


def look(folder: Path) -> str:
    return f"Look: {shlex.join(['tensorboard', '--logdir', shown(folder)])}"


def peak() -> str:
    return ", ".join(f"{mib:,.0f} MiB of {name}" for name, mib in peak_memory().items())
