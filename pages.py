"""HTML pages that need no other file: a title, and below it tables, figures, headings and text."""

import base64
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } td, th { padding: .2rem .8rem; border-bottom: 1px solid #ccc; text-align: left }
img { max-width: 100% } pre { background: #f4f4f4; padding: .8rem; overflow-x: auto } figure { margin: 2rem 0 }
</style></head><body>
<h1>{{ title }}</h1>
{% for tag, content in parts %}
{% if tag == "table" %}
<table>
{% for cells in content %}
<tr>{% for kind, cell in cells %}<{{ kind }}>{{ cell }}</{{ kind }}>{% endfor %}</tr>
{% endfor %}
</table>
{% elif tag == "figure" %}
<figure><img alt="{{ content.text }}" src="data:image/png;base64,{{ content.png }}">
<figcaption>{{ content.text }}</figcaption></figure>
{% else %}
<{{ tag }}>{{ content }}</{{ tag }}>
{% endif %}
{% endfor %}
</body></html>
"""


def page(title: str, parts: Iterable[tuple[str, Any]]) -> str:
    """The page. A part is what `table` or `figure` return, or a tag and its text, such as ("h2", "Config")."""
    environment = Environment(autoescape=True, trim_blocks=True, keep_trailing_newline=True)
    return environment.from_string(TEMPLATE).render(title=title, parts=parts)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> tuple[str, Any]:
    """A table of plain texts; `head` may be empty."""
    cells = [[("td", cell) for cell in row] for row in rows]
    return "table", [[("th", cell) for cell in head], *cells] if head else cells


def figure(path: Path, text: str) -> tuple[str, Any]:
    """The PNG file `path`; `text` is its caption and its alternative text."""
    return "figure", {"text": text, "png": base64.b64encode(path.read_bytes()).decode()}
