"""Do two samples come from one law? The kernel two-sample test of Gretton et al. 2012 (JMLR 13, 723-773)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.spatial.distance import cdist


class MMD(NamedTuple):
    """The unbiased estimate of the squared maximum mean discrepancy, and how often chance alone gives more."""

    squared: float
    p_value: float


def mmd(
    x: Float[np.ndarray, "n features"], y: Float[np.ndarray, "m features"], *, permutations: int = 500, seed: int = 0
) -> MMD:
    """Of the Gaussian kernel whose width is the median distance within both samples together.

    Every feature is first brought to unit variance over both samples. The p-value is that of `permutations` random
    divisions of the two together, the one at hand included, so it is at least 1 / (permutations + 1).
    """
    both = np.concatenate([x, y]).astype(np.float64)
    spread = both.std(0)
    both = (both - both.mean(0)) / np.where(spread > 0, spread, 1)
    squares = cdist(both, both, "sqeuclidean")
    kernel = np.exp(-squares / np.median(squares[np.triu_indices(len(both), 1)]) / 2)
    np.fill_diagonal(kernel, 0)  # the unbiased estimate leaves out every point's distance to itself
    n, m = len(x), len(y)
    total = kernel.sum()

    def estimate(first: np.ndarray) -> float:  # 1 for the members of the first sample, 0 for those of the second
        within_columns = kernel @ first
        within = first @ within_columns
        across = within_columns.sum() - within
        return within / (n * (n - 1)) + (total - within - 2 * across) / (m * (m - 1)) - 2 * across / (n * m)

    first = np.concatenate([np.ones(n), np.zeros(m)])
    found, rng = estimate(first), np.random.default_rng(seed)
    as_large = sum(estimate(rng.permutation(first)) >= found for _ in range(permutations))
    return MMD(float(found), (1 + as_large) / (1 + permutations))
