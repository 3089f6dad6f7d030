"""Documentation of every key of a configuration, from the table of keys and the classes of the losses.

python -m cskd_jax.runs.document > docs/configuration.md
"""

import inspect
import sys
from collections.abc import Mapping

from cskd_jax.losses import LOSSES
from cskd_jax.runs import keys
from cskd_jax.runs.keys import REQUIRED, Key
from cskd_jax.runs.loss_keys import common_keys, loss_keys

_SECTIONS = {
    "": "The run",
    "dataset": "Data",
    "sampler": "Batches",
    "augment": "Augmentation",
    "teacher": "Teacher",
    "student": "Student",
    "optimizer": "Optimizer",
    "first_phase": "First phase",
}

_INTRODUCTION = """\
# Configuration

<!-- Generated: python -m cskd_jax.runs.document > docs/configuration.md -->

A recipe sets what differs from the defaults below, and must set the keys whose default is *required*. On the command
line, `--config.KEY=VALUE` overrides any key, such as `--config.epochs=10` or `--config.losses.kd.temperature=2`;
`cskd-jax config show RECIPE` shows all values, and `cskd-jax config keys PATTERN` shows part of this page.
"""

_RESUMING = """\
## Resuming a run

The same command continues a run from its last checkpoint. It may have another value of a key that does not change
results: {indifferent}. It may also have a larger number of `epochs`: the run is extended, and its network ends as if it
had had that number from the start; a run with `optimizer.schedule=cosine` cannot be extended, because its learning rate
has already fallen to zero. A difference in any other key is refused, and so are different data, which are
recognized by their labels, their classes and some of their images, wherever they are stored.
"""

_LOSSES = """\
## Losses

`losses.NAME.weight` adds the loss NAME to the objective, a weighted sum. Every loss has these settings;
only losses that read a teacher have `teacher`:

{common}
The sections below say what the losses are and which settings of their own they have, as `losses.NAME.KEY`.
[methods.md](methods.md) explains the methods, which are named sets of weighted losses.
"""


def document() -> str:
    """Returns the text of docs/configuration.md."""
    parts = [_INTRODUCTION]
    names = list(dict.fromkeys([*_SECTIONS, *(path.rpartition(".")[0] for path in keys.KEYS)]))
    for section in names:
        found = {path: key for path, key in keys.KEYS.items() if path.rpartition(".")[0] == section}
        parts.append(f"## {_SECTIONS.get(section, section.capitalize())}\n\n{_table(found)}")
    parts.append(_LOSSES.format(common=_table(common_keys())))
    for name in sorted(LOSSES):
        own = {key: value for key, value in loss_keys(name).items() if key not in common_keys()}
        parts.append(f"### {name}\n\n{_summary(LOSSES[name])}\n" + (f"\n{_table(own)}" if own else ""))
    indifferent = ", ".join(f"`{path}`" for path in keys.KEYS if path in keys.indifferent())
    parts.append(_RESUMING.format(indifferent=indifferent))
    return "\n".join(parts)


def _table(found: Mapping[str, Key]) -> str:
    lines = ["| Key | Default | Allowed | Meaning |", "| --- | --- | --- | --- |"]
    for path, key in found.items():
        default = "*required*" if key.default is REQUIRED else f"`{key.default!r}`"
        cells = [
            f"`{path}`",
            default,
            key.rule.listed_in or key.rule.allowed,
            key.meaning[:1].upper() + key.meaning[1:],
        ]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _summary(loss: type) -> str:
    """Returns the first paragraph of a docstring, as one line."""
    return " ".join((inspect.getdoc(loss) or "").partition("\n\n")[0].split())


if __name__ == "__main__":
    sys.stdout.write(document())
