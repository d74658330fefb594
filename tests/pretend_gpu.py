"""A pretend GPU: a torch device over main memory with CUDA's rules, for what a CPU cannot show. NCCL's rules for two.

    python tests/pretend_gpu.py LIBRARY main fit --config … --trainer.accelerator=pretend --trainer.strategy=pretend
    python tests/pretend_gpu.py LIBRARY main fit … --trainer.devices=2 --trainer.strategy=pretend_ddp
    python tests/pretend_gpu.py LIBRARY jobs PART FILE                     # see pretend_jobs.py

LIBRARY is what `build` has made. A renamed backend changes torch for good, so each of these is a process of its own.
It shows nothing of kernels' speed or order, of memory, cuDNN or CUDA graphs.
"""

import contextlib
import os
import subprocess
import sys
import types
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HERE = Path(__file__).parent
# A CUDA device's host waits where a shape or a number depends on what the device computes.
WAITS = {"_local_scalar_dense", "nonzero", "_unique2", "unique_consecutive", "unique_dim", "masked_select", "equal"}
WAITS |= {"bincount"}
COPIES = {"_to_copy", "copy_", "_copy_from", "_copy_from_and_resize"}


def build(library: Path) -> None:
    """Compiles pretend_gpu.cpp into `library`; about a minute."""
    from torch.utils.cpp_extension import include_paths, library_paths

    flags = [f"-I{p}" for p in include_paths()]
    flags += [flag for p in library_paths() for flag in (f"-L{p}", f"-Wl,-rpath,{p}")]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    command = ["g++", "-std=c++20", "-O0", "-fPIC", "-shared", abi, *flags, str(HERE / "pretend_gpu.cpp"), "-o"]
    subprocess.run([*command, str(library), "-ltorch", "-ltorch_cpu", "-lc10"], check=True)


def register(library: str) -> None:
    """Makes `torch.device("pretend")`, and Lightning's accelerator and strategies of that name."""
    torch.ops.load_library(library)
    torch.utils.rename_privateuse1_backend("pretend")
    module = types.ModuleType("torch.pretend")
    module.is_available = module.is_initialized = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.set_device = module.synchronize = lambda *device: None
    module.manual_seed = module.manual_seed_all = lambda seed: torch.default_generator.manual_seed(seed)
    module.get_rng_state = lambda *device: torch.get_rng_state()
    module.set_rng_state = lambda state, *device: torch.set_rng_state(state)
    module._is_in_bad_fork = lambda: False
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module.device = lambda device: contextlib.nullcontext()
    torch._register_device_module("pretend", module)
    torch.utils.generate_methods_for_privateuse1_backend(for_tensor=True, for_module=True, for_storage=True)
    register_kernels()
    register_with_lightning()


KERNELS = torch.library.Library("aten", "IMPL")


def register_kernels() -> None:
    """Those that the fallback to the CPU does not know, or does wrong."""

    def host(x):
        return x.cpu() if isinstance(x, torch.Tensor) else x

    def convolution(*args):
        return torch.ops.aten.convolution(*map(host, args)).to("pretend")

    def convolution_backward(gradient, x, weight, *rest):
        found = torch.ops.aten.convolution_backward(*map(host, (gradient, x, weight)), [weight.shape[0]], *rest)
        return tuple(None if y is None else y.to("pretend") for y in found)

    def batch_norm(x, weight, bias, mean, variance, *rest):
        statistics = host(mean), host(variance)  # changed in place, which the operator's schema does not say
        found = torch.ops.aten.native_batch_norm(*map(host, (x, weight, bias)), *statistics, *rest)
        for ours, changed in zip((mean, variance), statistics):
            if ours is not None:
                ours.copy_(changed)
        return tuple(y.to("pretend") for y in found)

    KERNELS.impl("convolution_overrideable", convolution, "PrivateUse1")
    KERNELS.impl("convolution_backward_overrideable", convolution_backward, "PrivateUse1")
    KERNELS.impl("native_batch_norm", batch_norm, "PrivateUse1")


class Rules(TorchDispatchMode):
    """Refuses what CUDA refuses; notes the operators on the device (`names`) and what a CUDA host would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()  # with their overload: cumsum.default
        self.float64: set[str] = set()  # operators that made float64 numbers on the device
        # Step, operator, the project's line, and whether it is in on_train_batch_end.
        self.waits: list[tuple[int, str, str, bool]] = []
        self.step = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name.removeprefix("aten::")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = [x for x in tensors if x.device.type == "pretend"]
        made = kwargs.get("device")
        if there or (made is not None and torch.device(made).type == "pretend"):
            self.names.add(str(function).removeprefix("aten."))
            if name == "cumsum" and args[0].is_floating_point():
                self.names.add("cumsum of floats")
            self._refuse(name, args, kwargs, tensors, bool(there))
            if self._waits(name, args, kwargs):
                self.waits.append((self.step, name, *project_line()))
        found = function(*args, **kwargs)
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float64 and x.device.type == "pretend":
                self.float64.add(name)
        return found

    @staticmethod
    def _refuse(name, args, kwargs, tensors, there: bool) -> None:
        if any(isinstance(x, torch.Generator) for x in tree_leaves((args, kwargs))):
            raise RuntimeError(f"pretend: {name} on the device was given a CPU's generator")
        if not there or name in COPIES:
            return
        allowed = tree_leaves(args[1]) if name.startswith(("index", "_index", "_unsafe_index")) else []
        for x in tensors:
            if x.device.type == "cpu" and x.ndim and not any(x is y for y in allowed):
                raise RuntimeError(f"pretend: expected all tensors of {name} on one device, found {tuple(x.shape)}")

    @staticmethod
    def _waits(name, args, kwargs) -> bool:
        if name in ("_to_copy", "copy_"):
            source, target = (args[0], kwargs.get("device")) if name == "_to_copy" else (args[1], args[0].device)
            unasked = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
            return target is not None and source.device.type != torch.device(target).type and unasked
        masks = args[1] if name == "index" else ()
        return name in WAITS or any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in masks)


def project_line() -> tuple[str, bool]:
    """The innermost line of the project that is being run, and whether a batch's end is being worked on."""
    frame, line, at_end = sys._getframe(2), "", False
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if not line and HERE.parent in path.parents and "site-packages" not in path.parts and HERE not in path.parents:
            line = f"{path.relative_to(HERE.parent)}:{frame.f_lineno}"
        at_end = at_end or frame.f_code.co_name == "on_train_batch_end"
        frame = frame.f_back
    return line, at_end


def register_with_lightning() -> None:
    from pytorch_lightning.accelerators import Accelerator, AcceleratorRegistry
    from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy, StrategyRegistry
    from pytorch_lightning.trainer.connectors import accelerator_connector

    class Pretend(Accelerator):
        def setup_device(self, device): ...
        def teardown(self): ...

        def get_device_stats(self, device):
            return {}

        @staticmethod
        def parse_devices(devices):
            return 1 if devices == "auto" else int(devices)

        @staticmethod
        def get_parallel_devices(devices):
            return [torch.device("pretend", 0)] * devices  # one for each process

        @staticmethod
        def auto_device_count():
            return 1

        @staticmethod
        def is_available():
            return True

        @staticmethod
        def name():
            return "pretend"

    class PretendDDP(DDPStrategy):
        def determine_ddp_device_ids(self):
            return None

    AcceleratorRegistry.register("pretend", Pretend, description="")
    StrategyRegistry.register("pretend", SingleDeviceStrategy, device=torch.device("pretend", 0))
    StrategyRegistry.register("pretend_ddp", PretendDDP, process_group_backend="pretend_nccl")
    mixed = accelerator_connector.MixedPrecision  # of which Lightning makes CUDA's unless the accelerator is "cpu"
    accelerator_connector.MixedPrecision = lambda precision, device, scaler=None: mixed(
        precision, "pretend" if device == "cuda" else device, scaler
    )


class Done(dist._Work):
    """A collective that has ended."""

    def __init__(self, result) -> None:
        super().__init__()
        self.future = torch.futures.Future()
        self.future.set_result(result)

    def wait(self, timeout=None):
        return True

    def get_future(self):
        return self.future


class PretendNCCL(dist.ProcessGroup):
    """gloo that takes what NCCL takes: contiguous tensors on the device."""

    def __init__(self, store, rank: int, size: int, timeout) -> None:
        super().__init__(rank, size)
        self.gloo, self.place = dist.ProcessGroupGloo(store, rank, size, timeout), rank

    def getBackendName(self):
        return "nccl"

    @staticmethod
    def _host(tensors):
        for x in tensors:
            dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
            if x.device.type != "pretend" or not dense:
                raise RuntimeError(f"pretend NCCL: takes contiguous tensors on the device, not {x.device} {x.stride()}")
        return [x.detach().cpu().contiguous() for x in tensors]

    def _in_place(self, tensors, collective):
        copies = self._host(tensors)
        collective(copies).wait()
        for x, copy in zip(tensors, copies):
            x.data.copy_(copy)
        return Done(tensors)

    def allreduce(self, tensors, opts=None):
        tensors = tensors if isinstance(tensors, list) else [tensors]
        mean = opts is not None and opts.reduceOp == dist.ReduceOp.AVG
        done = self._in_place(tensors, lambda copies: self.gloo.allreduce(copies, self._sum() if mean else opts))
        for x in tensors if mean else ():
            x.data.div_(self.size(), rounding_mode=None if x.is_floating_point() else "floor")
        return done

    @staticmethod
    def _sum():
        return dist.AllreduceOptions()

    def allreduce_coalesced(self, tensors, opts=None):
        for x in tensors:
            self.allreduce([x])
        return Done(tensors)

    def broadcast(self, tensors, opts=None):
        return self._in_place(tensors, lambda copies: self.gloo.broadcast(copies, opts))

    def allgather(self, outputs, inputs, opts=None):
        self._host(outputs[0])
        copies = [torch.empty(x.shape, dtype=x.dtype) for x in outputs[0]]
        self.gloo.allgather([copies], self._host(inputs)).wait()
        for x, copy in zip(outputs[0], copies):
            x.data.copy_(copy)
        return Done(outputs)

    def _allgather_base(self, output, tensor, opts=None):
        (copy,), _ = self._host([tensor]), self._host([output])
        copies = [torch.empty_like(copy) for _ in range(self.size())]
        self.gloo.allgather([copies], [copy]).wait()
        output.data.copy_(torch.stack(copies).view(output.shape))
        return Done([output])

    def reduce_scatter(self, outputs, inputs, opts=None):
        self._host(outputs)
        total = torch.stack(self._host(inputs[0]))
        self.gloo.allreduce([total], self._sum()).wait()
        outputs[0].data.copy_(total[self.place])
        return Done(outputs)

    def barrier(self, opts=None):
        self.gloo.barrier().wait()
        return Done([])


def register_nccl() -> None:
    dist.Backend.register_backend("pretend_nccl", PretendNCCL, devices=["pretend"])
    dist.distributed_c10d._get_object_coll_device = lambda group=None: "pretend"
    begin = dist.init_process_group
    dist.init_process_group = lambda *args, device_id=None, **options: begin(*args, **options)
    import torch.distributed.nn.functional as differentiable

    # Which way a gather with gradient goes depends on the backend's name.
    names = {
        "get_backend": staticmethod(lambda group=None: "nccl"),
        "__getattr__": lambda self, name: getattr(dist, name),
    }
    differentiable.dist = type("NCCL", (), names)()


def run(library: str, what: str, *rest: str) -> int:
    sys.path.insert(0, str(HERE.parent))
    register(library)
    register_nccl()
    if what == "jobs":
        import pretend_jobs

        return pretend_jobs.run(*rest)
    import main

    with Rules():
        code = main.one_line("main.py", lambda: main.main(list(rest)))
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(run(*sys.argv[1:]))
