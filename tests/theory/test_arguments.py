"""What newcomers pass by mistake is named in one line, at the first call; what is traced passes, and what is right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cases import normal, two_wells
from tests.problems import BETA, ZERO, pair
from theory.gaussians import inexact_score
from theory.processes import reverse_diffusion, reverse_drift
from theory.ratios import law_gaussian
from theory.solvers import DDIM

pytestmark = pytest.mark.hasty

PAIR, X, EPS = pair(), normal(4, 2), two_wells(BETA)
LEVELS = {
    "reverse_drift": lambda lam: reverse_drift(BETA, EPS, X, jnp.array(0.5), lam),
    "reverse_diffusion": lambda lam: reverse_diffusion(BETA, jnp.array(0.5), lam),
    "law_gaussian": lambda lam: law_gaussian(PAIR, ZERO, lam),
    "inexact_score": lambda lam: inexact_score(PAIR, ZERO, lam),
}


def one_line(error: pytest.ExceptionInfo) -> str:
    """The message, which is one line."""
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", LEVELS)
def test_noise_levels_that_cannot_be(name):
    """Negative, infinite, nan: named, with the value; not where they are traced, and not zero or five."""
    for bad in (-0.1, float("nan"), float("inf"), np.float64(-1.0), jnp.array(jnp.nan)):
        with pytest.raises(ValueError, match=f"{name}.*noise level lam") as error:
            LEVELS[name](bad)
        assert str(bad) in one_line(error)
    found = jax.jit(lambda lam: LEVELS[name](lam))(jnp.array([-0.1, jnp.nan])[1])
    assert any(np.isnan(leaf).any() for leaf in jax.tree.leaves(found))
    for good in (0.0, 5.0, jnp.array(1.0)):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(LEVELS[name](good)))


def test_ddim_takes_no_more_noise_than_ddpm():
    """sqrt(sigma_s² - var) is nan for eta = 1.2 and a long step; the message says what takes such levels."""
    with pytest.raises(ValueError, match=r"DDIM.*eta <= 1.*1\.2.*EulerMaruyama and DPMSolverPP2M") as error:
        DDIM(BETA, 1.2)
    one_line(error)
    assert DDIM(BETA, 1.0).stochastic
