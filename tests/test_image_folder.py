"""Folders of images: what is read, what is said, what is refused, and every command on them."""

import csv
import io
import shutil
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIGS
from PIL import Image

from datamodules import CIFAR10DataModule, ImageFolderDataModule
from datamodules.image_folder import read_images
from errors import InputError
from main import main, one_line

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


@pytest.fixture
def folder(tmp_path):
    """Three classes of noisy colours, of 40 to 60 images of several sizes and modes; test images of two of them."""
    rng = np.random.default_rng(0)
    for split, counts in (("train", {"red": 60, "green": 50, "blue": 40}), ("test", {"red": 6, "blue": 4})):
        for name, count in counts.items():
            (tmp_path / "own" / split / name).mkdir(parents=True)
            for i in range(count):
                shape = [(32, 32, 3), (48, 64, 3), (33, 20, 3)][i % 3]
                pixels = np.clip(rng.normal(COLOURS[name], 25, shape), 0, 255).astype(np.uint8)
                image = Image.fromarray(pixels).convert("RGBA" if i % 4 == 1 else "RGB")
                image.save(
                    tmp_path
                    / "own"
                    / split
                    / name
                    / f"{i}.{'png' if i % 2 else 'JPG'}".replace("JPG", "png" if i % 4 == 1 else "JPG")
                )
    return tmp_path / "own"


def command(tmp_path, name, config, *more):
    given = [
        "--config",
        str(CONFIGS / f"{config}.yaml"),
        "--data=ImageFolderDataModule",
        f"--data.root={tmp_path / 'own'}",
    ]
    return main([name, *given, "--data.batch_size=30", f"--trainer.logger.save_dir={tmp_path / 'runs'}", *more])


def test_classes_counts_and_sizes_are_said(folder, capsys):
    data = ImageFolderDataModule(str(folder))
    assert data.class_names == ["blue", "green", "red"] and data.val_size == 15
    train, test = data.split("train"), data.split("test")
    said = capsys.readouterr().out
    assert "150 images of 3 classes" in said and "fewest 40 blue, most 60 red" in said
    assert "99 of 150 images" in said and "(20×33 … 64×48)" in said
    assert train.images.shape == (135, 32, 32, 3) and train.images.dtype == torch.uint8
    for images, labels in (train, test):
        for name, colour in COLOURS.items():
            chosen = images[labels == data.class_names.index(name)]
            if name == "green" and images is test.images:
                assert not len(chosen)
            else:
                torch.testing.assert_close(chosen.float().mean((0, 1, 2)), torch.tensor(colour).float(), rtol=0, atol=4)


@pytest.mark.parametrize("unlabelled", [False, True])
def test_a_fit_without_test_labels_is_followed_by_a_validation(folder, tmp_path, capsys, unlabelled):
    shutil.rmtree(folder / "test")
    if unlabelled:
        shutil.copytree(next((folder / "train").iterdir()), folder / "test")
    command(tmp_path, "fit", "softmax_regression", "--trainer.max_epochs=1", "--pictures=false")
    assert "Next: python main.py validate" in capsys.readouterr().out


def test_an_image_keeps_its_middle(tmp_path):
    pixels = np.zeros((64, 192, 3), np.uint8)
    pixels[:, 64:128] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    Image.fromarray(pixels[:32, 48:80]).save(tmp_path / "exact.png")
    wide, exact = read_images([tmp_path / "wide.png", tmp_path / "exact.png"])
    assert wide[:, 1:-1].min() == 255 and exact.tolist() == pixels[:32, 48:80].tolist()


def test_every_command_works_on_a_folder(folder, tmp_path):
    small = ["--model.encoder.widths=[8,8,8]", "--trainer.max_epochs=2"]
    command(tmp_path, "fit", "triplet_encoder", *small)
    command(tmp_path, "fit", "linear_probe", "--data.flip=false", "--data.translate=0", "--trainer.max_epochs=3")
    tested = command(tmp_path, "test", "linear_probe", "--ckpt_path=best")
    assert float(tested.trainer.callback_metrics["test/accuracy"]) >= 0.8

    for path in (folder / "test").rglob("*.*"):  # without their class folders: for predict alone
        path.rename(folder / "test" / f"{path.parent.name}{path.name}")
    for name in ("red", "blue"):
        (folder / "test" / name).rmdir()
    command(tmp_path, "predict", "linear_probe", "--ckpt_path=best")
    with (tmp_path / "runs/linear_probe/version_0/predict_0/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [path.name.rstrip("0123456789.pngJPG") for path in sorted((folder / "test").iterdir())]
    assert len(rows) == 10 and sum(row["class_name"] == name for row, name in zip(rows, names)) >= 8


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda folder: (folder / "train/red/0.JPG").write_bytes(b"no image"), ["0.JPG", "not a readable image"]),
        (
            lambda folder: (folder / "train/red/0.JPG").write_bytes((folder / "train/red/0.JPG").read_bytes()[:300]),
            ["0.JPG", "not a readable"],
        ),
        (lambda folder: (folder / "train/empty").mkdir(), ["empty", "no images"]),
        (lambda folder: (folder / "train").rename(folder / "training"), ["train", "no such folder"]),
        (
            lambda folder: [(folder / "train" / name).rename(folder / name) for name in ("red", "blue")],
            ["at least two classes"],
        ),
    ],
)
def test_what_cannot_be_read_is_named(damage, words, folder, tmp_path, capsys):
    damage(folder)
    assert one_line("main.py", lambda: command(tmp_path, "fit", "softmax_regression")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words), line
    assert not (tmp_path / "runs").exists()


def test_test_folders_of_other_classes_are_refused(folder):
    (folder / "test" / "red").rename(folder / "test" / "pink")
    with pytest.raises(InputError, match="folder pink: must be one of the classes blue, green, red"):
        ImageFolderDataModule(str(folder)).split("test")


def test_a_classifier_predicts_a_folder_and_writes_features(folder, tmp_path, run):
    run("fit", "triplet_encoder", "--model.encoder.widths=[8,8,8]")
    run("fit", "linear_probe")

    def predict(config):
        return run("predict", config, "--prediction_writer.features=true", *again, "--ckpt_path=best")

    again = [
        f"--data.root={tmp_path / 'data'}",
        "--data.val_size=50",
        "--data.batch_size=60",
        f"--data.test_npz={folder / 'test'}",
    ]
    again += [
        f"--trainer.logger.save_dir={tmp_path / 'runs'}",
        "--trainer.precision=32-true",
        "--trainer.accelerator=cpu",
    ]
    cli = predict("linear_probe")
    out = tmp_path / "runs/linear_probe/version_0/predict_0"
    with (out / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    files = sorted(map(str, (folder / "test").rglob("*.*")))
    assert [row["file"] for row in rows] == files
    with np.load(out / "features.npz") as file:
        features = torch.from_numpy(file["features"])
    pixels = read_images([*map(Path, files)]).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        torch.testing.assert_close(features, cli.model.encoder.embed(pixels), rtol=1e-5, atol=1e-5)
    run("fit", "softmax_regression")
    with pytest.raises(InputError, match="has no encoder"):
        predict("softmax_regression")


RAMP = np.tile(np.linspace(0, 1, 32), (32, 1))
SHOWN = {
    "16 bits.png": ((RAMP * 65535).astype(np.uint16), {}, RAMP * 255),
    "16 bits.tif": ((RAMP * 65535).astype(np.uint16), {}, RAMP * 255),
    "floats.tif": (RAMP.astype(np.float32), {}, RAMP * 255),
    "bits.png": (RAMP > 0.5, {}, (RAMP > 0.5) * 255),
    "grey with alpha.png": (np.dstack([RAMP * 0, RAMP * 255]).astype(np.uint8), {}, 255 - RAMP * 255),
    "0 is white.tif": ((65535 - RAMP * 65535).astype(np.uint16), {"white": 0}, RAMP * 255),
    "floats, 0 is white.tif": ((1 - RAMP).astype(np.float32), {"white": 0}, RAMP * 255),
    "turned.jpg": ((RAMP * 255).astype(np.uint8), {"exif": 6, "quality": 95}, RAMP.T * 255),
}


@pytest.mark.parametrize("name", SHOWN)
def test_the_picture_that_a_viewer_shows_is_read(tmp_path, name):
    array, options, expected = SHOWN[name]
    if "exif" in options:
        exif = Image.Exif()
        exif[0x0112] = options["exif"]
        options = {**options, "exif": exif}
    if "white" in options:
        options = {"tiffinfo": {262: options["white"]}}
    Image.fromarray(array).save(tmp_path / name, **options)
    read = read_images([tmp_path / name])[0].numpy().astype(float)
    assert np.abs(read - expected[..., None]).max() <= 3


def test_transparent_palettes_cmyk_and_animations_are_read_as_shown(tmp_path):
    colours = Image.new("RGBA", (32, 32), (200, 30, 30, 0))
    colours.paste((30, 200, 30, 255), (0, 0, 32, 16))
    colours.quantize(8).save(tmp_path / "palette.png")
    colours.convert("RGB").convert("CMYK").save(tmp_path / "cmyk.tif")
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "animated.webp", save_all=True, append_images=frames[1:], lossless=True)
    files = [tmp_path / name for name in ("palette.png", "cmyk.tif", "animated.webp")]
    palette, cmyk, animated = (x.numpy() for x in read_images(files))
    assert np.abs(palette[8, 8].astype(int) - (30, 200, 30)).max() <= 3 and (palette[24, 8] == 255).all()
    assert np.abs(cmyk[24, 8].astype(int) - (200, 30, 30)).max() <= 3
    assert (animated == (255, 0, 0)).all()


@pytest.mark.parametrize("top", [255, 1023, 65535])
def test_greys_of_any_depth_in_pgm_are_read(tmp_path, top):
    values = (RAMP * top).astype(">u2" if top > 255 else np.uint8)
    (tmp_path / "grey.pgm").write_bytes(b"P5 32 32 %d\n" % top + values.tobytes())
    assert np.abs(read_images([tmp_path / "grey.pgm"])[0].numpy() - RAMP[..., None] * 255).max() <= 1


def test_greys_of_twelve_bits_keep_their_brightness(tmp_path):
    """Written by hand, since Pillow only reads them: two pixels in three bytes."""
    left, right = np.moveaxis((RAMP * 4095).astype(int).reshape(32, 16, 2), 2, 0)
    pixels = np.stack([left >> 4, (left & 15) << 4 | right >> 8, right & 255], 2).astype(np.uint8).tobytes()
    tags = {256: 32, 257: 32, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 32, 279: len(pixels)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = struct.pack("<2sHI", b"II", 42, 8 + len(pixels))
    (tmp_path / "12.tif").write_bytes(start + pixels + struct.pack("<H", len(tags)) + entries + bytes(4))
    assert np.abs(read_images([tmp_path / "12.tif"])[0].numpy() - RAMP[..., None] * 255).max() <= 1


@pytest.mark.parametrize("kind, channels", [(0, 1), (2, 3)])
def test_a_transparent_colour_of_sixteen_bits_is_refused(tmp_path, kind, channels):
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 32, 32, 16, kind, 0, 0, 0)
    rows = zlib.compress((b"\0" + struct.pack(">H", 1000) * 32 * channels) * 32)
    chunks = [(b"IHDR", header), (b"tRNS", struct.pack(">H", 1000) * channels), (b"IDAT", rows), (b"IEND", b"")]
    (tmp_path / "keyed.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks))
    with pytest.raises(InputError, match="keyed.png: .*transparent colour of 16 bits"):
        read_images([tmp_path / "keyed.png"])


@pytest.mark.parametrize("array", [RAMP.astype(np.float32) * 300, (RAMP * 70000).astype(np.int32)])
def test_greys_of_an_unknown_range_are_refused(tmp_path, array):
    Image.fromarray(array).save(tmp_path / "grey.tif")
    with pytest.raises(InputError, match="grey.tif: not a readable image .*convert it"):
        read_images([tmp_path / "grey.tif"])


def test_what_other_programs_leave_is_left_out_and_counted(folder, capsys):
    (folder / "train" / "red" / "._0.png").write_bytes(b"\0\5\26\7 resource fork")
    (folder / "train" / "red" / "notes.txt").touch()
    (folder / "train" / "red" / "gone.png").symlink_to(folder / "nowhere.png")
    for name in (".ipynb_checkpoints", "__MACOSX"):
        for place in (folder / "train", folder / "train" / "blue", folder / "test"):
            (place / name).mkdir()
            (place / name / "0.png").write_bytes(b"no image")
    (folder / "train" / ".DS_Store").touch()
    data = ImageFolderDataModule(str(folder))
    data.split("train"), data.split("test")
    assert data.class_names == ["blue", "green", "red"] and len(data.load("train").labels) == 150
    said = capsys.readouterr().out
    assert f"files in {folder / 'train'} that are left out: 3 hidden beside the class folders, " in said
    assert all(kind in said for kind in (", 3 hidden", "1 of kind .txt", "1 links that lead nowhere"))
    assert f"files in {folder / 'test'} that are left out: 2 hidden beside the class folders\n" in said


@pytest.mark.parametrize("name", ["@eaDir", "System Volume Information", "lost+found"])
def test_folders_of_systems_and_drives_are_no_classes(folder, name):
    for place in (folder / "train" / name, folder / "train" / "red" / name):
        place.mkdir()
        Image.new("RGB", (32, 32)).save(place / "small copy.jpg")
    data = ImageFolderDataModule(str(folder))
    assert len(data.names) == 3 and data.load("train").labels.bincount().tolist() == [40, 50, 60]


def test_images_beside_the_class_folders_and_classes_without_test_images_are_said(folder, capsys):
    for split in ("train", "test"):
        Image.new("RGB", (32, 32)).save(folder / split / "stray.PNG")
    data = ImageFolderDataModule(str(folder))
    data.split("train"), data.split("test")
    said = capsys.readouterr().out
    assert said.count("left out: 1 of kind .png beside the class folders") == 2
    assert said.count("none of") == 1 and "most 6 red; none of green\n" in said


def test_what_is_left_out_of_a_folder_to_predict_is_said(tmp_path, capsys):
    Image.new("RGB", (32, 32)).save(tmp_path / "1.png")
    for name in ("2.HEIC", "3.heic", "._1.png"):
        (tmp_path / name).touch()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    assert len(CIFAR10DataModule(test_npz=str(tmp_path)).load("test").images) == 1
    said = capsys.readouterr().out
    assert all(kind in said for kind in ("2 of kind .heic", "1 hidden", "1 links that lead nowhere"))


def test_linked_folders_are_read_and_loops_end(folder, tmp_path):
    (folder / "train" / "red").rename(tmp_path / "elsewhere")
    (folder / "train" / "red").symlink_to(tmp_path / "elsewhere")
    (folder / "train" / "green").rename(folder / "train" / "red" / "more")
    (folder / "train" / "green").mkdir()
    (folder / "train" / "green" / "linked").symlink_to(folder / "train" / "red" / "more")
    (folder / "train" / "green" / "linked" / "up").symlink_to(folder / "train" / "green")
    data = ImageFolderDataModule(str(folder))
    data.split("train")
    assert data.load("train").labels.bincount().tolist() == [40, 50, 60 + 50]


def test_no_image_is_read_twice_or_under_another_class_by_a_link(folder, capsys):
    red = folder / "train" / "red"
    (red / "more").mkdir()
    Image.new("RGB", (32, 32)).save(red / "more" / "1.png")
    (red / "again").symlink_to(red / "more")
    (red / "all").symlink_to(folder / "train")
    data = ImageFolderDataModule(str(folder))
    assert data.load("train").labels.bincount().tolist() == [40, 50, 60 + 1]
    assert "2 linked folders that are read elsewhere or lead back up" in capsys.readouterr().out


def test_a_class_that_is_a_broken_link_is_refused(folder):
    (folder / "train" / "black").symlink_to(folder / "nowhere")
    with pytest.raises(InputError, match="link black: must be a link to a folder"):
        ImageFolderDataModule(str(folder))


def test_names_in_any_script_and_encoding(folder, tmp_path):
    (folder / "train" / "red").rename(folder / "train" / "красный $^$")
    raw = bytes(folder / "train") + b"/gr\xfcn"
    (folder / "train" / "green").rename(Path(raw.decode(errors="surrogateescape")))
    for name in ("red", "blue"):
        shutil.rmtree(folder / "test" / name)
    image = Path((bytes(folder / "test") + b"/\xfc.png").decode(errors="surrogateescape"))
    Image.new("RGB", (32, 32)).save(image, format="png")
    command(tmp_path, "fit", "softmax_regression", "--trainer.max_steps=2")
    cli = command(tmp_path, "predict", "softmax_regression", "--ckpt_path=best")
    text = (cli.run.folder / "predictions.csv").read_text(encoding="utf-8")
    assert "\\udcfc" in text and cli.model.class_names == ["blue", "gr\\udcfcn", "красный $^$"]


def test_names_without_an_encoding_are_printed_where_output_is_strict(tmp_path, monkeypatch):
    folder = Path((bytes(tmp_path) + b"/\xfcber").decode(errors="surrogateescape"))
    folder.mkdir()
    Image.new("RGB", (40, 32)).save(folder / "1.png")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    CIFAR10DataModule(test_npz=str(folder)).load("test")
    sys.stdout.flush()
    assert b"\\udcfcber are not 32" in sys.stdout.buffer.getvalue()
