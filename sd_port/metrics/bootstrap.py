"""How sure a mean over the items of a benchmark is."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES, LEVEL = 2000, 0.95


class Interval(NamedTuple):
    """A mean, its standard error, and the bounds between which it would mostly lie for other items of the same kind."""

    mean: float
    error: float  # the standard deviation of the bootstrap distribution
    low: float
    high: float


def bootstrap(
    values: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """The mean of the items' values, and the percentile interval of Efron 1979 (Ann. Statist. 7, 1-26).

    values: (items,); weights: (items,), such as how many points each item has, for a mean over points of which whole
    items are drawn again. The same seed gives the same interval. level is the share of means between the bounds.

    Raises ValueError for no items, for as many weights as there are not values, and for a level outside of (0, 1).
    """
    values = np.asarray(values, np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    if values.ndim != 1 or values.size == 0 or weights.shape != values.shape:
        raise ValueError(f"bootstrap: {values.shape} values and {weights.shape} weights; one of each for every item")
    if not 0 < level < 1:
        raise ValueError(f"bootstrap: level = {level} must lie between 0 and 1")
    drawn = np.random.default_rng(seed).integers(values.size, size=(resamples, values.size))
    means = (values * weights)[drawn].sum(axis=1) / weights[drawn].sum(axis=1)
    low, high = np.quantile(means, ((1 - level) / 2, (1 + level) / 2))
    return Interval(float(np.average(values, weights=weights)), float(means.std()), float(low), float(high))
