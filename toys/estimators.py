"""The usual estimates of KL(p | q) and W2 from samples, as the literature makes them. `theory` needs none of them.

Each of ESTIMATORS takes draws x of p and y of q, and log q at points, for those that know q.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from scipy.spatial import KDTree
from scipy.spatial.distance import cdist
from scipy.special import digamma, kl_div
from scipy.stats import gaussian_kde

Sample = Float[np.ndarray, "n d"]
LogDensity = Callable[[Sample], Float[np.ndarray, " n"]]


def histogram(x: Sample, y: Sample, log_q: LogDensity, bins: int = 100) -> float:
    """From counts of both samples on the line in equal bins over their joint range, bins that lack either left out."""
    low, high = min(x.min(), y.min()), max(x.max(), y.max())
    p, q = (np.histogram(sample[:, 0], bins, (low, high))[0] / len(sample) for sample in (x, y))
    both = (p > 0) & (q > 0)
    return float(np.sum(p[both] * np.log(p[both] / q[both])))


def histogram_mean(x: Sample, y: Sample, log_q: LogDensity, bins: int = 99, reach: float = 4.0) -> float:
    """The mean, not the sum, of density p log(p / q) over the bins: KL divided by the range, 2 reach.

    As in the code of Cao et al. 2023 (arXiv 2306.02063); bins that lack either are left out.
    """
    p, q = (np.histogram(sample[:, 0], bins, (-reach, reach), density=True)[0] for sample in (x, y))
    return float(np.mean(np.where((p > 0) & (q > 0), kl_div(p, q), 0.0)))


def kernel_density(x: Sample, y: Sample, log_q: LogDensity, points: int = 1000) -> float:
    """From a kernel density estimate of each sample, Scott's bandwidth (scipy's default), averaged over some of x.

    Infinite for laws that do not overlap: some 37 bandwidths from all of y nothing of q is left in float64.
    """
    p, q = gaussian_kde(x.T), gaussian_kde(y.T)
    return float(np.mean(np.log(p(x[:points].T) / q(x[:points].T))))


def kernel_density_of_one(x: Sample, y: Sample, log_q: LogDensity, points: int = 1001) -> float:
    """A kernel density estimate of x alone, Scott's bandwidth, integrated on the line against the known q.

    What both estimates blur alike in `kernel_density` is here part of the answer.
    """
    p = gaussian_kde(x.T)
    grid = np.linspace(x.min() - 1, x.max() + 1, points)
    density = p(grid)
    kept = density > 0
    terms = density[kept] * (np.log(density[kept]) - log_q(grid[kept][:, None]))
    return float(terms.sum() * (grid[1] - grid[0]))


def nearest_neighbours(x: Sample, y: Sample, log_q: LogDensity, k: int = 5) -> float:
    """d mean log(nu_k / rho_k) + log(m / (n - 1)), distances to the k-th neighbour in y and in x.

    Wang, Kulkarni & Verdú 2009 (IEEE Trans. Inf. Theory 55, 2392-2405), eq. (14).
    """
    rho = KDTree(x).query(x, k + 1)[0][:, -1]  # the nearest is the point itself
    nu = KDTree(y).query(x, k)[0][:, -1]
    n, d = x.shape
    return float(d * np.mean(np.log(nu / rho)) + np.log(len(y) / (n - 1)))


def plane_kl(x: Sample, log_q: LogDensity, k: int = 5) -> tuple[float, float]:
    """KL of the law of these points of the plane to the known q, and its standard error.

    -H - E log q, with the entropy H from distances to the k-th neighbour, psi(n) - psi(k) + log pi + 2 E log rho in the
    plane (Kozachenko & Leonenko 1987; the form of Kraskov et al. 2004, eq. (20)).
    """
    n = len(x)
    rho = KDTree(x).query(x, k + 1)[0][:, -1]
    entropy = digamma(n) - digamma(k) + np.log(np.pi) + 2 * np.log(rho)
    terms = -entropy - log_q(x)
    return float(terms.mean()), float(terms.std(ddof=1) / np.sqrt(n))


def matched_w2(x: Sample, y: Sample) -> float:
    """W2 between as many points, by the best assignment. Between samples of one law it is not 0."""
    squares = cdist(x, y, "sqeuclidean")
    return float(np.sqrt(squares[linear_sum_assignment(squares)].mean()))


ESTIMATORS = {
    "histogram": histogram,
    "histogram, mean over bins": histogram_mean,
    "kernel density of both": kernel_density,
    "kernel density against q": kernel_density_of_one,
    "5 nearest neighbours": nearest_neighbours,
}
