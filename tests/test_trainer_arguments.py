"""Every argument of Lightning's Trainer, its usual callbacks and loggers: each works here as Lightning documents it."""

import inspect

import pytest
from conftest import write_tiny
from pytorch_lightning import Trainer
from pytorch_lightning.loggers.logger import DummyLogger

from errors import InputError
from main import leave_processes, main

SMALL = ["--model.encoder.init_args.widths=[8,8,8]"]
PLAIN = "--pictures=false"
# What touches data, precision, checkpoints or logging, for every stage.
SHARED = {
    "fast_dev_run": ["true", "2"],
    "limit_train_batches": ["2", "0.5", "0"],
    "limit_val_batches": ["1", "1.0", "0"],
    "limit_test_batches": ["1"],
    "limit_predict_batches": ["1"],
    "overfit_batches": ["1"],
    "val_check_interval": ["2", "0.5"],
    "check_val_every_n_epoch": ["2"],
    "accumulate_grad_batches": ["2"],
    "precision": ["32-true", "64-true", "16-true", "bf16-true", "bf16-mixed"],
    "num_sanity_val_steps": ["2"],
    "log_every_n_steps": ["1"],
    "logger": ["false", "true", "CSVLogger"],
    "enable_checkpointing": ["false"],
    "inference_mode": ["false"],
    "reload_dataloaders_every_n_epochs": ["1"],
    "use_distributed_sampler": ["false"],
    "barebones": ["true"],
    "max_steps": ["2"],
}
ALL = {
    **SHARED,
    "accelerator": ["cpu"],
    "strategy": ["auto", "ddp"],
    "devices": ["1", "auto"],
    "num_nodes": ["1"],
    "precision": [*SHARED["precision"], "16-mixed", "16", "32", "64", "bf16", "null"],
    "callbacks": ["LearningRateMonitor"],
    "max_epochs": ["2", "0"],
    "min_epochs": ["1"],
    "min_steps": ["1"],
    "max_time": ["00:00:10:00"],
    "num_sanity_val_steps": ["2", "-1", "0"],
    "log_every_n_steps": ["1", "0"],
    "enable_progress_bar": ["false"],
    "enable_model_summary": ["false"],
    "gradient_clip_val": ["0.5"],
    "gradient_clip_algorithm": ["value"],
    "deterministic": ["true", "warn"],
    "benchmark": ["true"],
    "profiler": ["simple", "advanced"],
    "detect_anomaly": ["true"],
    "plugins": ["[]"],
    "sync_batchnorm": ["true"],
    "default_root_dir": ["elsewhere"],
    "enable_autolog_hparams": ["false"],
    "model_registry": ["name"],
}
CALLBACKS = [
    ["EarlyStopping", "monitor=val/loss"],
    ["ModelCheckpoint", "monitor=val/loss"],
    ["ModelCheckpoint", "every_n_train_steps=2", "save_top_k=-1"],
    ["ModelCheckpoint", "save_last=true"],
    ["StochasticWeightAveraging", "swa_lrs=0.01"],
    ["LearningRateFinder", "num_training_steps=5"],
    ["LearningRateMonitor"],
    ["GradientAccumulationScheduler", "scheduling={0: 2}"],
]
# Lightning's own warnings about what is asked for here.
pytestmark = pytest.mark.filterwarnings(
    "ignore:You requested to overfit", "ignore:.*is supported for historical reasons", "ignore:.*barebones",
    "ignore:.*AMP with fp16 is not supported on CPU", "ignore:SWA is currently only", "ignore:\\s*Unable to serialize",
    "ignore:.*max_epochs.*was not set", "ignore:.*called without a model", "ignore:.*trainer.fit_loop",
)  # fmt: skip


def arguments(options, first=False):
    """Each option with each of its values; `first`: further values are slow tests, but for precisions and loggers."""
    for name, values in options.items():
        for i, value in enumerate(values):
            slow = first and i and name not in ("precision", "logger")
            yield pytest.param(name, value, marks=[pytest.mark.slow] if slow else [])


def logged(name, value, tmp_path):
    """The option, and where CSVLogger is to write."""
    more = [f"--trainer.logger.save_dir={tmp_path / 'runs'}"] if value == "CSVLogger" else []
    return [f"--trainer.{name}={value}", *more]


def test_the_list_has_every_argument():
    assert set(inspect.signature(Trainer).parameters) == set(ALL)


@pytest.mark.parametrize("name, value", arguments(ALL))
def test_pixels(tmp_path, run, monkeypatch, name, value):
    monkeypatch.chdir(tmp_path)
    check(name, value, tmp_path, run("fit", "softmax_regression", PLAIN, *logged(name, value, tmp_path)), steps=4)
    leave_processes()  # those of strategy ddp


@pytest.mark.parametrize("name, value", arguments(SHARED, first=True))
def test_an_encoder(tmp_path, run, monkeypatch, name, value):
    monkeypatch.chdir(tmp_path)
    cli = run("fit", "triplet_encoder", PLAIN, *SMALL, *logged(name, value, tmp_path))
    check(name, value, tmp_path, cli, steps=4)


@pytest.fixture(scope="module")
def encoder_run(tmp_path_factory):
    runs = tmp_path_factory.mktemp("encoder")
    data = [f"--data.root={write_tiny(runs / 'data')}", "--data.val_size=50", "--data.batch_size=60"]
    main(["fit", "--config", "configs/triplet_encoder.yaml", *data, *SMALL, PLAIN, "--trainer.max_steps=2",
          "--trainer.accelerator=cpu", f"--trainer.logger.save_dir={runs}"])  # fmt: skip
    return runs / "triplet_encoder" / "version_0"


@pytest.mark.parametrize("name, value", arguments(SHARED, first=True))
def test_a_probe(tmp_path, run, encoder_run, monkeypatch, name, value):
    monkeypatch.chdir(tmp_path)
    encoder = f"--frozen_encoder.run={encoder_run}"
    check(name, value, tmp_path, run("fit", "linear_probe", PLAIN, encoder, *logged(name, value, tmp_path)), steps=4)


def check(name, value, tmp_path, cli, steps):
    """That as many steps were taken as the option says, and that the run's files are where they belong."""
    trainer = cli.trainer
    expected = {
        ("fast_dev_run", "true"): 1, ("fast_dev_run", "2"): 2, ("limit_train_batches", "2"): 2, ("max_epochs", "0"): 0,
        ("limit_train_batches", "0.5"): steps // 2, ("limit_train_batches", "0"): 0, ("overfit_batches", "1"): 1,
        ("accumulate_grad_batches", "2"): -(-steps // 2), ("max_steps", "2"): 2, ("max_epochs", "2"): 2 * steps,
    }.get((name, value), steps)  # fmt: skip
    assert trainer.global_step == expected
    folder = cli.run and cli.run.folder
    if name in ("fast_dev_run", "barebones") or not expected:
        assert folder is None and not list(tmp_path.rglob("*.ckpt")) and not list(tmp_path.rglob("metrics.csv"))
        return
    assert (folder / "finished.json").is_file() and (folder / "config.yaml").is_file()
    assert (folder / "checkpoints" / "last.ckpt").is_file() == ((name, value) != ("enable_checkpointing", "false"))
    assert (folder / "metrics.csv").read_text().startswith("step,epoch,lr,train/accuracy")
    if (name, value) == ("logger", "CSVLogger"):
        assert len(list(folder.rglob("metrics.csv"))) == 2  # Lightning's, which it deletes on resume, in a folder below
    if name == "default_root_dir" or (name, value) == ("logger", "false"):
        assert folder.absolute().is_relative_to(tmp_path / "runs")


@pytest.mark.parametrize("callback", CALLBACKS, ids=lambda c: " ".join(c))
@pytest.mark.parametrize("stage", ["softmax_regression", "triplet_encoder"])
def test_callbacks(tmp_path, run, monkeypatch, stage, callback):
    monkeypatch.chdir(tmp_path)
    name, *options = callback
    given = [f"--trainer.callbacks+={name}", *(f"--trainer.callbacks.{option}" for option in options)]
    cli = run("fit", stage, PLAIN, "--trainer.max_epochs=2", *(SMALL if "encoder" in stage else []), *given)
    assert (cli.run.folder / "finished.json").is_file() and cli.trainer.global_step >= 3
    assert not list(tmp_path.glob(".lr_find*"))


def test_the_triangular_schedule_ends_where_a_varying_accumulation_does(tmp_path, run):
    varying = ["--trainer.callbacks+=GradientAccumulationScheduler", "--trainer.callbacks.scheduling={1: 4, 3: 2}"]
    stage = "softmax_regression", PLAIN, "--model.schedule=triangular", *varying  # four batches an epoch
    whole = run("fit", *stage, "--trainer.max_epochs=5")
    assert whole.trainer.global_step == whole.model.total_steps == 4 + 1 + 1 + 2 + 2
    assert [whole.model.epochs_of(step) for step in range(11)] == [0, 0, 0, 0, 1, 2, 3, 3, 4, 4, 5]
    (config,) = whole.trainer.lr_scheduler_configs
    assert set(config.scheduler.get_last_lr()) == {0}
    run("fit", *stage, "--trainer.max_epochs=5", "--trainer.max_steps=7")  # within the fourth epoch
    resumed = run("fit", *stage, "--trainer.max_epochs=5", "--ckpt_path=last")
    assert resumed.trainer.global_step == resumed.model.total_steps == 10


@pytest.mark.parametrize("stage, name, option, words", [
    ("softmax_regression", "BackboneFinetuning", [], "callback BackboneFinetuning.*has no attribute 'backbone'"),
    ("triplet_encoder", "ModelPruning", ["--trainer.callbacks.pruning_fn=l1_unstructured"], "callback ModelPruning"),
])  # fmt: skip
def test_a_callback_that_fails_on_a_stage_is_named_in_a_line(run, stage, name, option, words):
    with pytest.raises(InputError, match=words):
        run("fit", stage, PLAIN, f"--trainer.callbacks+={name}", *option)


def test_several_loggers_share_the_runs_folder(tmp_path, run):
    save_dir = f"--trainer.logger.save_dir={tmp_path / 'runs'}"
    loggers = ["--trainer.logger+=CSVLogger", save_dir, "--trainer.logger+=DummyLogger"]
    cli = run("fit", "softmax_regression", PLAIN, *loggers[:2])
    assert {p.name for p in cli.run.folder.iterdir()} >= {"csv", "checkpoints", "metrics.csv", "config.yaml"}
    assert list(cli.run.folder.glob("events*"))


class ImageLogger(DummyLogger):
    """Takes pictures as Lightning's WandbLogger does."""

    images: list = []

    def log_image(self, key, images, step=None):
        self.images.append((key, images[0].shape, step))


def test_pictures_go_to_whichever_logger_takes_them_and_into_files(tmp_path, run):
    cli = run("fit", "triplet_encoder", *SMALL, "--tsne.samples=30", f"--trainer.logger={__name__}.ImageLogger")
    drawn = {key for key, shape, _ in ImageLogger.images if len(shape) == 3}
    assert drawn == {"curves", "tsne", "val_sample/pca"}
    assert {p.name for p in cli.run.folder.glob("*.png")} == {"curves.png", "tsne.png", "pca.png"}


def test_a_metric_that_nobody_logs_is_refused_in_a_line(tmp_path, run, capsys):
    monitor = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_loss"]
    with pytest.raises(InputError, match="`val_loss` which is not available.*`val/loss`"):
        run("fit", "softmax_regression", PLAIN, *monitor)


def test_limited_batches_are_the_same_images_in_every_epoch_of_overfitting(run):
    cli = run("fit", "softmax_regression", PLAIN, "--trainer.overfit_batches=2", "--trainer.max_epochs=1")
    loader, seen = cli.datamodule.train_dataloader(), []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        seen.append([labels for _, labels in loader])
    assert all(a.equal(b) for a, b in zip(*seen))


def test_weights_and_biases_offline_takes_metrics_and_pictures(tmp_path, run, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    logger = ["--trainer.logger=WandbLogger", "--trainer.logger.offline=true", "--trainer.logger.project=ladder"]
    cli = run("fit", "softmax_regression", *logger, f"--trainer.logger.save_dir={tmp_path / 'runs'}")
    assert {p.name for p in cli.run.folder.iterdir()} >= {"checkpoints", "metrics.csv", "curves.png"}
    assert list((tmp_path / "runs").rglob("offline-run-*/files/media/images/curves*.png"))
