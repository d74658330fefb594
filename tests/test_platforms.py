"""A machine as people have it: its environment, its output's encoding, its paths, and several programs at once."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, arguments, write_tiny

import threads
from errors import InputError, local_path
from main import main
from run_folder import Run
from threads import Reading, leave_room

ROOT = Path(__file__).parent.parent
STAGE, PLAIN = "softmax_regression", "--pictures=false"


def command(tmp_path, *more, cwd=ROOT, **environment):
    environment = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    given = {"cwd": cwd, "capture_output": True, "env": environment, "timeout": 300}
    done = subprocess.run([sys.executable, str(ROOT / "main.py"), *more], **given)
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


def test_a_notebooks_and_a_clusters_variables_and_an_ascii_output_change_nothing(tmp_path, tiny):
    rank = {"RANK": "3", "LOCAL_RANK": "1", "SLURM_PROCID": "2", "WORLD_SIZE": "8", "JSM_NAMESPACE_RANK": "1"}
    notebook = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONIOENCODING": "ascii"}
    code, out, error = command(tmp_path, "fit", *arguments(tmp_path, STAGE), **rank, **notebook)
    assert code == 0, error
    folder = tmp_path / "runs" / STAGE / "version_0"
    assert {p.name for p in folder.iterdir()} >= {"checkpoints", "metrics.csv", "curves.png", "finished.json"}
    assert list(folder.glob("events*")) and "Next: python main.py test" in out


def test_two_processes_report_an_error_once(tmp_path):
    data = [f"--data.root={tmp_path}", "--data.download=false", f"--trainer.logger.save_dir={tmp_path / 'runs'}"]
    config = ["--config", str(CONFIGS / f"{STAGE}.yaml"), "--trainer.accelerator=cpu", "--trainer.devices=2"]
    code, _, error = command(tmp_path, "fit", *config, *data)
    assert code == 2 and error.count("no intact CIFAR-10") == 1


@pytest.mark.parametrize("stage, then", [(STAGE, "test"), ("triplet_encoder", "fit")])
def test_processes_that_are_spawned_write_the_runs_folder(tmp_path, tiny, stage, then):
    spawn = ["--trainer.devices=2", "--trainer.strategy=ddp_spawn", PLAIN]
    small = ["--model.encoder.init_args.widths=[8,8,8]"] if stage == "triplet_encoder" else []
    code, out, error = command(tmp_path, "fit", *arguments(tmp_path, stage, *spawn, *small))
    assert code == 0, error
    folder = tmp_path / "runs" / stage / "version_0"
    assert {p.name for p in folder.iterdir()} >= {"checkpoints", "config.yaml", "metrics.csv", "finished.json"}
    assert Run(folder).best().is_file() and f"Next: python main.py {then}" in out
    following = next(line for line in out.splitlines() if line.startswith("Next: python main.py "))
    main([*shlex.split(following)[3:], "--trainer.accelerator=cpu", f"--trainer.logger.save_dir={tmp_path / 'then'}"])


NAMES = ("my runs", "100% [a]", "it's {x}", "läufe_跑", "~")


@pytest.mark.parametrize("name", NAMES)
def test_any_folder_name_and_the_next_command_runs(tmp_path, run, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    folder = run("fit", STAGE, f"--trainer.logger.save_dir={tmp_path / name}/").run.folder
    assert folder == tmp_path / name / STAGE / "version_0" and (folder / "checkpoints" / "last.ckpt").is_file()
    following = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("Next: python main.py "))
    monkeypatch.chdir(ROOT)  # where the line says that it starts
    main([*shlex.split(following)[3:], "--trainer.accelerator=cpu"])
    page = (folder / "test_0" / "report.html").read_text(encoding="utf-8")
    assert page.count("python main.py test") == 1


@pytest.mark.parametrize("given", ["~/runs", "$PLACE/runs", "${PLACE}/runs"])
def test_home_and_variables_are_one_folder_everywhere(tmp_path, tiny, monkeypatch, given):
    for name in ("HOME", "PLACE"):
        monkeypatch.setenv(name, str(tmp_path))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    place = given.removesuffix("/runs")
    options = [*arguments(tmp_path, STAGE, PLAIN), f"--data.root={place}/data", f"--trainer.logger.save_dir={given}"]
    main(["fit", *options])
    main(["test", *options, f"--ckpt_path={given}/{STAGE}/version_0"])
    assert not list((tmp_path / "cwd").iterdir()) and (tmp_path / "runs" / STAGE / "version_0" / "test_0").is_dir()


def test_a_variable_that_is_not_set_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="the variable NOWHERE is not set"):
        local_path("$NOWHERE/runs")
    (tmp_path / "a$b").mkdir()
    assert local_path("a$b") == Path("a$b")


def test_a_link_that_leads_nowhere_and_a_file_are_refused(tmp_path, refused):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        refused("fit", STAGE, f"--trainer.logger.save_dir={tmp_path / name}", words=["cannot be made", "save_dir"])


def test_what_a_run_that_may_only_be_read_is_tested_into(tmp_path, run, monkeypatch):
    folder = run("fit", STAGE, PLAIN).run.folder
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and access(path, mode))
    other = f"--trainer.logger.save_dir={tmp_path / 'other'}"
    assert run("test", STAGE, PLAIN, other, f"--ckpt_path={folder}").run.folder == tmp_path / "other" / STAGE / "test_0"
    resumed = run("fit", STAGE, PLAIN, other, "--trainer.max_epochs=2", f"--ckpt_path={folder}")
    assert resumed.run.folder == tmp_path / "other" / STAGE / "version_0" and resumed.trainer.global_step == 8


def test_the_data_options_of_the_next_command_are_those_of_the_run(tmp_path, run, capsys):
    write_tiny(tmp_path / "mine")
    own = ["--data.train_npz=" + str(tmp_path / "mine" / "cifar10_train.npz"), "--data.classes=[1,3]"]
    small = ["--model.encoder.init_args.widths=[8,8,8]", "--data.batch_size=30"]
    run("fit", "triplet_encoder", PLAIN, *small, *own)
    following = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("Next: python main.py "))
    cli = main([*shlex.split(following)[3:], "--trainer.accelerator=cpu", f"--trainer.logger.save_dir={tmp_path}"])
    assert cli.datamodule.classes == [1, 3] and cli.datamodule.val_size == 50 and not cli.datamodule.augments


def test_the_next_command_of_a_fit_on_an_own_file_runs(tmp_path, run, capsys, monkeypatch):
    own, home = write_tiny(tmp_path / "mine") / "cifar10_train.npz", tmp_path / "home"
    (home / "cwd").mkdir(parents=True)
    own.rename(home / "own.npz")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "cwd")
    run("fit", STAGE, PLAIN, "--data.train_npz=~/own.npz")
    following = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("Next: python main.py "))
    assert "main.py validate" in following and str(home / "own.npz") in following
    monkeypatch.chdir(ROOT)
    main([*shlex.split(following)[3:], "--trainer.accelerator=cpu"])


@pytest.mark.parametrize(
    "default, cpus, others, count",
    [(2, 2, 0.1, 2), (2, 2, 0.4, 2), (2, 2, 0.95, 1), (2, 2, 3.8, 1), (8, 8, 2.0, 6), (4, 8, 1.0, 4), (1, 2, 1.0, 1)],
)
def test_threads_leave_the_cpus_that_others_use(default, cpus, others, count):
    assert leave_room(default, cpus, others) == count


@pytest.fixture
def beside_a_busy_program(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr(threads, "read", lambda: Reading(at=11.0, everyone=101.9, own=7.0))
    threads.chosen.cache_clear()
    yield Reading(at=10.0, everyone=100.0, own=6.0)
    threads.chosen.cache_clear()


def test_a_busy_program_beside_ours_gets_its_core_and_a_line_reports_it(beside_a_busy_program, capsys):
    assert threads.chosen(beside_a_busy_program) == 1
    assert capsys.readouterr().out == "threads: 1 of 2, since other programs use 0.9 of 2 CPUs; --threads N decides\n"


@pytest.mark.skipif(
    not Path("/proc/stat").exists() or os.cpu_count() == 1,
    reason="run it on Linux with two cores or more: other systems do not say what other programs use",
)
@pytest.mark.parametrize("environment, line", [({}, True), ({"OMP_PROC_BIND": "false"}, False)])
def test_a_fit_beside_busy_programs_leaves_them_their_cores(tmp_path, tiny, environment, line):
    chosen = {"OMP_NUM_THREADS": None, **environment}
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count())]
    try:
        code, out, error = command(tmp_path, "fit", *arguments(tmp_path, STAGE, "--trainer.fast_dev_run=1"), **chosen)
    finally:
        for program in busy:
            program.kill()
            program.wait()
    assert code == 0, error
    assert bool(re.search(r"^threads: \d+ of \d+, since other programs use [\d.]+ of \d+ CPUs", out, re.M)) == line


def test_the_users_own_threads_win(run):
    before = torch.get_num_threads()
    cli = run("fit", STAGE, PLAIN, "--threads=3")
    assert torch.load(Run(cli.run.folder).last(), weights_only=True)["made_by"]["threads"] == 3
    torch.set_num_threads(before)
