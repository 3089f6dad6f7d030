"""Ablations: rows of a comparison in which some parts of a loss are switched off."""

from collections.abc import Iterator

from cskd_jax.report.runs import Comparison, Row


def find_ablations(comparison: Comparison) -> Iterator[list[tuple[str, Row]]]:
    """Yields the rows that use none, some or all parts of a loss, for each loss that has parts.

    A loss is left out unless one row has all of its parts and another has only some. The first rows are the references
    of the comparison, which have none of the parts.

    Args:
      comparison: Rows of the report.

    Yields:
      Lists of pairs: a description of the parts that are on, and the row.
    """
    losses = {name: loss for row in comparison.rows for name, loss in row.losses.items() if loss.parts}
    for name, loss in losses.items():
        found = [(_parts_on(row, name, loss), row) for row in comparison.rows if name in row.losses]
        counts = {len(parts) for parts, _ in found}
        if len(loss.parts) in counts and len(counts) > 1:
            found.sort(key=lambda entry: (len(entry[0]), [list(loss.parts).index(part) for part in entry[0]]))
            references = [("labels alone" if row.learns_from_labels else "none", row) for row in comparison.references]
            yield references + [(" + ".join(parts) or "none", row) for parts, row in found]


def _parts_on(row, name, loss):
    return [part for part, weight in loss.parts.items() if row.config.get(f"losses.{name}.{weight}") != 0]
