"""The page that a test ends in."""

import re
from html.parser import HTMLParser

import pytest

from callbacks.report import interval, listed
from main import main
from pages import figure, page, table


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
    assert interval("test/accuracy", 81 / 263, 263) == "0.2553 … 0.3662"
    assert interval("test/knn_accuracy", 0.0, 20) == "0.0000 … 0.1611"
    assert interval("test/precision_at_1", 1.0, 20).endswith("1.0000")
    assert interval("test/loss", 0.5, 20) == "–"


def test_a_list_of_many_is_cut():
    assert listed(["a", "b"]) == "a, b"
    assert listed(range(1000)).endswith("48, 49 and 950 more")


def test_whatever_stands_in_a_page_is_text(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    odd = '<b>&"'
    text = page(odd, [table([odd], [[odd, "1"]]), figure(tmp_path / "a.png", odd), ("pre", odd), ("h2", odd)])
    found = Page(text)
    assert found.text.count(odd) == 7 and "<b>" not in text  # title twice, head, cell, caption, pre, h2
    assert found.images == [{"alt": odd, "src": "data:image/png;base64,iVBORw=="}]


def test_a_test_ends_in_a_page_that_needs_no_other_file(run, tmp_path):
    for stage, metric, figures in (("supervised_encoder", "accuracy", 5), ("triplet_encoder", "knn_accuracy", 2)):
        small = [stage, "--model.encoder.init_args.widths=[8,8,16]"]
        run("fit", *small, "--tsne.samples=60")
        cli = run("test", *small, "--ckpt_path=best")
        folder = tmp_path / "runs" / stage / "version_0" / "test_0"
        text = (folder / "report.html").read_text(encoding="utf-8")
        found = Page(text)
        value = float(cli.trainer.callback_metrics[f"test/{metric}"])
        assert re.search(rf"test/{metric}\s*{value:.4f}\s*{interval(metric, value, 60)}", found.text)
        assert f"--config {folder}/config.yaml --ckpt_path" in found.text and "class_path" in found.text
        assert re.search(rf"CIFAR10DataModule: .*root {tmp_path / 'data'}", found.text)
        assert "_instantiator" not in found.text
        assert re.search(r"fit\s*\d+ s, 4 steps", found.text)
        assert len(found.images) == figures
        assert all(image["alt"] and image["src"].startswith("data:image/png;base64,") for image in found.images)
        assert not re.search(r"(src|href)=.(?!data:)", text)
        again = main(re.search(r"python main.py (test .*)", found.text).group(1).split())
        assert float(again.trainer.callback_metrics[f"test/{metric}"]) == pytest.approx(value)
