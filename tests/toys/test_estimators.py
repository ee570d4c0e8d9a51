"""Estimates of KL from samples, on Gaussians whose KL is known, and on the toy whose KL they should see."""

from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from tests.cases import normal
from theory.checks import paper_problem
from theory.ratios import ratio_sde
from toys import kl
from toys.estimators import ESTIMATORS, matched_w2, plane_kl

PAPER = paper_problem()
EXACT = 0.5  # KL(N(1, 1) | N(0, 1))
BIAS = {
    "histogram": 0.06,
    "kernel density of both": 0.08,
    "kernel density against q": 0.08,
    "5 nearest neighbours": 0.08,
}  # at 4000 draws, by their papers


def log_unit(x):
    """Log density of N(0, 1)."""
    return -(x[:, 0] ** 2) / 2 - np.log(2 * np.pi) / 2


def draws():
    return np.asarray(normal(4000, 1)), np.asarray(normal(1, 4000)).T


@pytest.mark.parametrize("name", BIAS)
def test_easy_case(name):
    """Two overlapping Gaussians: within the bias; two samples of one law give nearly nothing, a larger shift more."""
    x, y = draws()
    estimate = lambda shift: ESTIMATORS[name](x + shift, y, log_unit)  # noqa: E731
    assert abs(estimate(1) - EXACT) < BIAS[name]
    assert abs(estimate(0)) < BIAS[name] < estimate(2) - estimate(1)


def test_the_mean_over_bins_is_the_kl_over_the_range():
    """An eighth of it on [-4, 4], within the bias of a histogram, which is no KL."""
    x, y = draws()
    estimate = ESTIMATORS["histogram, mean over bins"](x + 1, y, log_unit)
    assert abs(8 * estimate - EXACT) < BIAS["histogram"] < abs(estimate - EXACT)
    assert set(ESTIMATORS) == {*BIAS, "histogram, mean over bins"}


@partial(jax.jit, static_argnums=0)
def healed(n: int, key):
    """n draws of p~_0 by the exact reverse kernel, and n of p_0; log(p~_0 / p_0) at the first thousand."""
    p, end = PAPER, jnp.zeros(())
    keys = jr.split(key, n + 2)
    y = p.start.sample(keys[0], (n,))
    edited = jax.vmap(lambda y, key: p.target.reverse_kernel(p.schedule, y, p.t0, end).sample(key))(y, keys[2:])
    log_ratio = jax.vmap(ratio_sde(p, end))(edited[:1000]).log_h
    return edited, p.target.sample(keys[1], (n,)), log_ratio


@pytest.mark.hasty
def test_what_ten_thousand_draws_show():
    """KL = .0032 after the SDE: a histogram more than doubles it, its mean over bins loses most of it, a kernel density
    against the known law sees a hundred times as much, and neighbours scatter by more than it is."""
    size, exact = kl.Config(), 0.00322556396747  # of the figure, and as in tests/theory/test_golden.py
    keys = jr.split(jr.key(0), size.repeats)
    draws = [jax.tree.map(np.asarray, healed(size.samples, key)) for key in keys]
    log_q = lambda x: np.asarray(PAPER.target.log_prob(jnp.asarray(x)))  # noqa: E731
    found = {name: np.array([f(x, y, log_q) for x, y, _ in draws]) for name, f in ESTIMATORS.items()}
    assert found["histogram"].mean() > 2 * exact
    assert found["histogram, mean over bins"].mean() < exact / 2
    assert found["kernel density against q"].mean() > 100 * exact
    assert found["5 nearest neighbours"].std(ddof=1) > exact
    # What can see it: the exact log-ratio, over all draws.
    log_ratio = np.concatenate([ratio for *_, ratio in draws])
    error = log_ratio.std(ddof=1) / np.sqrt(size.samples * size.repeats)
    assert 4 * error < exact
    assert abs(log_ratio.mean() - exact) < 4 * log_ratio.std(ddof=1) / np.sqrt(log_ratio.size)


def test_kl_in_the_plane_against_the_closed_form():
    """N(0, 1) against N((.5, 0), 1) is .5²/2; against a law shifted twice as far it is not."""
    x = np.random.default_rng(0).normal(size=(20_000, 2))

    def log_q(shift: float):
        return lambda x: -((x - [shift, 0.0]) ** 2).sum(-1) / 2 - np.log(2 * np.pi)

    for shift, right in ((0.5, True), (1.0, False)):
        value, error = plane_kl(x, log_q(shift))
        assert (abs(value - 0.125) < 4 * error) is right


def test_w2_of_a_shift():
    """The best assignment of points that are shifted, in another order, is the shift; of others it is more."""
    x = np.random.default_rng(0).normal(size=(200, 2))
    np.testing.assert_allclose(matched_w2(x, x[::-1] + np.array([0.03, 0.04])), 0.05, rtol=1e-12)
    assert matched_w2(x, 2 * x) > 0.5
