"""The kernel two-sample test against its definition, and against samples whose laws are known."""

import numpy as np
import pytest
from scipy.stats import kstest

from sd_port.nano.two_samples import mmd
from tests.tolerances import IDENTITY


def normal(seed: int, n: int, mean: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1, (n, 3))


def test_is_the_unbiased_estimate():
    """Gretton et al. 2012, eq. (3), as a double loop over pairs."""
    x, y = normal(0, 7), normal(1, 5, 0.5)
    both = np.concatenate([x, y])
    scaled = (both - both.mean(0)) / both.std(0)
    pairs = [np.sum((a - b) ** 2) for i, a in enumerate(scaled) for b in scaled[i + 1 :]]

    def k(i: int, j: int) -> float:
        return np.exp(-np.sum((scaled[i] - scaled[j]) ** 2) / (2 * np.median(pairs)))

    first, second = range(7), range(7, 12)
    expected = (
        sum(k(i, j) for i in first for j in first if i != j) / 42
        + sum(k(i, j) for i in second for j in second if i != j) / 20
        - 2 * sum(k(i, j) for i in first for j in second) / 35
    )
    np.testing.assert_allclose(mmd(x, y, permutations=1).squared, expected, rtol=IDENTITY)


def test_one_law():
    """p-values of pairs of samples of one law are uniform, up to steps of 1/100: Kolmogorov-Smirnov."""
    found = [mmd(normal(2 * i, 40), normal(2 * i + 1, 40), permutations=99).p_value for i in range(40)]
    assert kstest(found, "uniform").pvalue > 0.01


@pytest.mark.parametrize("mean", [0.6, -0.6])
def test_two_laws(mean):
    found = mmd(normal(0, 80), normal(1, 80, mean), permutations=99)
    assert found.p_value == 0.01 and found.squared > 0


def test_a_feature_that_never_changes():
    """Constant columns are no reason to fail."""
    x, y = (np.concatenate([normal(seed, 20), np.ones((20, 1))], axis=1) for seed in (0, 1))
    assert np.isfinite(mmd(x, y, permutations=9).squared)
