"""Benchmarks and studies: their arithmetic, what they read and write, and each of them in a dry run."""

import importlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from errors import InputError
from lightning_modules.finite_loss import LossNotFinite

ROOT = Path(__file__).parent.parent
BENCHMARKS = (
    "training",
    "losses",
    "probe",
    "regression",
    "evaluation",
    "startup",
    "scaling",
    "inspection",
    "views",
    "busy",
    "to_accuracy",
    "gpu",
)
STUDIES = (
    ["studies.recipes", "smoothing", "averaging"],
    ["studies.reading"],
    ["studies.reading", "--crops", "24"],
    ["studies.report"],
)


@pytest.fixture(autouse=True)
def found_from_anywhere(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)


@pytest.fixture
def common():
    return importlib.import_module("benchmarks.common")


def test_sides_take_turns_and_are_compared_pair_by_pair(common):
    order = []
    costs = {"ours": iter([1.0, 2.0, 4.0]), "theirs": iter([2.0, 8.0, 12.0])}

    def side(name):
        order.append(name)
        return next(costs[name])

    found = common.in_turn({name: (lambda name=name: side(name)) for name in costs}, 3)
    assert order == ["ours", "theirs"] * 3
    ours, theirs = common.summary(found, "s", {"theirs": "ours"})
    assert ours == {"name": "ours", "value": 2.0, "unit": "s"}
    assert theirs == {"name": "theirs", "value": 8.0, "unit": "s", "compared with": "ours", "ratio": 3.0}


def test_the_exponent_of_a_power_law(common):
    assert common.exponent([10, 20, 80], [3 * n**1.5 for n in (10, 20, 80)]) == pytest.approx(1.5)


def test_fits_take_one_device(common, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "command", lambda args: args)
    options = SimpleNamespace(data_dir=tmp_path, dry_run=False)
    assert "--trainer.devices=1" in common.fit(options, "triplet_encoder", tmp_path)


def test_images_per_second_behind_the_warm_up(common):
    clock = common.Clock()
    clock.times = [100.0 * i for i in range(clock.WARMUP)] + [5000.0, 5002.0, 5004.0]
    assert clock.rate(batch=10) == 5.0


def test_a_table_has_the_columns_of_all_rows(common):
    lines = common.table([{"name": "a", "value": 12345.6}, {"name": "b", "ratio": 0.98765}]).splitlines()
    assert lines == ["| name | value | ratio |", "|---|---|---|", "| a | 12,346 | – |", "| b | – | 0.9877 |"]


def test_networks_are_those_of_the_shipped_configs(common, tiny):
    parser = common.arguments("benchmarks.training", "")
    options = parser.parse_args(["--data-dir", str(tiny)])
    made = common.shipped(options, "triplet_encoder", "--model.z_dim=16")
    assert (made.model.hparams.weight_decay, made.model.hparams.momentum) == (5e-4, 0.85)
    assert made.model.encoder.init_args["widths"] == [32, 64, 256] and made.model.head.out_features == 16
    assert (made.data.batch_size, made.trainer["max_epochs"]) == (256, 13)


def test_a_benchmark_replaces_its_own_section_of_the_results(tmp_path, monkeypatch):
    results = importlib.import_module("benchmarks.all")
    before = results.RESULTS.read_text(encoding="utf-8")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "RESULTS.md")
    results.RESULTS.write_text(before, encoding="utf-8")
    results.put("startup", "--repetitions=1", [{"name": "main.py --help", "value": 4.25, "unit": "s"}])
    sections, after = ([s.split("\n") for s in t.split("\n## ")] for t in (before, results.RESULTS.read_text("utf-8")))
    assert [s[0] for s in after] == [s[0] for s in sections]
    changed = [new[0] for old, new in zip(sections, after) if list(filter(None, old)) != list(filter(None, new))]
    assert changed == ["startup"] and "| main.py --help | 4.25 | s |" in results.RESULTS.read_text("utf-8")


def test_a_name_that_is_no_benchmark_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["all", "trainign"])
    with pytest.raises(InputError, match="no benchmark trainign; there are training, views, losses"):
        importlib.import_module("benchmarks.all").main()


def test_the_kept_fits_are_those_of_the_settings():
    recipes = importlib.import_module("studies.recipes")
    kept = {
        folder: json.loads((ROOT / "studies" / folder / "fits.json").read_text(encoding="utf-8"))
        for folder in ("losses", "recipes", "label_free")
    }
    told = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for study, settings in recipes.STUDIES.items():
        if not re.search(rf"\b{study}\b", told):
            continue
        free = study.startswith("label_free")
        for changes in settings.values():
            for rate in [0.1, 0.5, 0.02] if study == "losses" else [None]:
                given = recipes.STARTS.get(study, "").split() + changes.split()
                name = " ".join(given + ([] if rate is None else [f"--model.lr={rate}"])) or "default"
                epochs = 3 if study in ("label_free_losses", "label_free_size") else 2
                key = f"label_free_encoder, {name} | {epochs} epochs" if free else f"{name} | 4 epochs"
                folder = "label_free" if free else "losses" if study == "losses" else "recipes"
                assert f"{key} | seed 0" in kept[folder], key


def test_a_study_called_again_fits_nothing_anew(tmp_path, common, monkeypatch):
    recipes = importlib.import_module("studies.recipes")
    given = ["smoothing", "--dry-run", "--out", str(tmp_path), "--json", str(tmp_path / "rows.json")]
    first = common.measured("studies.recipes", given)
    assert [row["name"].split()[-1] for row in first] == ["0", "(default)", "0.2"]
    assert all(row["mean"] == row["seed 0"] and 0.3 < row["mean"] <= 1 for row in first)
    monkeypatch.setattr(recipes, "fit", None)
    assert common.measured("studies.recipes", given) == first
    assert json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))["studies.recipes"] == first


def test_a_study_keeps_no_fit_that_a_user_error_ended(tmp_path, common, monkeypatch):
    recipes = importlib.import_module("studies.recipes")
    errors = iter([InputError("no such data"), *[LossNotFinite("the loss is nan")] * 3])

    def fails(*args):
        raise next(errors)

    monkeypatch.setattr(recipes, "fit", fails)
    given = ["smoothing", "--dry-run", "--out", str(tmp_path)]
    with pytest.raises(InputError, match="no such data"):
        common.measured("studies.recipes", given)
    assert not (tmp_path / "fits.json").exists()
    assert all(math.isnan(row["mean"]) for row in common.measured("studies.recipes", given))


def test_crops_are_the_corners_and_the_centre():
    images = torch.arange(32.0 * 32).view(1, 1, 32, 32).expand(1, 3, 32, 32)
    plain, mirrored, *crops = importlib.import_module("studies.reading").shown(images, [(False, 0), (True, 0)], 8)
    assert torch.equal(plain, images) and torch.equal(mirrored, images.flip(-1)) and len(crops) == 10
    # A linear ramp keeps its mean when it is resized.
    means = [images[..., y : y + 8, x : x + 8].mean() for y, x in ((0, 0), (0, 24), (24, 0), (24, 24), (12, 12))]
    for mean, crop, mirror in zip(means, crops[::2], crops[1::2]):
        torch.testing.assert_close(crop.mean(), mean)
        assert torch.equal(mirror, crop.flip(-1)) and crop.shape == images.shape


def test_neighbours_and_metrics_agree_with_the_peers(common):
    rows = {row["name"]: row for row in common.measured("benchmarks.evaluation", ["--dry-run"])}
    votes = [rows[name]["knn_accuracy"] for name in rows if "kNN" in name]
    assert len(votes) == 3 and max(votes) == min(votes) == rows["ours, all six metrics"]["knn_accuracy"] > 0.7
    for name in ("precision_at_1", "r_precision", "map_at_r"):
        ours, theirs = (rows[side][name] for side in ("ours, all six metrics", "pytorch-metric-learning, three"))
        assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("given", [*([f"benchmarks.{name}"] for name in BENCHMARKS), *STUDIES], ids=lambda g: g[0])
def test_dry_run(given, tmp_path):
    file = tmp_path / "rows.json"
    subprocess.run([sys.executable, "-m", *given, "--dry-run", "--json", str(file)], cwd=ROOT, check=True)
    rows = json.loads(file.read_text(encoding="utf-8"))[given[0]]
    assert rows and all("name" in row for row in rows)
