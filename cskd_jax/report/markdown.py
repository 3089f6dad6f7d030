"""Tables in Markdown."""

import re
from collections.abc import Iterable

from cskd_jax.report.tables import WORDS, Table


def render(title: str, text: str, tables: Iterable[Table]) -> str:
    """Returns a section, made of plain text and tables, as Markdown."""
    return "\n".join([f"## {_escape(title)}\n", f"{_escape(text)}\n", *map(_table, tables)])


def _table(table):
    marks = ["---", *("---" if name in WORDS else "---:" for name in table.header[1:])]
    lines = [f"### {_escape(table.title)}", "", _row(table.header), _row(marks)]
    lines += [_row(row) for row in table.rows]
    return "\n".join([*lines, "", *(f"{_escape(note)}\n" for note in table.notes)])


def _row(cells):
    return "| " + " | ".join(map(_escape, cells)) + " |"


def _escape(text):
    """Returns Markdown that shows `text` literally, with all special characters escaped."""
    # An underscore within a word has no special meaning, nor does a single tilde.
    return re.sub(r"([\\|`<\[*&$]|(?<!\w)_|_(?!\w)|(?<=~)~|~(?=~))", r"\\\1", text)
