"""The tensors of a file matched with a network, whose names the file may prefix or spell in another way."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import linen as nn

from cskd_jax.console import pause
from cskd_jax.errors import UserError
from cskd_jax.interop.names import aliases, expected_shapes, from_torch, mismatches
from cskd_jax.interop.nearest import describe_nearest, likely_names
from cskd_jax.interop.renames import Rule, given_prefix, possible_prefixes, rename, with_prefix


class Match(NamedTuple):
    """The variables of a network that a file holds.

    Attributes:
      variables: {"params", "batch_stats"}, numpy arrays in the dtypes of the network.
      used: {name in the file: path in the network} of the tensors that were used.
      unused: Names of the tensors that were not needed.
      prefix: Prefix of the names of the network in the file.
    """

    variables: dict[str, Any]
    used: dict[str, str]
    unused: list[str]
    prefix: str


class _Candidate(NamedTuple):
    """The tensors with one prefix: `sources` are their names in the file by their names without it, after renaming."""

    prefix: str
    sources: dict[str, str]
    tensors: dict[str, np.ndarray]


def match(
    module: nn.Module,
    channels: int,
    state_dict: Mapping[str, np.ndarray],
    *,
    prefix: str | None = None,
    rules: Sequence[Rule] = (),
) -> Match:
    """Finds the variables of a network in a PyTorch state dict.

    Args:
      module: Network.
      channels: Number of channels of its images.
      state_dict: Floating-point arrays by name, in PyTorch's layout.
      prefix: Prefix of the names of the network; tensors without it are not used. None tries all prefixes of wrappers
        that occur, and takes the one with which the network fits.
      rules: Renaming rules, which are applied to the names without the prefix.

    Raises:
      UserError: If the tensors do not fit the network, or those of several prefixes do. The message names the known
        network that is nearest.
    """
    shapes, rules = expected_shapes(module, channels), [*rules, *aliases(module)]
    prefixes = possible_prefixes(state_dict) if prefix is None else [given_prefix(state_dict, prefix)]
    candidates = [_candidate(state_dict, found, rules) for found in prefixes]
    fitting = [found for found in candidates if not any(mismatches(module, shapes, found.tensors).values())]
    if len(fitting) > 1:
        raise UserError(
            f"several networks fit, with the names that begin with {' and '.join(found.prefix for found in fitting)}: "
            f"choose one, such as --prefix={fitting[0].prefix}"
        )
    # If none fits, the error is about the one that lacks the fewest tensors.
    best = min(fitting or candidates, key=lambda found: len(shapes.keys() - found.tensors.keys()))
    try:
        variables, used, _ = from_torch(module, channels, best.tensors)
    except UserError as error:
        raise UserError(f"{error}{'' if fitting else _hint(module, shapes, best.tensors)}") from None
    used = {best.sources[name]: path for name, path in used.items()}
    return Match(variables, used, [name for name in state_dict if name not in used], best.prefix)


def _candidate(state_dict, prefix, rules):
    without = with_prefix(state_dict, prefix)
    sources = {new: without[name] for new, name in rename(without, rules).items()}
    return _Candidate(prefix, sources, {new: state_dict[name] for new, name in sources.items()})


def _hint(module, shapes, tensors):
    """Returns the end of an error message: the names that were probably meant, and the nearest known network."""
    problems = mismatches(module, shapes, tensors)
    likely = likely_names(problems["missing"], problems["unknown"])
    meant = f"; by their shapes, {', '.join(likely)}" if likely else ""
    with pause("looking for the nearest known network"):
        return f"{meant}; {describe_nearest(tensors, module.width)}"
