"""Tables in Markdown."""

import re
from collections.abc import Iterable

from cskd_jax.report.tables import WORDS, Table


def render(title: str, text: str, tables: Iterable[Table]) -> str:
    """Returns a section, made of plain text and tables, as Markdown."""
    return "\n".join([f"## {escape(title)}\n", f"{escape(text)}\n", *map(table, tables)])


def table(content: Table) -> str:
    """Returns a table with its title and notes as Markdown."""
    marks = ["---", *("---" if name in WORDS else "---:" for name in content.header[1:])]
    lines = [f"### {escape(content.title)}", "", _row(content.header), _row(marks)]
    lines += [_row(row) for row in content.rows]
    return "\n".join([*lines, "", *(f"{escape(note)}\n" for note in content.notes)])


def _row(cells):
    return "| " + " | ".join(map(escape, cells)) + " |"


def escape(text: str) -> str:
    """Returns Markdown that shows `text` literally, with all special characters escaped."""
    # An underscore within a word has no special meaning, nor does a single tilde.
    return re.sub(r"([\\|`<\[*&$]|(?<!\w)_|_(?!\w)|(?<=~)~|~(?=~))", r"\\\1", text)
