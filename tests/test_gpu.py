"""What a GPU would meet, as far as a CPU can show it; tests/test_pretend_gpu.py shows more."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning_fabric.utilities.apply_func import _BLOCKING_DEVICE_TYPES
from torch.utils._python_dispatch import TorchDispatchMode

import reproduce
from callbacks import RetrievalMonitor, retrieval_monitor
from datamodules.loader import BatchLoader, bytes_needed
from errors import InputError
from lightning_modules import FastEncoder, MultiNegativeLoss, TripletEncoder
from lightning_modules.losses.functional import _Rows, rows
from lightning_modules.losses.triplets import active_counts
from lightning_modules.retrieval import knn_probabilities
from lightning_modules.triplet_encoder import nearest_labels

ROOT = Path(__file__).parent.parent
SMALL = "--model.encoder.init_args.widths=[8,8,8]"


def like_a_cuda_graph(function, mode=None):
    """Compiles to what a CUDA graph does: the next call overwrites the output of the last one."""
    last = []

    def call(*args):
        for output in last:
            output.data.fill_(float("nan"))
        last[:] = [function(*args)]
        return last[0]

    return call


def test_what_callbacks_keep_of_a_compiled_encoder_is_not_overwritten(run, monkeypatch):
    plain = run("fit", "triplet_encoder", SMALL).trainer.callback_metrics
    monkeypatch.setattr(torch, "compile", like_a_cuda_graph)
    graphs = run("fit", "triplet_encoder", SMALL, "--model.compile_mode=reduce-overhead").trainer.callback_metrics
    assert {name: float(x) for name, x in plain.items()} == {name: float(x) for name, x in graphs.items()}


@pytest.mark.parametrize("mode, refused", [("reduce-overhead", True), ("max-autotune", True), ("default", False)])
def test_cuda_graphs_on_several_processes_are_refused(mode, refused, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, mode: function)
    model = TripletEncoder(FastEncoder([8, 8, 8]), MultiNegativeLoss(), compile_mode=mode)
    model._trainer = SimpleNamespace(world_size=2, datamodule=None)
    with pytest.raises(InputError, match="nobody has tried" if refused else "needs a data module"):
        model.setup("fit")


def test_the_ladder_takes_one_device(tmp_path, monkeypatch):
    seen = []

    def main(args):
        seen.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce, "main", main)
    with pytest.raises(KeyboardInterrupt):
        reproduce.reproduce(["--data=digits", f"--out={tmp_path}"])
    assert "--trainer.devices=1" in seen[0]


def test_no_copy_to_apples_gpus_is_left_to_run_on():
    """They read the memory of a copy that does not block after it was freed (pytorch#139550)."""
    rooms = ("lightning_modules", "datamodules", "callbacks")
    sources = [path.read_text(encoding="utf-8") for room in rooms for path in (ROOT / room).rglob("*.py")]
    assert len(sources) > 30 and sum(text.count("non_blocking") for text in sources) == 1
    assert _BLOCKING_DEVICE_TYPES == ("cpu", "mps")  # Lightning's move_data_to_device, which the loader calls


def test_rows_taken_on_a_gpu_have_a_cpus_gradient():
    z, index = torch.randn(30, 4, dtype=torch.float64), torch.randint(30, (50,))
    slope, gradients = torch.randn(50, 4, dtype=torch.float64), []
    for take in (rows, _Rows.apply):
        x = z.clone().requires_grad_()
        (take(x, index) * slope).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


def test_neighbours_under_autocast_are_those_of_float32():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(400, 16, generator=generator) * 0.1 + torch.randn(16, generator=generator)
    labels = torch.arange(400) % 10
    expected = nearest_labels(z, labels, 0, 400), knn_probabilities(z[:50], z, labels, 10)
    with torch.autocast("cpu", torch.bfloat16):
        found = nearest_labels(z, labels, 0, 400), knn_probabilities(z[:50], z, labels, 10)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("stage", ["softmax_regression", "logistic_regression", "supervised_encoder"])
def test_logits_of_an_evaluation_are_float32(stage, run):
    options = ["--data.classes=[0,1]", "--data.batch_size=10"] if stage == "logistic_regression" else []
    model = run("fit", stage, *options, *([SMALL] if "encoder" in stage else [])).model
    with torch.autocast("cpu", torch.bfloat16):
        kinds = [mode(model)(torch.rand(4, 3, 32, 32)).dtype for mode in (torch.nn.Module.train, torch.nn.Module.eval)]
    assert kinds == [torch.bfloat16, torch.float32]


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("semihard", [False, True])
def test_triplets_are_counted_in_one_pass_over_all_classes(semihard):
    used = []
    for classes in (2, 10, 100):
        with Count() as count:
            active_counts(torch.rand(200, 200), torch.arange(200) % classes, 0.2, semihard)
        used.append(count.operators)
    assert used[0] == used[1] == used[2] < 80


def test_queries_are_drawn_by_time_and_at_the_end(run, monkeypatch):
    drawn = []
    monkeypatch.setattr(retrieval_monitor, "save", lambda trainer, figure, *names: drawn.append(trainer.current_epoch))
    run("fit", "triplet_encoder", SMALL, "--trainer.max_epochs=3")
    assert len(drawn) == 1
    monkeypatch.setattr(retrieval_monitor, "DRAW_EVERY", 0.0)
    drawn.clear()
    run("fit", "triplet_encoder", SMALL, "--trainer.max_epochs=3")
    assert len(drawn) == 3 and RetrievalMonitor()._undrawn is None


@pytest.mark.parametrize("translate, times", [(0, 1), (2, 2.7), (31, 12.5)])
def test_the_memory_a_loader_needs_is_what_it_makes(translate, times):
    images, labels = torch.zeros(500, 32, 32, 3, dtype=torch.uint8), torch.zeros(500, dtype=torch.long)
    loader = BatchLoader(images, labels, 1, seed=0, translate=translate)
    held = loader.inputs.nbytes + (images.nbytes if translate else 0) + labels.nbytes
    needed = bytes_needed(images, labels, 1, translate)
    assert held <= needed < held + 50_000 and needed == pytest.approx(times * images.nbytes, rel=0.05)
