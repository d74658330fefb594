"""The page that a test ends in."""

import re
from html.parser import HTMLParser

import pytest

from callbacks.report import wilson_interval


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.images, self.open, self.text = [], [], ""
        self.feed(text)
        assert self.open == [], "tags left open"

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs))
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_wilson_interval():
    # 81 of 263: E. B. Wilson's interval is 0.2553 … 0.3662 (R. G. Newcombe, 1998, table I, method 3).
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1.0, 20)[1] == pytest.approx(1.0)


def test_a_test_ends_in_a_page_that_needs_no_other_file(run, tmp_path):
    run("fit", "triplet_encoder", "--model.encoder.init_args.widths=[8,8,16]")
    run("fit", "linear_probe")
    for stage, metric, figures in (("linear_probe", "test/accuracy", 4), ("triplet_encoder", "test/knn_accuracy", 2)):
        small = ["--model.encoder.init_args.widths=[8,8,16]"] if stage == "triplet_encoder" else []
        cli = run("test", stage, *small, "--ckpt_path=best")
        folder = tmp_path / "runs" / stage / "version_0" / "test_0"
        text = (folder / "report.html").read_text(encoding="utf-8")
        page = Page(text)
        value = float(cli.trainer.callback_metrics[metric])
        low, high = wilson_interval(value, 60)
        assert f"{value:.4f}{low:.4f} … {high:.4f}" in page.text
        assert f"--config {folder}/config.yaml --ckpt_path" in page.text and "class_path" in page.text
        assert "CIFAR10DataModule: root" in page.text and "_instantiator" not in page.text
        assert len(page.images) == figures
        assert all(image["alt"] and image["src"].startswith("data:image/png;base64,") for image in page.images)
        assert not re.search(r"(src|href)=.(?!data:)", text)
        command = re.search(r"python main.py (test .*)", page.text).group(1).split()
        from main import main

        again = main(command)
        assert float(again.trainer.callback_metrics[metric]) == pytest.approx(value)
