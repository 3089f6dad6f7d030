"""Tables as Markdown."""

from collections.abc import Iterable

from cskd_jax.report.tables import Table


def render(title: str, text: str, tables: Iterable[Table]) -> str:
    """A section with a text and tables."""
    return "\n".join([f"## {title}\n", f"{text}\n", *map(_table, tables)])


def _table(table):
    lines = [f"### {table.title}", "", _row(table.header), _row(["---"] + ["---:"] * (len(table.header) - 1))]
    lines += [_row(row) for row in table.rows]
    return "\n".join([*lines, "", *(f"{note}\n" for note in table.notes)])


def _row(cells):
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
