"""What README and docs say: commands that work, options that exist, links that lead somewhere, code that runs."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import CONFIGS
from PIL import Image

from main import main

ROOT = CONFIGS.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/RESULTS.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
STARTS = ("python", "torchrun", "srun", "pip", "pytest", "tensorboard", "uv", "sbatch", "CIFAR10_NPZ_DIR", "FUZZ")
# Parsed, not run: several devices, downloads, what takes long.
PARSED = (
    "--trainer.devices", "--trainer.num_nodes", "--trainer.accelerator gpu", "--data.dataset cifar100",
    "TorchvisionEncoder",
)  # fmt: skip
SMALL = ["--trainer.accelerator=cpu", "--data.batch_size=20", "--pictures=false"]
FIT = ["--trainer.max_steps=2", *SMALL]


def commands(page: Path) -> list[str]:
    """The commands on a page: lines indented by four spaces, and those between ``` marks that start like one."""
    text = re.sub(r"```python\n.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = re.sub(r" \\\n *", " ", text).replace(' "${last[@]}"', "")  # continued lines; a list that may be empty
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    for block in re.findall(r"```(?:bash|sh)?\n(.*?)```", text, re.DOTALL):
        lines += map(str.strip, block.splitlines())
    return [line.split("  #")[0].strip() for line in lines if line.startswith(STARTS)]


def calls(page: Path, program: str) -> list[list[str]]:
    """The arguments of each call of a program on a page."""
    found = [part.split(program, 1)[1] for line in commands(page) for part in line.split("&&") if program in part]
    return [shlex.split(arguments, comments=True) for arguments in found]


def code(page: str, heading: str) -> str:
    """The first block of Python code below a heading."""
    text = (ROOT / page).read_text(encoding="utf-8").split(f"\n## {heading}\n", 1)[1]
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


def small(config: str) -> list[str]:
    """Options that make a network of one of the configs small."""
    return ["--model.encoder.widths=[4,8,8]"] if "encoder" in config else []


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 255, (60, 32, 32, 3)).astype(np.uint8)


@pytest.fixture
def folder(tmp_path, tiny, images, monkeypatch):
    """A working folder with all data that the pages' commands name."""
    shutil.copytree(CONFIGS, tmp_path / "configs")
    np.savez(tmp_path / "unlabelled.npz", images=255 - images)
    np.savez(tmp_path / "labelled.npz", images=images, labels=np.arange(60) % 3)
    for name, file in (("train", "mine.npz"), ("test", "mine_test.npz")):
        np.savez(tmp_path / file, images=images, labels=np.arange(60) % 3)
        for kind in ("cat", "dog"):
            (tmp_path / "own" / name / kind).mkdir(parents=True)
            for i in range(20):
                Image.fromarray(images[i]).save(tmp_path / "own" / name / kind / f"{i}.png")
    shutil.copytree(tmp_path / "own" / "test" / "cat", tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A place to keep the runs that most pages start from: of a triplet encoder and a linear probe."""
    return tmp_path_factory.mktemp("finished") / "runs"


def run(args: list[str]) -> None:
    """Runs a command as it stands, on little data, in few steps and with small networks."""
    config = args[args.index("--config") + 1]
    few = "10" if {"mine.npz", "own", "unlabelled.npz", "labelled.npz"} & {*args} else "50"
    network = [] if "--model.encoder" in args else small(config)
    main([*args, f"--data.val_size={few}", *(FIT if args[0] == "fit" else SMALL), *network])


@pytest.mark.parametrize(
    "page", [p for p in PAGES if calls(p, "main.py") and p.name != "CONTRIBUTING.md"], ids=lambda p: p.name
)
def test_the_commands_of_a_page_work(page, folder, finished):
    if page.name != "README.md":  # whose first commands make the runs that the others start from
        if not finished.exists():
            for config in ("triplet_encoder", "linear_probe"):
                run(["fit", "--config", f"configs/{config}.yaml"])
            shutil.copytree("runs", finished)
        shutil.copytree(finished, "runs", dirs_exist_ok=True)
    for args in calls(page, "main.py"):
        if args[0] == "export":
            assert main(args).is_file()
        elif any(option in " ".join(args) for option in PARSED):
            with pytest.raises(SystemExit) as printed:
                main([*args, "--print_config"])
            assert not printed.value.code
        else:
            run(args)


def test_the_script_from_python_works(folder, monkeypatch):
    # On digits, an epoch each, with a small network; the rest is the page's.
    script = code("docs/architecture.md", "From Python")
    for word, replacement in (
        ("CIFAR10DataModule(", "DigitsDataModule("),
        ("import CIFAR10DataModule", "import DigitsDataModule"),
        ("FastEncoder()", "FastEncoder([4, 8, 8])"),
        ("max_epochs=13", "max_epochs=1"),
        ("max_epochs=10", "max_epochs=1"),
    ):
        assert word in script
        script = script.replace(word, replacement)
    assert len(script.splitlines()) <= 15
    names = {}
    exec(script, names)
    assert names["trainer"].callback_metrics["test/accuracy"] > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_benchmarks_studies_and_their_options_exist(page):
    common = (ROOT / "benchmarks" / "common.py").read_text(encoding="utf-8")
    for args in calls(page, "python -m "):
        if args[0].startswith(("benchmarks.", "studies.")):
            source = (ROOT / f"{args[0].replace('.', '/')}.py").read_text(encoding="utf-8") + common
            for option in (a.split("=")[0] for a in args[1:] if a.startswith("--")):
                assert f'"{option}"' in source, (args[0], option)
    for args in calls(page, "python reproduce.py"):
        source = (ROOT / "reproduce.py").read_text(encoding="utf-8")
        assert all(f'"{a}"' in source for a in args if a.startswith("--"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = page if not name else page.parent / name
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings], target


def test_every_page_of_docs_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in PAGES:
        assert page.name == "README.md" or page.name in readme or page.name == "RESULTS.md", page


def test_files_that_the_pages_name_exist():
    """Paths in `code` marks and in README's map that look like files of this tree."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for path in re.findall(
            r"`((?:callbacks|datamodules|lightning_modules|configs|studies|tests)/[\w/]+\.\w+)`", text
        ):
            assert (ROOT / path).exists(), (page.name, path)
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Map\n")[1].split("\n## ")[0]
    parent = ROOT
    for indent, name in re.findall(r"^    ( *)([\w/.]+)", tree, re.MULTILINE):
        parent = parent if indent else ROOT
        assert (parent / name).exists(), name
        if not indent and name.endswith("/"):
            parent = ROOT / name
    assert {path.name for path in ROOT.glob("*.py")} <= set(re.findall(r"\w+\.py", tree))


def test_the_workflow_runs_the_commands_of_the_readme():
    workflow = (ROOT / ".github" / "workflows" / "readme.yml").read_text(encoding="utf-8")
    steps = [line.split("run: ")[1] for line in workflow.splitlines() if "- run: " in line]
    assert steps == [line for line in commands(ROOT / "README.md") if line.startswith("pip install") and "&&" in line]


def test_nothing_on_the_pages_is_from_one_machine():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"(?<![\w./])/(home|root|work|tmp|Users)/", text), page
