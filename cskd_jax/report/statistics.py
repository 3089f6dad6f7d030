"""Statistics over a few seeds: mean and deviation, and differences between runs that share a seed."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy import stats

CONFIDENCE = 0.95


class Summary(NamedTuple):
    """Mean over runs, their sample standard deviation (None for a single run), and their number."""

    mean: float
    deviation: float | None
    count: int


class PairedDifference(NamedTuple):
    """Mean difference between runs with the same seed.

    Attributes:
      mean: Mean over the seeds that both sides have.
      margin: Half the width of Student's t interval; None if it cannot be estimated: for a single seed, and if all
        differences are equal, as happens on small test splits.
      count: Number of seeds.
    """

    mean: float
    margin: float | None
    count: int

    def corrected(self, comparisons: int) -> "PairedDifference":
        """Returns the difference with a wider interval, so that all of `comparisons` hold together (Bonferroni)."""
        if self.margin is None:
            return self
        alone, together = (stats.t.ppf(1 - (1 - CONFIDENCE) / n / 2, self.count - 1) for n in (1, comparisons))
        return self._replace(margin=self.margin * float(together / alone))

    @property
    def verdict(self) -> str:
        """Returns the claim that the difference supports, in words."""
        if self.count == 1:
            return "one seed: no claim"
        if self.margin is None:
            return "the same difference in every seed, interval unknown: no claim"
        if abs(self.mean) <= self.margin:
            return "no difference shown"
        return "higher" if self.mean > 0 else "lower"


def summarize(values: Sequence[float]) -> Summary:
    """Returns the summary of at least one value."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Summary(statistics.fmean(values), deviation, len(values))


def paired_difference(ours: Mapping[int, float], baseline: Mapping[int, float]) -> PairedDifference | None:
    """Returns our values minus those of the baseline, both {seed: value}, over common seeds; None if there are none."""
    differences = [ours[seed] - baseline[seed] for seed in sorted(ours.keys() & baseline.keys())]
    if not differences:
        return None
    mean, deviation, count = summarize(differences)
    margin = None
    # The differences are equal except for rounding.
    if deviation is not None and deviation > 1e-9:
        margin = deviation / math.sqrt(count) * float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
    return PairedDifference(mean, margin, count)
