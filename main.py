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
import platform
import sys

from errors import InputError, causes, one_line


def main(args: list[str] | None = None):
    """Runs one command and returns the CLI with its trainer, model and data. Raises InputError for bad input."""
    given = sys.argv[1:] if args is None else args
    if given[:1] == ["export"]:
        from export import export

        return export(given[1:])
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    from cli import CLI

    keep_freed_memory()
    try:
        return CLI(args, __doc__)
    except Exception as error:
        found = next((e for e in causes(error) if isinstance(e, InputError | MisconfigurationException)), None)
        if found is None:
            raise
        raise InputError(str(found)) from error


def keep_freed_memory() -> None:
    """Lets glibc keep freed blocks of any size for the next allocation instead of returning them to the kernel.

    It returns blocks above 32 MiB at once, as large as one activation of a batch, and every training step then pays for
    zeroed pages again. Keeping them is worth about 10 % of the speed on an idle machine (two cores with AMX), and 1.3
    to 1.9 times the speed beside other busy processes. Elsewhere nothing is changed.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        # malloc.h: M_MMAP_MAX: no block by mmap; M_TRIM_THRESHOLD: never shrink; M_TOP_PAD: grow by 64 MiB.
        for parameter, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26)):
            libc.mallopt(parameter, value)


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
