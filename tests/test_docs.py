"""What README and docs say: commands that work, options that exist, links that lead somewhere."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import CONFIGS
from PIL import Image

import cli
from main import main

ROOT = CONFIGS.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks" / "RESULTS.md",
]
STARTS = ("python", "torchrun", "srun", "pip", "pytest", "tensorboard", "uv", "sbatch", "CIFAR10_NPZ_DIR", "FUZZ")
# Parsed, not run: several devices, downloads.
PARSED = ("--trainer.devices", "--trainer.num_nodes", "--data.dataset cifar100", "--trainer.accelerator gpu")
SMALL = {
    "fit": ["--trainer.max_steps=2", "--trainer.accelerator=cpu"],
    "test": ["--trainer.accelerator=cpu"],
    "validate": ["--trainer.accelerator=cpu"],
    "predict": ["--trainer.accelerator=cpu"],
}


def commands(page: Path) -> list[str]:
    """The commands on a page: lines indented by four spaces, and those between ``` marks that start like one."""
    text = re.sub(r"```python\n.*?```", "", page.read_text(), flags=re.DOTALL)
    text = re.sub(r" \\\n *", " ", text).replace(' "${last[@]}"', "")  # lines that go on; a list that may be empty
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    lines += [
        line.strip()
        for block in re.findall(r"```(?:bash|sh)?\n(.*?)```", text, re.DOTALL)
        for line in block.splitlines()
    ]
    return [line.split("  #")[0].strip() for line in lines if line.startswith(STARTS)]


def calls(page: Path, program: str) -> list[list[str]]:
    """The arguments of each call of a program on a page."""
    found = [part.split(program, 1)[1] for line in commands(page) for part in line.split("&&") if program in part]
    return [shlex.split(arguments, comments=True) for arguments in found]


@pytest.fixture
def folder(tmp_path, tiny, monkeypatch):
    """A working folder with everything that the pages' commands name."""
    rng = np.random.default_rng(0)
    (tmp_path / "configs").symlink_to(CONFIGS)
    for name in ("train", "test"):
        labels = np.arange(60) % 3
        np.savez(
            tmp_path / f"mine{'_test' * (name == 'test')}.npz",
            images=rng.integers(0, 255, (60, 32, 32, 3)).astype(np.uint8),
            labels=labels,
        )
        for kind in ("cat", "dog"):
            (tmp_path / "own" / name / kind).mkdir(parents=True)
            for i in range(20):
                Image.fromarray(rng.integers(0, 255, (32, 32, 3)).astype(np.uint8)).save(
                    tmp_path / "own" / name / kind / f"{i}.png"
                )
    (tmp_path / "photos").symlink_to(tmp_path / "own" / "test" / "cat")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if calls(p, "main.py") and p.name != "CONTRIBUTING.md"], ids=lambda p: p.name
)
def test_the_commands_of_a_page_work(page, folder, monkeypatch):
    if page.name != "README.md":  # whose first commands make the runs that the others start from
        for config in ("triplet_encoder", "linear_probe"):
            main(
                [
                    "fit",
                    "--config",
                    f"configs/{config}.yaml",
                    "--data.batch_size=20",
                    "--data.val_size=50",
                    *SMALL["fit"],
                ]
            )
    ran = 0
    for args in calls(page, "main.py"):
        if args[0] not in SMALL:
            assert args[0] == "export" or args[0].startswith("--")
            if args[0] == "export":
                assert main(args).is_file()
                ran += 1
            continue
        data = [
            "--data.batch_size=20",
            *(["--data.val_size=10"] if "mine.npz" in args or "own" in args else ["--data.val_size=50"]),
        ]
        if any(option in " ".join(args) for option in PARSED) or "--help" in args:
            with monkeypatch.context() as patch:
                for step in ("instantiate_classes", "after_instantiate_classes", "_run_subcommand", "_parse_ckpt_path"):
                    patch.setattr(cli.CLI, step, lambda *_: None)
                if "--help" not in args:
                    main(args)
        else:
            main([*args, *data, *SMALL[args[0]]])
        ran += 1
    assert ran


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_benchmarks_and_their_options_exist(page):
    common = (ROOT / "benchmarks" / "common.py").read_text()
    for args in calls(page, "python -m "):
        if not args[0].startswith("benchmarks."):
            continue
        source = (ROOT / f"{args[0].replace('.', '/')}.py").read_text() + common
        for option in (a.split("=")[0] for a in args[1:] if a.startswith("--")):
            assert f'"{option}"' in source, (args[0], option)
    for args in calls(page, "python reproduce.py"):
        source = (ROOT / "reproduce.py").read_text()
        assert all(f'"{a}"' in source for a in args if a.startswith("--"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = page if not name else page.parent / name
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings], target


def test_nothing_on_the_pages_is_from_one_machine():
    for page in PAGES:
        assert not re.search(r"(?<![\w./])/(home|root|work|tmp|Users)/", page.read_text()), page
