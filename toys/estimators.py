"""The usual estimates of KL(p | q) from samples, as the literature makes them. `theory` needs none of them."""

import numpy as np
from jaxtyping import Float
from scipy.spatial import KDTree
from scipy.stats import gaussian_kde

Sample = Float[np.ndarray, "n d"]


def histogram(x: Sample, y: Sample, bins: int = 100) -> float:
    """From counts of both samples on the line in equal bins over their joint range, bins that lack either left out."""
    low, high = min(x.min(), y.min()), max(x.max(), y.max())
    p, q = (np.histogram(sample[:, 0], bins, (low, high))[0] / len(sample) for sample in (x, y))
    both = (p > 0) & (q > 0)
    return float(np.sum(p[both] * np.log(p[both] / q[both])))


def kernel_density(x: Sample, y: Sample, points: int = 1000) -> float:
    """From a kernel density estimate of each sample, Scott's bandwidth (scipy's default), averaged over some of x."""
    p, q = gaussian_kde(x.T), gaussian_kde(y.T)
    return float(np.mean(p.logpdf(x[:points].T) - q.logpdf(x[:points].T)))


def nearest_neighbours(x: Sample, y: Sample, k: int = 5) -> float:
    """d mean log(nu_k / rho_k) + log(m / (n - 1)), distances to the k-th neighbour in y and in x.

    Wang, Kulkarni & Verdú 2009 (IEEE Trans. Inf. Theory 55, 2392-2405), eq. (14).
    """
    rho = KDTree(x).query(x, k + 1)[0][:, -1]  # the nearest is the point itself
    nu = KDTree(y).query(x, k)[0][:, -1]
    n, d = x.shape
    return float(d * np.mean(np.log(nu / rho)) + np.log(len(y) / (n - 1)))


ESTIMATORS = {"histogram": histogram, "kernel density": kernel_density, "5 nearest neighbours": nearest_neighbours}
