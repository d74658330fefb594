"""Bad input is refused in one line with exit code 2, and leaves every file as it was; its good twin is accepted."""

import http.server
import io
import tarfile
import threading
import urllib.error
import zipfile

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from errors import InputError, one_line
from main import main


def spoil(path, **arrays):
    """Rewrites an .npz with some arrays replaced, None to leave one out."""
    with np.load(path) as file:
        kept = {**file, **arrays}
    np.savez(path, **{k: v for k, v in kept.items() if v is not None})


BAD = {
    "missing images": ({"images": None}, ["no array named 'images'"]),
    "missing labels": ({"labels": None}, ["no labels", "SoftmaxRegression needs"]),
    "float images": ({"images": np.zeros((300, 32, 32, 3), np.float32)}, ["float32", "expected uint8"]),
    "wrong size": ({"images": np.zeros((300, 28, 28, 3), np.uint8)}, ["(300, 28, 28, 3)", "expected (N, 32, 32, 3)"]),
    "no images": ({"images": np.zeros((0, 32, 32, 3), np.uint8)}, ["N > 0"]),
    "channel first": ({"images": np.zeros((300, 3, 32, 32), np.uint8)}, ["channel-first", "transpose"]),
    "label too high": ({"labels": np.r_[np.zeros(299, int), 10]}, ["label 10 of image 299", "0..9"]),
    "label negative": ({"labels": np.r_[-1, np.ones(299, int)]}, ["label -1 of image 0"]),
    "float labels": ({"labels": np.zeros(300)}, ["labels are float64", "expected integers"]),
    "labels of another length": ({"labels": np.arange(299) % 10}, ["(299,)", "expected (300,)"]),
    "only one class": ({"labels": np.full(300, 3)}, ["only one class"]),
    "pickled objects": ({"labels": np.array([{}] * 300, dtype=object)}, ["pickled", "never loaded"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arrays(name, tiny, run, refused):
    arrays, words = BAD[name]
    path = tiny / "cifar10_train.npz"
    spoil(path)
    run("fit", "softmax_regression")  # the good twin, rewritten the same way
    spoil(path, **arrays)
    refused("fit", "softmax_regression", words=words if "class" in name else [str(path), *words])


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.99])
def test_truncated_archive(keep, tiny, refused):
    path = tiny / "cifar10_train.npz"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    refused("fit", "softmax_regression", words=[str(path)])


def test_an_array_that_claims_100_gb(tiny, refused):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (32_552_084, 32, 32, 3)}
    )
    with zipfile.ZipFile(tiny / "cifar10_train.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue() + bytes(3072))
        archive.writestr("labels.npy", header.getvalue() + bytes(3072))
    refused(
        "fit", "softmax_regression", words=["cifar10_train.npz: images.npy claims 100000002048 bytes and holds 3072"]
    )


def test_a_zip_bomb(tiny, refused):
    """1.1 GB of zeros in 1.1 MB."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (360_000, 32, 32, 3)}
    )
    with zipfile.ZipFile(tiny / "cifar10_train.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("images.npy", "w") as file:
            file.write(header.getvalue())
            for _ in range(360):
                file.write(bytes(3_072_000))
    assert (tiny / "cifar10_train.npz").stat().st_size < 2e6
    refused("fit", "softmax_regression", words=["cifar10_train.npz: images.npy unpacks from", "to 1105920000 bytes"])


def test_a_download_that_has_been_tampered_with(tmp_path, run, monkeypatch):
    """Refused by its checksum before anything is unpacked or unpickled, a file outside its folder least of all."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name in ("cifar-10-batches-py/data_batch_1", "../outside"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(archive.getvalue())

        do_HEAD = do_GET

        def log_message(self, *args):
            served.append(args)

    served = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/cifar-10-python.tar.gz")
        root = tmp_path / "root"
        with pytest.raises(InputError, match="no intact CIFAR-10 .*corrupted.*cifar10_train.npz"):
            run("fit", "softmax_regression", f"--data.root={root}")
        server.shutdown()
    assert (
        served
        and [p.name for p in root.rglob("*")] == ["cifar-10-python.tar.gz"]
        and not (tmp_path / "outside").exists()
    )


def test_a_plain_array_is_no_archive(tiny, refused):
    with (tiny / "cifar10_train.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    refused("fit", "softmax_regression", words=["expected an .npz archive"])


def test_named_file_that_does_not_exist(tiny, refused):
    refused("fit", "softmax_regression", "--data.train_npz=elsewhere.npz", words=["elsewhere.npz: no such file"])


def test_no_data_and_no_network(tmp_path, tiny, refused, monkeypatch):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    empty = f"--data.root={tmp_path / 'empty'}"
    refused(
        "fit", "softmax_regression", empty, words=["Name or service not known", "cifar10_train.npz", "--data.train_npz"]
    )
    refused("fit", "softmax_regression", empty, "--data.download=false", words=["switched off", "cifar10_train.npz"])


def test_unlabelled_test_images_serve_predict_only(tmp_path, tiny, run, refused):
    run("fit", "softmax_regression")
    with np.load(tiny / "cifar10_test.npz") as file:
        np.savez(tmp_path / "test_images.npz", images=file["images"])
    unlabelled = f"--data.test_npz={tmp_path / 'test_images.npz'}"
    refused("test", "softmax_regression", unlabelled, "--ckpt_path=best", words=["no labels", "predict only"])
    run("predict", "softmax_regression", unlabelled, "--ckpt_path=best")
    assert (tmp_path / "runs/softmax_regression/version_0/predict_0/predictions.csv").read_text().count("\n") == 61


@pytest.mark.parametrize(
    "options, words",
    [
        (["--data.val_size=300"], ["val_size 300", "300 training images"]),
        (["--data.val_size=-1"], ["val_size -1"]),
        (["--data.batch_size=251"], ["batch_size 251", "250 training images"]),
        (["--data.batch_size=0"], ["batch_size 0"]),
        (["--data.classes=[1,10]"], ["10 is not in the data", "0 airplane"]),
        (["--data.classes=[1,1]"], ["at least two different classes"]),
        (["--data.classes=[4]"], ["at least two different classes"]),
        (["--data.translate=32"], ["translate 32"]),
        (["--data.cutout=33"], ["cutout 33"]),
        (["--model.lr=0"], ["model.lr 0", "above 0"]),
        (["--model.lr=fast"], ["lr", "expected float", "fast"]),
        (["--trainer.max_epochs=many"], ['"trainer.max_epochs"', "expected int", "many"]),
        (["--trainer.callbacks+=TSNE", "--trainer.callbacks.sample=9"], ["callbacks", "'sample' is not accepted"]),
        (["--tsne.samples=9"], ["tsne.samples 9", "at least 10"]),
        (["--trainer.callbacks+=MiningMonito"], ["MiningMonito"]),
        (["--model.learning_rate=1"], ["learning_rate"]),
        (["--trainer.epochs=3"], ["epochs"]),
        (["--model=NoSuchModel"], ["NoSuchModel"]),
        (["--model.schedule=cosine"], ["cosine"]),
        (["--trainer.max_epochs=-1"], ["max_epochs", "max_steps"]),
        (["--config=nowhere.yaml"], ["nowhere.yaml"]),
        (["--model=LogisticRegression"], ["LogisticRegression", "--data.classes '[0,1]'"]),
        (["--ckpt_path=nowhere.ckpt"], ["nowhere.ckpt", "no such file"]),
        (["--ckpt_path=last"], ["last", "fit first"]),
    ],
)
def test_impossible_options(options, words, refused):
    refused("fit", "softmax_regression", *options, words=words)


def test_a_class_without_images(tiny, refused, run):
    with np.load(tiny / "cifar10_train.npz") as file:
        keep = file["labels"] != 3
        spoil(tiny / "cifar10_train.npz", images=file["images"][keep], labels=file["labels"][keep])
    run("fit", "softmax_regression", "--data.classes=[2,4]", "--data.batch_size=10")
    refused("fit", "softmax_regression", "--data.classes=[2,3]", "--data.batch_size=10", words=["no image of class 3"])


def test_unknown_key_in_a_config_file(tmp_path, refused):
    (tmp_path / "typo.yaml").write_text("trainer:\n  max_epoch: 3\n")
    refused("fit", "softmax_regression", f"--config={tmp_path / 'typo.yaml'}", words=["max_epoch"])
    (tmp_path / "broken.yaml").write_text("trainer: [\n")
    refused("fit", "softmax_regression", f"--config={tmp_path / 'broken.yaml'}", words=["a --config file", "line 2"])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_an_encoder_without_weights_needs_a_head(refused, optimizer):
    nothing = ["--model.encoder=RandomPatches", "--model.encoder.patches=4", "--model.z_dim=null"]
    given = [*nothing, f"--model.optimizer={optimizer}"]
    refused("fit", "triplet_encoder", *given, words=["TripletEncoder", "no weight in it can be trained"])


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_without_a_checkpoint_nothing_is_evaluated(command, refused):
    refused(command, "softmax_regression", words=["--ckpt_path best|last|FILE|RUN_FOLDER"])
    refused(command, "softmax_regression", "--ckpt_path=best", words=["no run with checkpoints"])


def test_checkpoints_that_do_not_fit(tmp_path, run, refused):
    run("fit", "softmax_regression")
    run("fit", "supervised_encoder", "--model.encoder.init_args.widths=[8,8,8]")
    softmax = tmp_path / "runs" / "softmax_regression" / "version_0"
    supervised = tmp_path / "runs" / "supervised_encoder" / "version_0"
    refused("test", "softmax_regression", f"--ckpt_path={supervised}", words=["SupervisedEncoder", "SoftmaxRegression"])
    refused("test", "supervised_encoder", f"--ckpt_path={softmax}", words=["SoftmaxRegression", "SupervisedEncoder"])
    refused("test", "linear_probe", f"--ckpt_path={softmax}", words=["SoftmaxRegression", "LinearProbe"])
    refused("fit", "supervised_encoder", f"--ckpt_path={softmax}", words=["SoftmaxRegression", "SupervisedEncoder"])
    # The config file says other widths than the checkpoint: an error, and nobody's widths are silently taken.
    refused("test", "supervised_encoder", f"--ckpt_path={supervised}", words=["encoder", "[8, 8, 8]", "config.yaml"])
    two = ["--data.classes=[0,1]", f"--ckpt_path={softmax}"]
    refused("test", "softmax_regression", *two, words=["class_names"])
    refused("test", "softmax_regression", f"--ckpt_path={tmp_path / 'data'}", words=["not a run folder"])
    run("test", "softmax_regression", f"--ckpt_path={softmax}")


def test_corrupt_checkpoints(tmp_path, run, refused):
    run("fit", "softmax_regression")
    good = tmp_path / "runs" / "softmax_regression" / "version_0" / "checkpoints" / "last.ckpt"
    path = tmp_path / "bad.ckpt"

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    content = good.read_bytes()
    for bad in (b"", b"not a checkpoint", content[: len(content) // 2], content[:-1]):
        path.write_bytes(bad)
        refused("test", "softmax_regression", f"--ckpt_path={path}", words=[str(path)])
    for bad in ({"state_dict": Evil()}, [1, 2], {"weights": torch.zeros(1)}):
        torch.save(bad, path)
        refused("test", "softmax_regression", f"--ckpt_path={path}", words=[str(path)])
    assert not (tmp_path / "executed").exists()
    checkpoint = torch.load(good, weights_only=True)
    weight = checkpoint["state_dict"].pop("linear.weight")
    torch.save(checkpoint, path)
    refused("test", "softmax_regression", f"--ckpt_path={path}", words=["linear.weight", "missing"])
    checkpoint["state_dict"]["linear.weight"] = weight[:9]
    torch.save(checkpoint, path)
    refused("test", "softmax_regression", f"--ckpt_path={path}", words=["linear.weight", "(9, 3072)", "(10, 3072)"])
    checkpoint["state_dict"]["linear.weight"] = weight
    torch.save(checkpoint, path)
    run("test", "softmax_regression", f"--ckpt_path={path}")


def test_checkpoints_made_to_run_code_or_fill_the_memory(tmp_path, run, refused):
    run("fit", "triplet_encoder", "--model.encoder.init_args.widths=[8,8,8]")
    good = tmp_path / "runs" / "triplet_encoder" / "version_0" / "checkpoints" / "last.ckpt"
    path = tmp_path / "bad.ckpt"
    probe = "fit", "linear_probe", f"--frozen_encoder.run={path}"

    class Allocates:
        def __reduce__(self):
            return bytearray, (10**13,)

    checkpoint = torch.load(good, weights_only=True)
    torch.save({**checkpoint, "note": Allocates()}, path)
    refused(*probe, words=[str(path)])
    spec = checkpoint["stage"]["encoder"]
    for class_path in ("torch.nn.Linear", "os.system", "subprocess.Popen", ["FastEncoder"], None):
        checkpoint["stage"]["encoder"] = {"class_path": class_path, "init_args": {}}
        torch.save(checkpoint, path)
        refused(*probe, words=["named by the checkpoint is not one of", "FastEncoder"])
    for init_args in (
        {"widths": [10**7] * 3},
        {"widths": [10**30] * 3},
        {"widths": "8"},
        {"widths": [8.5] * 3},
        [8],
        {"x": 1},
    ):
        checkpoint["stage"]["encoder"] = {**spec, "init_args": init_args}
        torch.save(checkpoint, path)
        refused(*probe, words=["fit lightning_modules.encoders.fast.FastEncoder"])
    with zipfile.ZipFile(good) as stored, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
        packed.writestr("archive/data/99", bytes(2**26))
    refused(*probe, words=[str(path), "claims to hold more"])
    path.write_bytes(good.read_bytes())
    run(*probe)


def test_predict_of_an_encoder_wants_the_images_it_was_trained_on(tmp_path, tiny, run, refused):
    options = ["--model.encoder.init_args.widths=[8,8,8]"]
    run("fit", "triplet_encoder", *options)
    with np.load(tiny / "cifar10_train.npz") as file:
        np.savez(tiny / "cifar10_train.npz", images=255 - file["images"], labels=file["labels"])
    refused("predict", "triplet_encoder", *options, "--ckpt_path=best", words=["data.pixels_sha256"])


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("DEBUG", "1")
    with pytest.raises(ValueError, match="--ckpt_path"):
        one_line("main.py", lambda: main(["test", "--model=SoftmaxRegression", "--data=DigitsDataModule"]))
