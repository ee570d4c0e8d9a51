"""Estimates of KL from samples, on Gaussians whose KL is known: right to their errors where they can be."""

import numpy as np
import pytest

from tests.cases import normal
from toys.estimators import ESTIMATORS

EXACT = 0.5  # KL(N(1, 1) | N(0, 1))
BIAS = {"histogram": 0.06, "kernel density": 0.08, "5 nearest neighbours": 0.08}  # at 4000 draws, by their papers


@pytest.mark.parametrize("name", ESTIMATORS)
def test_easy_case(name):
    """Two overlapping Gaussians: within the bias; two samples of one law give nearly nothing, a larger shift more."""
    estimate = ESTIMATORS[name]
    x, y = normal(4000, 1), normal(1, 4000).T
    x, y = np.asarray(x), np.asarray(y)
    assert abs(estimate(x + 1, y) - EXACT) < BIAS[name]
    assert abs(estimate(x, y)) < BIAS[name] < estimate(x + 2, y) - estimate(x + 1, y)
