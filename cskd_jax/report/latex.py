"""Tables as LaTeX, for a paper."""

import re
from collections.abc import Iterable

from cskd_jax.report.tables import Table

HEADER = """\
% Tables for \\input. The preamble needs \\usepackage{booktabs}.
"""
# Too long for a table on paper; the notes say what the source of published values is.
_LEFT_OUT = {"source"}
_WORDS = {"method", "parts", "difference", "what it shows", "notes"}
_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
    '"': "{''}",
    "[": "{[}",  # At the start of a row, it would be read as an option of the line break before it.
    "]": "{]}",
    "*": "{*}",
    "±": r"$\pm$",
    "→": r"$\rightarrow$",
}
_SPECIAL |= {character: rf"\{character}" for character in "&%$#_{}"}


def render(title: str, tables: Iterable[Table]) -> str:
    """Returns a table environment for each table, with the title of its section in the caption."""
    return "\n".join(_table(title, table) for table in tables)


def _table(title, table):
    kept = [i for i, name in enumerate(table.header) if name not in _LEFT_OUT]
    columns = "".join("l" if table.header[i] in _WORDS else "r" for i in kept)
    rows = [" & ".join(_cell(row[i]) for i in kept) + r" \\" for row in table.rows]
    notes = "\n\n".join(map(escape, table.notes))
    return rf"""\begin{{table}}
\centering
\caption{{{escape(f"{table.title}, {title}")}}}
\footnotesize
\setlength{{\tabcolsep}}{{3pt}}
\begin{{tabular}}{{@{{}}{columns}@{{}}}}
\toprule
{" & ".join(_heading(table.header[i]) for i in kept)} \\
\midrule
{chr(10).join(rows)}
\bottomrule
\end{{tabular}}

\medskip
\begin{{minipage}}{{\linewidth}}
\scriptsize
{notes}
\end{{minipage}}
\end{{table}}
"""


def _heading(text):
    """Returns the head of a column, in several lines where it has several parts."""
    position = "l" if text in _WORDS else "r"
    parts = [escape(part) for part in re.split(r"(?<=:) | (?=- )|(?<=,) ", text)]
    lines = r" \\ ".join(parts)
    return rf"\shortstack[{position}]{{{lines}}}" if len(parts) > 1 else lines


def _cell(text):
    """Returns the text of a cell with the signs of its numbers as such."""
    if text == "-":
        return "--"
    return re.sub(r"(^| )([+-])(?=\d)", r"\1$\2$", escape(text))


def escape(text: str) -> str:
    """Returns LaTeX that shows `text` as it is; what is neither ASCII nor known above appears as Python writes it."""
    text = "".join(c if c.isascii() or c in _SPECIAL else c.encode("unicode_escape").decode("ascii") for c in text)
    return "".join(_SPECIAL.get(character, character) for character in text)
