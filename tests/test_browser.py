"""TensorBoard and the pages as a person sees them: headless Chromium on real runs.

pytest tests/test_browser.py                                                # on two short runs on digits
SCREENSHOTS=docs LADDER=runs/reproduce pytest tests/test_browser.py         # pictures of a finished ladder, kept
"""

import io
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import CONFIGS
from PIL import Image

import reproduce
from main import main

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Chromium and its driver: apt-get install chromium chromium-driver"
)
# Every node of the page, those in shadow roots and frames too.
WALK = """
const found = [];
function walk(root) {
  for (const e of root.querySelectorAll('*')) {
    found.push(e);
    if (e.shadowRoot) walk(e.shadowRoot);
    if (e.tagName === 'IFRAME' && e.contentDocument) walk(e.contentDocument);
  }
}
walk(document);
"""
TEXT = (
    WALK
    + """
return found.filter(e => !['STYLE', 'SCRIPT'].includes(e.tagName))
  .flatMap(e => [...e.childNodes]).filter(n => n.nodeType === 3).map(n => n.data).join(' ');
"""
)


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    """An encoder, a probe on it and its test, on digits, where the ladder would put them, and the ladder's page."""
    if "LADDER" in os.environ:
        return Path(os.environ["LADDER"]).resolve()
    out = tmp_path_factory.mktemp("browser")
    small = [
        "--data=DigitsDataModule",
        "--data.batch_size=128",
        f"--trainer.logger.save_dir={out / 'seed_0'}",
        "--trainer.max_epochs=2",
    ]
    narrow = "--model.encoder.init_args.widths=[8,8,8]"
    for command, config, *more in (
        ("fit", "triplet_encoder", narrow, "--tsne.samples=1000"), ("fit", "linear_probe"),
        ("test", "linear_probe", "--ckpt_path=best"),
    ):  # fmt: skip
        main([command, "--config", str(CONFIGS / f"{config}.yaml"), *small, "--trainer.accelerator=cpu", *more])
    stages = (step.name for step in reproduce.LADDER)
    rows = {stage: {"val": 0.5, "test": 0.5, "seconds": 2.0, "fit_seconds": 1.0} for stage in stages}
    reproduce.write_results(reproduce.summarise([rows], report=True), out, "a rehearsal", "python reproduce.py")
    return out


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run",
        "disable-background-networking",
        "disable-component-update", "disable-sync", "enable-unsafe-swiftshader", "window-size=1280,900",
    ):  # fmt: skip
        options.add_argument(f"--{option}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def tensorboard(ladder):
    """The address of a TensorBoard on one seed's runs: of more than 40 it shows none until they are ticked."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", "seed_0", "--port", "0", "--host", "127.0.0.1"]
    process = subprocess.Popen(command, cwd=ladder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        for line in process.stderr:
            if address := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        else:
            pytest.fail(f"TensorBoard ended with {process.wait()}")
        yield address.group()
    finally:
        process.kill()
        process.stderr.close()
        process.wait()


def until(condition, seconds: float = 60.0):
    """The first truthy value of `condition()`."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "the page did not get there"
        time.sleep(0.3)
    return value


def open_page(browser, address: str) -> None:
    browser.get("about:blank")  # a change behind the # alone loads nothing
    browser.get(address)


def keep(browser, name: str) -> None:
    if "SCREENSHOTS" in os.environ:
        time.sleep(3)  # the end of a movement
        picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
        picture.quantize(256, Image.Quantize.MAXCOVERAGE).save(
            Path(os.environ["SCREENSHOTS"]) / f"{name}.png", optimize=True
        )


def test_scalars(browser, tensorboard):
    open_page(browser, f"{tensorboard}/#scalars&tagFilter=accuracy")
    until(lambda: "val/accuracy" in browser.execute_script(TEXT))
    drawn = "return found.filter(e => e.tagName === 'path' && e.getRootNode().host?.tagName === 'VZ-LINE-CHART2'"
    until(lambda: browser.execute_script(WALK + drawn + " && (e.getAttribute('d') || '').length > 20).length"))
    keep(browser, "tensorboard_scalars")


def test_training_and_validation_in_one_chart(browser, tensorboard):
    open_page(browser, f"{tensorboard}/#custom_scalars")
    charts = "return found.filter(e => e.tagName === 'TF-CUSTOM-SCALAR-MULTI-LINE-CHART-CARD').length"
    assert until(lambda: browser.execute_script(WALK + charts)) == 2


def test_images(browser, tensorboard):
    open_page(browser, f"{tensorboard}/#images&tagFilter=tsne")
    # tsne.png is wider than the other pictures; their addresses do not name them.
    images = "return found.filter(e => e.tagName === 'IMG' && e.src.includes('individualImage')"
    images += " && e.naturalWidth > 1200).length"
    until(lambda: browser.execute_script(WALK + images))
    keep(browser, "tensorboard_images")


def test_projector(browser, tensorboard):
    open_page(browser, f"{tensorboard}/#projector")
    until(lambda: re.search(r"Points:\s*[12]\d\d\d\s*Dimension:\s*(8|256)\s", browser.execute_script(TEXT)))

    def colours():
        place = (
            "return found.filter(e => e.tagName === 'CANVAS' && e.width > 400).map(e => e.getBoundingClientRect())[0]"
        )
        box = browser.execute_script(WALK + place)
        picture = np.asarray(Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("L"))
        (y, height), (x, width) = (
            ((int(box[k]), int(box[size])) for k, size in (("y", "height"), ("x", "width")))
            if box
            else ((0, 0), (0, 0))
        )
        middle = picture[y + height // 4 : y + 3 * height // 4, x + width // 4 : x + 3 * width // 4]
        return middle.size and np.ptp(middle) > 100

    until(colours)  # the sprites are drawn
    keep(browser, "tensorboard_projector")


def test_hparams(browser, tensorboard):
    open_page(browser, f"{tensorboard}/#hparams")
    text = until(
        lambda: (
            (t := browser.execute_script(TEXT))
            and "linear_probe/version_0" in t
            and "triplet_encoder/version_0" in t
            and t
        )
    )
    for word in ("batch_size", "weight_decay", "last/val/accuracy", "Trial ID"):
        assert word in text
    assert "_instantiator" not in text
    keep(browser, "tensorboard_hparams")


@pytest.mark.parametrize("page, figures", [("seed_0/linear_probe/version_0/test_0/report.html", 4), ("report.html", 3)])
def test_pages(browser, ladder, page, figures):
    open_page(browser, (ladder / page).as_uri())
    images = browser.execute_script("return [...document.images].map(i => [i.complete && i.naturalWidth, i.alt])")
    assert len(images) == figures and all(width > 300 and alt for width, alt in images)
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.execute_script("return document.title")
    height = browser.execute_script("return document.body.scrollHeight")
    browser.set_window_size(1000, min(2600, height))
    keep(browser, f"report_{'ladder' if page == 'report.html' else 'probe'}")
    browser.set_window_size(1280, 900)
