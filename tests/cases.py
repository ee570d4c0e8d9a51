"""Schedules, data laws and the order measurement that the tests share."""

import numpy as np

from tests import tolerances
from theory.mixtures import mixture
from theory.schedules import CosineVP, DiscreteVP, LinearVP, ScaledLinearVP, VarianceExploding

VP_SCHEDULES = {
    "linear": LinearVP(),
    "cosine": CosineVP(),
    "scaled_linear": ScaledLinearVP(),
    "three_steps": DiscreteVP((0.8, 0.4, 0.05)),
}
SCHEDULES = VP_SCHEDULES | {"exploding": VarianceExploding(LinearVP(0.1, 10.0))}


def rotated_covariance(angle: float, variances: tuple[float, float]) -> np.ndarray:
    """Q diag(variances) Q^T with Q a rotation of the plane."""
    q = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return q @ np.diag(variances) @ q.T


def plane():
    """Three overlapping components of the plane with different, rotated covariances."""
    covariances = [rotated_covariance(a, v) for a, v in ((0.3, (0.5, 0.1)), (1.2, (0.2, 0.4)), (2.5, (0.3, 0.3)))]
    return mixture([0.5, 0.3, 0.2], [[-1.0, 0.5], [1.0, 1.0], [0.3, -1.2]], covariances)


def assert_close(actual, expected, rtol: float) -> None:
    """Largest error relative to the largest magnitude expected."""
    actual, expected = np.asarray(actual, float), np.asarray(expected, float)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * np.abs(expected).max())


def order(error_of, steps=(32, 64, 128, 256)) -> float:
    """The slope p of error ~ steps^-p, by least squares in the logarithms."""
    errors = [float(error_of(n)) for n in steps]
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


def assert_order(error_of, expected: float, steps=(32, 64, 128, 256)) -> None:
    """The error falls like steps^-expected."""
    measured = order(error_of, steps)
    assert abs(measured - expected) <= tolerances.ORDER, f"order {measured:.3f}, expected {expected}"
