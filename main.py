"""Fit, validate, test or predict one stage. Every option has its default in code or config, and can be given here.

    python main.py fit  --config configs/softmax_regression.yaml
    python main.py fit  --config configs/triplet_encoder.yaml
    python main.py fit  --config configs/linear_probe.yaml                # on the newest finished triplet encoder
    python main.py test --config configs/linear_probe.yaml --ckpt_path best
    python main.py fit  --config configs/triplet_encoder.yaml --data DigitsDataModule       # no download, for trying
    python main.py fit  --config configs/triplet_encoder.yaml --trainer.devices 2 --model.lr 0.5
    python main.py fit  --config configs/triplet_encoder.yaml --ckpt_path last              # resumes an interrupted run
    python main.py fit  --config configs/triplet_encoder.yaml --mining_monitor.stop true --pictures false
    python main.py export --ckpt_path runs/linear_probe/version_0 --format onnx             # works without this code
    python main.py fit  --config configs/softmax_regression.yaml --quiet
    python main.py fit  --help

DEBUG=1 shows the traceback behind an error's one line.
"""

import ctypes
import gc
import logging
import os
import platform
import sys
import traceback
import warnings

from errors import InputError, causes, one_line
from threads import first_reading


def main(args: list[str] | None = None):
    """Runs one command and returns the CLI with its trainer, model and data. Raises InputError for bad input."""
    given = sys.argv[1:] if args is None else args
    if given[:1] == ["export"]:
        from export import export

        return export(given[1:])
    first_reading()
    starts = "torch" not in sys.modules  # a program, not a notebook with objects of its own
    os.environ.pop("MPLBACKEND", None)  # a notebook's is not installed here, and figures are drawn without one
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    from cli import CLI

    keep_freed_memory()
    quiet_lightning()
    if starts:
        gc.freeze()  # what the imports have made: the garbage collector takes a quarter of a second to walk all of it
    try:
        return CLI(args, __doc__)
    except Exception as error:
        found = next((e for e in causes(error) if isinstance(e, InputError | MisconfigurationException)), None)
        line = str(error if found is None else found)
        if found is None and not refused_by_lightning(error):
            if (callback := failing_callback(error)) is None:
                raise
            line = f"the callback {callback} failed ({type(error).__name__}: {line})"
        raise InputError(line) from error


def refused_by_lightning(error: Exception) -> bool:
    """Whether Lightning itself raised the error: about an option, such as a metric to monitor that nobody logs."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    name = frame.f_globals.get("__name__", "")
    kinds = RuntimeError | ValueError | TypeError | NotImplementedError | ImportError
    return isinstance(error, kinds) and name.startswith(("pytorch_lightning.", "lightning_fabric."))


def failing_callback(error: Exception) -> str | None:
    """The callback of Lightning's own that the error comes from, with nothing but PyTorch and Lightning below it. None
    where memory ran out, or another process has gone."""
    if type(error).__name__ == "OutOfMemoryError":
        return None
    for frame, _ in reversed([*traceback.walk_tb(error.__traceback__)]):
        name = frame.f_globals.get("__name__", "")
        if not name.startswith(("torch.", "pytorch_lightning.")) or name.startswith("torch.distributed"):
            return None
        owner = type(frame.f_locals.get("self"))
        if owner.__module__.startswith("pytorch_lightning.callbacks."):
            return owner.__name__
    return None


def keep_freed_memory() -> None:
    """Lets glibc keep freed blocks of any size for the next allocation instead of returning them to the kernel.

    It returns blocks above 32 MiB at once, as large as one activation of a batch, and every training step then pays for
    zeroed pages again: 4,031 faults and not 33. What that costs depends on the kernel and on other programs:
    `python -m benchmarks.training` measures it. Elsewhere than with glibc nothing is changed.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        # malloc.h: M_MMAP_MAX: no block by mmap; M_TRIM_THRESHOLD: never shrink; M_TOP_PAD: grow by 64 MiB.
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26)):
            libc.mallopt(parameter, value)


def quiet_lightning() -> None:
    """Leaves out the trainer's lines about TPUs and other products, and warnings about what is meant to be so."""
    import torch

    if not torch.cuda.is_available():
        # Lightning has CUDA looked for by NVML, for which an optimiser opens its library anew at every step.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"
    for name in (
        "pytorch_lightning.utilities.rank_zero",
        "pytorch_lightning.trainer.connectors.checkpoint_connector",
        "lightning_fabric.utilities.seed",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        r".*in eval mode at the start of training",  # the frozen encoder
        r".*The dirpath has changed from",  # test and predict write beside the checkpoints they read
        r".*Checkpoint directory .* exists and is not empty",  # a resumed run writes on in its folder
        r"Total length of `list` across ranks is zero",  # data.val_size 0: no validation images
        r".*smaller than the logging interval",  # epochs are logged all the same
        r".*args parameter is intended to run from within Python",  # reproduce.py does
        r".*is not supported by the model summary",  # bf16: the size of the weights in MB is that of float32, as it is
        r".*isinstance\(treespec, LeafSpec\)",  # inside Lightning
        r".*torch.distributed.nn.functional.all_gather is deprecated",  # Lightning calls it
        r".*Detected call of `lr_scheduler.step\(\)` before",  # 16-mixed skips steps while it seeks its scale
    ):
        warnings.filterwarnings("ignore", message)


def leave_processes() -> None:
    """Ends the connection to the other processes of a distributed run; call it last.

    Lightning does so for NCCL only, and gloo's threads may abort a process that exits with them
    (https://github.com/pytorch/pytorch/pull/179291).
    """
    import torch

    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1:] == ["--version"]:
        from importlib.metadata import version

        print(version("contrastive-ladder"))
    else:
        code = one_line("main.py", main)
        leave_processes()
        sys.exit(code)
