"""`studies.buys` on digits: every question once, and again without a fit."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from errors import InputError
from lightning_modules.finite_loss import LossNotFinite

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def found_from_anywhere(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("buys")


@pytest.mark.parametrize("question", ["labels", "noise", "shift", "unknown", "coarse"])
def test_a_question_has_an_answer_and_keeps_it(question, out, monkeypatch, capsys):
    buys, fits = (importlib.import_module(f"studies.{name}") for name in ("buys", "rivals"))
    monkeypatch.setattr(sys, "argv", ["buys", question, "--data=digits", "--seeds=1", f"--out={out}"])
    buys.main()
    found = json.loads((out / f"{question}_digits.json").read_text())
    rivals = {fits.PIXELS, fits.PATCHES, fits.RANDOM, fits.ENTROPY, fits.TRIPLET, fits.FREE}
    assert rivals <= {f["rival"] for f in found} and all(0 <= f["value"] <= 1 for f in found)
    text = (out / f"{question}_digits.md").read_text()
    assert "label-free probe − cross-entropy" in text and (out / f"{question}_digits.png").stat().st_size > 10_000
    monkeypatch.setattr(fits, "main", None)
    buys.main()
    assert json.loads((out / f"{question}_digits.json").read_text()) == found


def test_cross_entropy_that_diverges_at_every_rate_is_one_line():
    fits = importlib.import_module("studies.rivals")

    def diverges(*args):
        raise LossNotFinite("the loss is nan")

    first = SimpleNamespace(points={"rate_1": [], "rate_2": []}, entropy=diverges, accuracy=None)
    study = SimpleNamespace(seeds=[first], chosen={})
    with pytest.raises(InputError, match="cross-entropy_few: .*rate_1, rate_2"):
        fits.Study.entropy(study, first, 0, lambda draw: fits.Given("_few", 4, []))


def test_corruptions_grow_with_their_severity():
    corruptions = importlib.import_module("studies.corruptions")
    images = torch.randint(256, (20, 8, 8, 3), generator=torch.Generator().manual_seed(0)).float()
    smooth = torch.nn.functional.interpolate(images.permute(0, 3, 1, 2), size=32, mode="bilinear")
    images = smooth.round().byte().permute(0, 2, 3, 1).contiguous()
    for kind in corruptions.KINDS:
        made = [corruptions.corrupted(images, kind, severity) for severity in range(5)]
        changes = [float((x.float() - images.float()).abs().mean()) for x in made]
        assert all(x.shape == images.shape and x.dtype == torch.uint8 for x in made), kind
        if kind == "saturation":  # less colour, then more
            changes = changes[:3]
        assert changes[0] > 0.2 and changes == sorted(changes), (kind, changes)
        assert torch.equal(corruptions.corrupted(images, kind, 2), made[2]), kind
    assert 0 < (corruptions.mixed(images) != images).float().mean() < 1
