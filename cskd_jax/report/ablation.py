"""The contributions of the parts of a loss, where rows have switched some of them off."""

from collections.abc import Iterator

from cskd_jax.report.runs import Comparison, Row


def find_ablations(comparison: Comparison) -> Iterator[list[tuple[str, Row]]]:
    """Yields, for each loss with parts, the rows with some of them, from none to all of them.

    A loss is left out unless a row has all of its parts and another has only some. The first rows are those that the
    methods are compared with, which have none.

    Args:
      comparison: Rows of the report.

    Yields:
      [(the parts that are on, in words; row)].
    """
    losses = {name: loss for row in comparison.rows for name, loss in row.losses.items() if loss.parts}
    for name, loss in losses.items():
        found = [(_parts_on(row, name, loss), row) for row in comparison.rows if name in row.losses]
        counts = {len(parts) for parts, _ in found}
        if len(loss.parts) in counts and len(counts) > 1:
            found.sort(key=lambda entry: (len(entry[0]), [list(loss.parts).index(part) for part in entry[0]]))
            references = [("none" if row.has_teacher else "labels alone", row) for row in comparison.references]
            yield references + [(" + ".join(parts) or "none", row) for parts, row in found]


def _parts_on(row, name, loss):
    return [part for part, weight in loss.parts.items() if row.config.get(f"losses.{name}.{weight}") != 0]
