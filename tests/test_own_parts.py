"""A loss, an encoder and a data set from outside the tree, as CONTRIBUTING.md shows them."""

import re
import sys

import pytest
from conftest import CONFIGS

from main import main

PAGE = (CONFIGS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The page's commands, its code being in a module `mine` on the path."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    (tmp_path / "mine.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield re.findall(r"^    python main\.py (.*)$", PAGE, re.MULTILINE)
    sys.modules.pop("mine", None)


def test_the_pages_commands_work(commands, tmp_path, tiny):
    names = []
    for line in commands:
        command, option, config, *more = line.split()
        if "--data" not in more:
            more += [f"--data.root={tiny}", "--data.val_size=50", "--data.batch_size=60"]
        if "--model.loss" in more:  # the page's encoder is the default one
            more += ["--model.encoder.widths=[4,8,8]"]
        more += ["--trainer.max_steps=2", "--pictures=false", f"--trainer.logger.save_dir={tmp_path / 'runs'}"]
        cli = main([command, option, str(CONFIGS.parent / config), *more])
        names.append({type(part).__name__ for part in (cli.model, cli.datamodule, *cli.model.children())})
    loss, encoder, probe, data = names
    assert "CentroidLoss" in loss and "Mine" in encoder and {"LinearProbe", "Mine"} <= probe and "Noise" in data


def test_a_probe_of_an_own_encoder_is_tested_and_wants_its_module(commands, run, refused):
    few = ["--pictures=false"]
    run("fit", "triplet_encoder", "--model.encoder=mine.Mine", *few)
    named = "--frozen_encoder.encoder_module=mine"
    run("fit", "linear_probe", named, *few)
    cli = run("test", "linear_probe", "--ckpt_path=best", named, *few)
    assert type(cli.model.encoder).__name__ == "Mine"
    exported = main(["export", f"--ckpt_path={cli.checkpoint}", "--format=safetensors", "--encoder_module=mine"])
    assert exported.name == "classifier.safetensors" and exported.is_file()
    refused(
        "fit",
        "linear_probe",
        "--frozen_encoder.encoder_module=nowhere",
        words=["frozen_encoder.encoder_module nowhere", "cannot be imported"],
    )
