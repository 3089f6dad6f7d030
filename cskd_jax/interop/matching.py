"""Matches the tensors of a file with a network whose names the file may prefix or spell differently."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import linen as nn

from cskd_jax.console import pause
from cskd_jax.errors import UserError
from cskd_jax.interop.names import aliases, expected_shapes, from_torch, mismatches
from cskd_jax.interop.nearest import describe_nearest, likely_names
from cskd_jax.interop.renames import Rule, given_prefix, possible_prefixes, rename, with_prefix
from cskd_jax.interop.settings import read_settings

# Prefixes of wrappers that are tried, the empty one included; a network may have to be traced for each.
_MAX_PREFIXES = 21


class Match(NamedTuple):
    """The variables of a network that a file holds.

    Attributes:
      variables: {"params", and other collections}, numpy arrays in the dtypes of the network.
      used: {name in the file: path in the network} of the tensors that were used.
      unused: Names of the tensors that were not needed.
      prefix: Prefix of the names of the network in the file.
      settings: Settings read from the file that differ from those of the given network.
    """

    variables: dict[str, Any]
    used: dict[str, str]
    unused: list[str]
    prefix: str
    settings: dict[str, Any]


class _Candidate(NamedTuple):
    """The tensors that share a prefix.

    `sources` maps their names without the prefix, after renaming, to their names in the file. `module` is the network
    with the `settings` read from them, and `shapes` are the shapes that it expects.
    """

    prefix: str
    sources: dict[str, str]
    tensors: dict[str, np.ndarray]
    settings: dict[str, Any]
    module: nn.Module
    shapes: dict[str, tuple[int, ...]]

    @property
    def mismatches(self) -> dict[str, dict[str, Any]]:
        return mismatches(self.module, self.shapes, self.tensors)


def match(
    module: nn.Module,
    channels: int,
    state_dict: Mapping[str, np.ndarray],
    *,
    prefix: str | None = None,
    rules: Sequence[Rule] = (),
    image_size: tuple[int, int] | None = None,
) -> Match:
    """Finds the variables of a network in a PyTorch state dict.

    Args:
      module: Network; settings read from the file replace its own.
      channels: Number of channels of its images.
      state_dict: Floating-point arrays by name, in PyTorch's layout.
      prefix: Prefix of the names of the network; tensors without it are not used. None tries all wrapper prefixes that
        occur, and uses the one with which the network fits.
      rules: Renaming rules, applied to the names without the prefix.
      image_size: (height, width) of the images that it was trained on, for a position embedding; None if unknown.

    Raises:
      UserError: If the tensors do not fit the network, or those with several prefixes do. The message names the nearest
        known network.
    """
    rules = [*rules, *aliases(module)]
    prefixes = possible_prefixes(state_dict) if prefix is None else [given_prefix(state_dict, prefix)]
    if len(prefixes) > _MAX_PREFIXES:
        raise UserError(
            f"names begin with {len(prefixes) - 1} prefixes of wrappers, such as {prefixes[-1]}; at most "
            f"{_MAX_PREFIXES - 1} are tried: choose one with --prefix"
        )

    @functools.cache
    def network(**settings):
        found = module.clone(**settings)
        return found, expected_shapes(found, channels)

    candidates = [_candidate(module, network, state_dict, found, rules, image_size) for found in prefixes]
    fitting = [found for found in candidates if not any(found.mismatches.values())]
    if len(fitting) > 1:
        raise UserError(
            f"several networks fit, with the prefixes {' and '.join(found.prefix for found in fitting)}: "
            f"choose one, such as --prefix={fitting[0].prefix}"
        )
    # If none fits, the error is about the prefix with the fewest missing tensors.
    best = min(fitting or candidates, key=lambda found: len(found.shapes.keys() - found.tensors.keys()))
    try:
        variables, used, _ = from_torch(best.module, channels, best.tensors)
    except UserError as error:
        raise UserError(f"{error}{'' if fitting else _hint(module.width, best)}") from None
    used = {best.sources[name]: path for name, path in used.items()}
    unused = [name for name in state_dict if name not in used]
    return Match(variables, used, unused, best.prefix, best.settings)


def _candidate(module, network, state_dict, prefix, rules, image_size):
    without = with_prefix(state_dict, prefix)
    sources = {new: without[name] for new, name in rename(without, rules).items()}
    tensors = {new: state_dict[name] for new, name in sources.items()}
    settings = read_settings(module, {name: array.shape for name, array in tensors.items()}, image_size)
    return _Candidate(prefix, sources, tensors, settings, *network(**settings))


def _hint(width, candidate):
    """Returns the end of an error message: the names that were probably meant, and the nearest known network."""
    problems = candidate.mismatches
    if [kind for kind, names in problems.items() if names] == ["unknown"]:
        pattern = re.sub(r"\\?\s", r"\\s", re.escape(next(iter(problems["unknown"]))))  # No space is in a pattern.
        return f"; if it does not need them, leave them out: --names=FILE, with a line such as '^{pattern}$ -' for each"
    likely = likely_names(problems["missing"], problems["unknown"])
    meant = f"; judging by the shapes, {', '.join(likely)}" if likely else ""
    with pause("looking for the nearest known network"):
        return f"{meant}; {describe_nearest(candidate.tensors, width)}"
