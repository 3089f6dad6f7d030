"""The report as one self-contained HTML page: no scripts, no fonts, no requests."""

import html
import importlib.resources
from collections.abc import Iterable, Sequence

from cskd_jax.report import curves, scatter, svg
from cskd_jax.report.embedding import Embeddings
from cskd_jax.report.tables import NONE, WORDS, Table

# Number of columns that fit on a phone.
_NARROW = 5


def render(title: str, lead: str, sections: Iterable[str]) -> str:
    """Returns the HTML of the page.

    Args:
      title: Title as plain text.
      lead: Plain text below the title.
      sections: Sections as HTML.
    """
    style = importlib.resources.files(str(__package__)).joinpath("style.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
<title>{html.escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<p class="lead">{html.escape(lead)}</p>
{"".join(sections)}</body>
</html>
"""


def heading(text: str) -> str:
    """Returns the heading of a section."""
    return f"<h2>{html.escape(text)}</h2>\n"


def note(text: str) -> str:
    """Returns a paragraph in small print."""
    return f'<p class="note">{html.escape(text)}</p>\n'


def table(content: Table) -> str:
    """Returns a table; on a narrow screen, a table with many columns turns into cards."""
    classes = ["text" if name in WORDS else "" for name in content.header]
    header = "".join(_cell("th", name, style) for name, style in zip(content.header, classes, strict=True))
    rows = "".join(
        "<tr>" + "".join(_cell("td", *cell) for cell in zip(row, classes, content.header, strict=True)) + "</tr>\n"
        for row in content.rows
    )
    title = f"<h3>{html.escape(content.title)}</h3>\n"
    wide = ' class="wide"' if len(content.header) > _NARROW else ""
    notes = "".join(map(note, content.notes))
    return f"{title}<table{wide}>\n<thead><tr>{header}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>\n{notes}"


def _cell(kind: str, text: str, style: str, label: str = "") -> str:
    style = f"{style} none".strip() if text == NONE else style
    attributes = f' class="{style}"' if style else ""
    attributes += f' data-label="{html.escape(label)}"' if label else ""
    return f"<{kind}{attributes}>{html.escape(text)}</{kind}>"


def training_curves(lines: Sequence[curves.Curve], teacher: float | None, score: str, split: str = "test") -> str:
    """Returns the charts of the scores by epoch.

    Args:
      lines: A curve for each row.
      teacher: Score of the teacher, or None.
      score: Name of the score.
      split: Split on which the curves were measured.
    """
    axis = f"{score} on the {split} split, %"
    charts = (
        (curves.draw_whole(lines, teacher, axis), "The whole training"),
        (curves.draw_end(lines, teacher, axis), "The second half, zoomed to the scores of the last third"),
    )
    figures = "".join(f"<figure>{chart}\n<figcaption>{title}</figcaption></figure>\n" for chart, title in charts)
    shortened = any(curves.shown_label(line.label) != line.label for line in lines)
    legend = _legend((svg.line_key(number), line.label) for number, line in enumerate(lines)) if shortened else ""
    text = "Mean over the seeds; a band is one standard deviation to each side. "
    text += "" if teacher is None else "The dotted line is the teacher after its last epoch. "
    text += "An arrow marks a method or a teacher that ends outside the picture."
    return f'<h3>Training curves</h3>\n<div class="curves">\n{figures}</div>\n{legend}{note(text)}'


def embeddings(content: Embeddings) -> str:
    """Returns the panels of the embeddings."""
    panels = "".join(
        f"<figure>{scatter.draw(panel.points, content.labels, content.categories, panel.title)}\n"
        f"<figcaption>{html.escape(panel.title)}</figcaption></figure>\n"
        for panel in content.panels
    )
    legend = _legend((svg.mark_key(number), name) for number, name in enumerate(content.categories.values()))
    text = (
        f"The same {len(content.labels)} test images in every panel, a point each, as in figure 4 of the paper: the "
        "embedding that the classifier reads, after the last epoch, projected by t-SNE. Only which points are "
        "neighbors is meaningful, not the sizes of clusters or the distances between them; the next table measures "
        "those."
    )
    return f'<h3>Embeddings</h3>\n<div class="panels">\n{panels}</div>\n{legend}{note(text)}'


def _legend(entries):
    items = "".join(f"<li>{key}{html.escape(text)}</li>\n" for key, text in entries)
    return f'<ul class="legend">\n{items}</ul>\n'
