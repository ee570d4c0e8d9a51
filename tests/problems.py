"""Reverse processes with a wrong start that the tests of exact laws share, and how a published number is met."""

from decimal import Decimal

import jax.numpy as jnp
import numpy as np

from tests.cases import rotated_covariance
from theory.mixtures import GaussianMixture, gaussian, mixture, mixture_1d
from theory.problems import Problem, problem
from theory.schedules import LinearVP

BETA = LinearVP(0.1, 10.0)
ZERO = jnp.zeros(())


def paper() -> Problem:
    """The paper's toy: 1/2 N(-2, .2²) + 1/2 N(2, .2²) from N(.5, .5²)."""
    return problem(mixture_1d([0.5, 0.5], [-2.0, 2.0], [0.2, 0.2]), gaussian([0.5], [[0.25]]), BETA)


def pair() -> Problem:
    """Two Gaussians on the line: N(1.3, .2²) from N(.5, .5²)."""
    return problem(gaussian([1.3], [[0.04]]), gaussian([0.5], [[0.25]]), BETA)


def asymmetric(t0: float = 0.6) -> Problem:
    """Three components of different weights and widths, from two."""
    target = mixture_1d([0.5, 0.2, 0.3], [-1.5, 0.2, 1.4], [0.3, 0.15, 0.4])
    return problem(target, mixture_1d([0.4, 0.6], [-0.3, 0.9], [0.5, 0.3]), BETA, t0)


def in_plane() -> Problem:
    """Two rotated components of the plane, from two."""
    wide, narrow = rotated_covariance(0.4, (0.5, 0.15)), rotated_covariance(1.9, (0.3, 0.6))
    target = mixture([0.35, 0.65], [[-1.0, 0.3], [0.9, -0.4]], [wide, narrow])
    start = mixture([0.7, 0.3], [[0.4, 0.5], [-0.6, 0.0]], [rotated_covariance(2.3, (0.3, 0.5)), 0.4 * np.eye(2)])
    return problem(target, start, BETA, 0.7)


def gaussians_in_plane() -> Problem:
    """A rotated Gaussian of the plane, from another."""
    target, start = rotated_covariance(0.4, (0.5, 0.1)), rotated_covariance(1.5, (0.6, 0.3))
    return problem(gaussian([0.5, -1.0], target), gaussian([0.2, 0.4], start), BETA)


def both(p: GaussianMixture, q: GaussianMixture) -> GaussianMixture:
    """A cover for quadrature: the components of two laws."""
    joined = GaussianMixture(*(jnp.concatenate(parts) for parts in zip(p, q, strict=True)))
    return joined._replace(log_weights=joined.log_weights - jnp.log(2.0))


def assert_golden(actual, published: str) -> None:
    """To one unit of the last digit published (some are cut, not rounded), and not asked for more than nine digits."""
    value = float(published)
    unit = 10.0 ** int(Decimal(published).as_tuple().exponent)
    assert abs(float(actual) - value) <= max(unit, 1e-9 * abs(value)), f"{float(actual):.12g}, not {published}"
