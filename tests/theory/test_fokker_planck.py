"""The law of an inexact score against closed forms, against the exact score's, and against its own balance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from jax.tree_util import Partial

from tests import tolerances
from tests.cases import assert_close
from tests.problems import pair, paper
from theory.contraction import contraction_curve
from theory.fokker_planck import inexact_curve, inexact_flow
from theory.gaussians import inexact_score
from theory.mixtures import noise_fn


def scaled(factor, eps_fn, x, t):
    return factor * eps_fn(x, t)


@pytest.fixture(scope="module")
def inexact():
    """The Gaussian pair with a score 10 % too large and too small, for three noise levels: (errors, levels)."""
    given, ts = pair(), jnp.linspace(1.0, 0.05, 61)
    exact = noise_fn(given.target, given.schedule)

    def curves(error):
        eps_fn = Partial(scaled, 1 + error, exact)
        noisy = jax.vmap(lambda lam: inexact_curve(given, eps_fn, ts, lam, 600, 240))(jnp.array([0.5, 1.0]))
        return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), inexact_flow(given, eps_fn, ts), noisy)

    return jax.jit(jax.vmap(curves))(jnp.array([0.1, -0.1]))


@pytest.mark.parametrize("i", [0, 1])
@pytest.mark.parametrize("j", [0, 1, 2])
def test_inexact_score(inexact, i, j):
    """KL against the closed form for (1 + error) score; the exact score's is another number."""
    error, lam, end = (0.1, -0.1)[i], (0.0, 0.5, 1.0)[j], inexact.ts[i, j, -1]
    found = inexact.kl.value[i, j, -1]
    assert_close(found, inexact_score(pair(), end, lam, error).kl(), tolerances.HEAT)
    with pytest.raises(AssertionError):
        assert_close(found, inexact_score(pair(), end, lam).kl(), tolerances.HEAT)


@pytest.mark.parametrize("j", [0, 1, 2])
def test_what_noise_removes_and_the_error_adds(inexact, j):
    """dKL = -lam²/2 g² I + (1 + lam²)/2 g² E[e . grad log h] by Simpson's rule; neither term alone is it."""
    lam, ts = (0.0, 0.5, 1.0)[j], np.asarray(inexact.ts[0, j])
    g2 = np.asarray(pair().schedule.beta(inexact.ts[0, j]))
    removed = scipy.integrate.simpson(lam**2 / 2 * g2 * inexact.fisher.value[0, j], x=-ts)
    added = scipy.integrate.simpson((1 + lam**2) / 2 * g2 * inexact.error.value[0, j], x=-ts)
    change = float(inexact.kl.value[0, j, -1] - inexact.kl.value[0, j, 0])
    size = max(abs(removed), abs(added))
    assert abs(added - removed - change) < 2e-3 * size  # Simpson's error at the start, where I falls fastest
    assert abs(added - change) > 0.01 * size or lam == 0
    assert abs(-removed - change) > 0.01 * size


def test_the_exact_score_on_two_modes():
    """KL of the paper's toy under the SDE and the ODE by the forward kernel; the noise between modes is seen.

    With lam = 1.1 the SDE ends nearer by more than the tolerance, with a scaled score the ODE ends elsewhere.
    """
    given, ts = paper(), jnp.array([1.0, 0.6, 0.2, 0.01])
    exact = noise_fn(given.target, given.schedule)
    expected = [contraction_curve(given.target, given.start, given.schedule, ts, lam).kl.value for lam in (0.0, 1.0)]
    still, noisy = inexact_flow(given, exact, ts, 40, 40), inexact_curve(given, exact, ts, jnp.array(1.0), 800, 240)
    np.testing.assert_allclose(still.kl.value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(noisy.kl.value, expected[1], rtol=0.02)  # .0032 is 1e-4 of what one cell may hold
    for curve in (still, noisy):
        np.testing.assert_allclose(curve.mode_weights.value.sum(-1), 1, atol=1e-6)
    other = inexact_curve(given, exact, ts, jnp.array(1.1), 800, 240)
    assert other.kl.value[-1] < 0.8 * expected[1][-1]
    scaled_flow = inexact_flow(given, Partial(scaled, 1.1, exact), ts, 40, 40)
    assert abs(scaled_flow.kl.value[-1] - expected[0][-1]) > 0.01
