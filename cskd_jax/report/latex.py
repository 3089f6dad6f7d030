"""Tables in LaTeX, for a paper."""

import re
from collections.abc import Iterable

from cskd_jax.report.tables import NONE, WORDS, Table

_HEADER = """\
% Tables for \\input. The preamble needs \\usepackage{booktabs}.
"""
# Cells longer than this are broken into lines, one per part.
_LONGEST_LINE = 18
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


def render(sections: Iterable[tuple[str, Iterable[Table]]]) -> str:
    """Returns a table environment for each table; its caption contains the title of the section, and its label both.

    Args:
      sections: Titles of the sections with their tables.
    """
    counts: dict[str, int] = {}
    parts = [_HEADER]
    for title, tables in sections:
        for table in tables:
            label = _label(f"{table.title} {title}")
            counts[label] = counts.get(label, 0) + 1
            # Another table of the same name gets a number behind a colon, which no label has otherwise.
            parts.append(_table(title, table, label if counts[label] == 1 else f"{label}:{counts[label]}"))
    return "\n".join(parts)


def _label(text):
    """Returns the name of a label, made of lowercase letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _table(title, table, label):
    columns = "".join("l" if name in WORDS else "r" for name in table.header)
    rows = [" & ".join(map(_cell, row, table.header)) + r" \\" for row in table.rows]
    notes = "\n\n".join(map(escape, table.notes))
    return rf"""\begin{{table}}
\centering
\caption{{{escape(f"{table.title}, {title}")}}}
\label{{tab:{label}}}
\footnotesize
\setlength{{\tabcolsep}}{{3pt}}
\makebox[\linewidth]{{%
\begin{{tabular}}{{@{{}}{columns}@{{}}}}
\toprule
{" & ".join(map(_heading, table.header))} \\
\midrule
{chr(10).join(rows)}
\bottomrule
\end{{tabular}}}}

\medskip
\begin{{minipage}}{{\linewidth}}
\scriptsize
{notes}
\end{{minipage}}
\end{{table}}
"""


def _heading(text):
    """Returns the header of a column, in two lines if it has two parts."""
    return _lines(re.split(r"(?<=:) |(?<= -) ", text), "b", text in WORDS)


def _cell(text, head):
    """Returns a cell of the column with the given header."""
    parts = re.split(r"(?<=[,;]) ", text) if len(text) > _LONGEST_LINE else [text]
    return "--" if text == NONE else _lines(parts, "t", head in WORDS)


def _lines(parts, position, words):
    """Returns texts stacked in lines, with the signs of numbers typeset as math signs."""
    shown = [re.sub(r"(^| )([+-])(?=\d)", r"\1$\2$", escape(part)) for part in parts]
    if len(shown) == 1:
        return shown[0]
    lines = r" \\ ".join(shown)
    return rf"\begin{{tabular}}[{position}]{{@{{}}{'l' if words else 'r'}@{{}}}}{lines}\end{{tabular}}"


def escape(text: str) -> str:
    """Returns LaTeX that shows `text` literally; unknown characters outside of ASCII appear as Python escapes."""
    text = "".join(c if c.isascii() or c in _SPECIAL else c.encode("unicode_escape").decode("ascii") for c in text)
    return "".join(_SPECIAL.get(character, character) for character in text)
