"""Editing: exact reconstruction by Cycle-SDE, O(1/N) by inversion, closed-form edits of Gaussian data, masks."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.tree_util import Partial

from tests import tolerances
from tests.cases import DETERMINISTIC, STOCHASTIC, assert_close, assert_order, normal, plane, scales, two_wells
from theory.editing import edit
from theory.mixtures import noise_fn
from theory.schedules import LinearVP
from theory.solve import time_grid
from theory.solvers import DDIM, DPMSolverPP2M, EulerMaruyama, Heun

pytestmark = pytest.mark.hasty

SCHEDULE = LinearVP(0.1, 10.0)
EPS = two_wells(SCHEDULE)
X0 = normal(4, 2)
KEY = jr.key(1)


def filled(ts, times: int):
    """The grid, filled up with its last time where it is shorter: steps of no length change nothing."""
    return jnp.asarray(np.pad(ts, (0, max(0, times - len(ts))), mode="edge"))


def reconstruction_error(solver, latent, steps, end=1e-3):
    """Largest error of the edit that changes nothing. ODE solvers take steps of no length, and compile once."""
    ts = filled(time_grid(SCHEDULE, steps, start=0.8, end=end), 257 if latent == "invert" else 0)
    return np.abs(np.asarray(edit(solver, EPS, EPS, X0, ts, KEY, latent=latent)) - X0).max()


@pytest.mark.parametrize("name", STOCHASTIC)
def test_cycle_reconstructs_exactly(name):
    """Every stochastic solver returns the source to rounding, at few steps as at many."""
    for steps in (5, 50):
        assert reconstruction_error(STOCHASTIC[name](SCHEDULE), "cycle", steps) < tolerances.RECONSTRUCTION_64


@pytest.mark.parametrize(("solver", "order"), [(DDIM(SCHEDULE, 0.0), 1), (Heun(SCHEDULE), 3)])
def test_inversion_reconstructs_to_the_order_of_the_solver(solver, order):
    """DDIM inversion returns the source to O(1/N) only, a truncation error.

    Up and down a step of an even order p leaves C h^(p + 1) + C (-h)^(p + 1) = 0: Heun's round trip is of third order.
    """
    assert_order(lambda steps: reconstruction_error(solver, "invert", steps, end=0.05), order, (64, 128, 256))
    assert reconstruction_error(solver, "invert", 256, end=0.05) > 1e4 * tolerances.RECONSTRUCTION_64


def test_fresh_noise_does_not_reconstruct():
    """Negative control: "noise" forgets the source from t = 0.8, and a cycle with another target moves it."""
    solver, ts = DDIM(SCHEDULE, 1.0), time_grid(SCHEDULE, 20, start=0.8, end=1e-3)
    assert np.abs(edit(solver, EPS, EPS, X0, ts, KEY, latent="noise") - X0).max() > 0.1
    other = two_wells(SCHEDULE, wells=0.0)
    assert np.abs(edit(solver, EPS, other, X0, ts, KEY, latent="cycle") - X0).max() > 0.1


VARIANCE, T0, END = 0.3, 0.7, 0.05  # of Gaussian data around 0; times of the latent and of the result
GAUSSIAN_EPS = two_wells(SCHEDULE, 0.0, VARIANCE)
SHIFT = 0.6


def variance(t):
    alpha, sigma = scales(SCHEDULE, t)
    return alpha**2 * VARIANCE + sigma**2


def edit_ratio(solver, latent, steps):
    """(x~_s - x_s) / (x~_t0 - x_t0) of a shift of the latent, for three data points: one number if it is affine."""
    eps, x0 = GAUSSIAN_EPS, jnp.array([-0.5, 0.4, 1.9])
    ts = filled(time_grid(SCHEDULE, steps, start=T0, end=END), 193 if latent == "invert" else 0)
    shifted, plain = (
        np.asarray(edit(solver, eps, eps, x0, ts, KEY, latent=latent, manipulate=lambda x, d=d: x + d))
        for d in (SHIFT, 0.0)
    )
    ratios = (shifted - plain) / SHIFT
    assert_close(ratios, np.full(3, ratios[0]), tolerances.IDENTITY)
    return float(ratios[0])


ODE_RATIO = (variance(END) / variance(T0)) ** 0.5  # probability-flow ODE: the shift in units of the marginals
SDE_RATIO = (
    scales(SCHEDULE, T0)[0] / scales(SCHEDULE, END)[0] * variance(END) / variance(T0)
)  # regression of x_s on x_t0


@pytest.mark.parametrize(
    ("solver", "latent", "exact", "order"),
    [
        (DDIM(SCHEDULE, 0.0), "invert", ODE_RATIO, 1),
        (Heun(SCHEDULE), "invert", ODE_RATIO, 2),
        (EulerMaruyama(SCHEDULE, 1.0), "cycle", SDE_RATIO, 1),
        (DPMSolverPP2M(SCHEDULE, 0.5), "cycle", (ODE_RATIO**3 * SDE_RATIO) ** 0.25, 2),
    ],
)
def test_edit_of_one_gaussian_sample(solver, latent, exact, order):
    """A shifted latent moves the result by the closed-form ratio in the limit of many steps, at the solver's order.

    For the lambda-SDE the ratio is ODE^(1 - lam²) SDE^(lam²); the other process's ratio is not approached.
    """
    assert_order(lambda steps: abs(edit_ratio(solver, latent, steps) - exact), order, (48, 96, 192))
    assert abs(SDE_RATIO - ODE_RATIO) > 0.1  # negative control: the limits are far apart


@pytest.mark.parametrize("steps", [3, 30])
def test_cycle_with_ancestral_steps_has_no_discretisation_error(steps):
    """With DDIM(1) every step is the regression of x_s on x_t, so the ratio is exact for any N; DDIM(0.9)'s is not."""
    assert abs(edit_ratio(DDIM(SCHEDULE, 1.0), "cycle", steps) - SDE_RATIO) < tolerances.IDENTITY
    assert abs(edit_ratio(DDIM(SCHEDULE, 0.9), "cycle", steps) - SDE_RATIO) > 1e-3


def test_noised_edit_has_the_posterior_mean():
    """Noised to t0 and solved back by DDIM(1): E[x~_0 | x_0] regresses twice, x_0 -> x_t0 -> x~_0; DDIM(0) does not."""
    draws, x0 = 20_000, 1.7
    eps, ts = GAUSSIAN_EPS, time_grid(SCHEDULE, 5, start=T0)
    expected = scales(SCHEDULE, T0)[0] ** 2 * VARIANCE / variance(T0) * x0  # the squared correlation of x_0 and x_t0

    def standard_errors(eta):
        ends = np.asarray(edit(DDIM(SCHEDULE, eta), eps, eps, jnp.full(draws, x0), ts, KEY, latent="noise"))
        return abs(ends.mean() - expected) / ends.std() * draws**0.5

    assert standard_errors(1.0) < tolerances.STANDARD_ERRORS < standard_errors(0.0)


@pytest.mark.parametrize(
    ("make", "latent"),
    [
        (STOCHASTIC["DDIM(1.0)"], "cycle"),
        (STOCHASTIC["DPMSolverPP2M(0.5)"], "cycle"),
        (DETERMINISTIC["DDIM(0)"], "invert"),
        (STOCHASTIC["EulerMaruyama(0.5)"], "noise"),
        (DETERMINISTIC["DPMSolverPP2M(0)"], "noise"),
    ],
)
def test_masked_part_returns_exactly(make, latent):
    """mask = 0 comes back bit by bit although everything is shifted; mask = 1 does not, nor does it without a mask."""
    ts, mask = time_grid(SCHEDULE, 6, start=0.8, end=0.01), jnp.array([[1.0, 0.0]])

    def shifted(mask):
        given = {"latent": latent, "manipulate": lambda x: x + 1, "mask": mask}
        return np.asarray(edit(make(SCHEDULE), EPS, EPS, X0, ts, KEY, **given))

    out = shifted(mask)
    np.testing.assert_array_equal(out[:, 1], X0[:, 1])
    assert np.all(out[:, 0] != X0[:, 0]) and np.all(shifted(None)[:, 1] != X0[:, 1])


def test_masked_part_of_the_latent_is_not_manipulated():
    """A manipulation of what is masked changes nothing, although the noise prediction couples the two parts."""
    eps, ts, mask = noise_fn(plane(), SCHEDULE), time_grid(SCHEDULE, 6, start=0.8, end=0.01), jnp.array([[1.0, 0.0]])

    def shifted(d):
        move = jnp.array([d])
        given = {"latent": "invert", "manipulate": lambda x: x + move, "mask": mask}
        return np.asarray(edit(DDIM(SCHEDULE), eps, eps, X0, ts, KEY, **given))

    np.testing.assert_array_equal(shifted([0.0, 1.0]), shifted([0.0, 0.0]))
    assert np.all(shifted([1.0, 0.0])[:, 0] != shifted([0.0, 0.0])[:, 0])


def test_a_mask_that_does_not_hold_at_the_first_time():
    """What was manipulated under it is seen by the first step, and by none after: it returns as exactly as before."""
    eps, ts, mask = noise_fn(plane(), SCHEDULE), time_grid(SCHEDULE, 6, start=0.8, end=0.01), jnp.array([[1.0, 0.0]])

    def shifted(d):
        given = {"latent": "invert", "mask": mask, "mask_latent": False}
        move = jnp.array([[0.0, d]])
        return np.asarray(edit(DDIM(SCHEDULE), eps, eps, X0, ts, KEY, manipulate=lambda x: x + move, **given))

    np.testing.assert_array_equal(shifted(1.0)[:, 1], X0[:, 1])
    assert np.all(shifted(1.0)[:, 0] != shifted(0.0)[:, 0])


def test_masked_cycle_without_an_edit_still_reconstructs():
    """The constraint writes what is already there, at t0 too: the noise prediction couples the two parts."""
    eps, ts = noise_fn(plane(), SCHEDULE), time_grid(SCHEDULE, 20, start=0.8, end=0.01)
    out = edit(DPMSolverPP2M(SCHEDULE, 1.0), eps, eps, X0, ts, KEY, latent="cycle", mask=jnp.array([[1.0, 0.0]]))
    assert_close(out, X0, tolerances.RECONSTRUCTION_64)


def test_edits_do_not_compile_again():
    """New prompts, points, grids and shifts of the same shapes reuse the compiled loops; another length does not."""
    traces = []

    def counted(eps_fn, x, t):
        traces.append(None)
        return eps_fn(x, t)

    def run(seed, steps=5):
        eps = Partial(counted, two_wells(SCHEDULE, 0.5 + seed, 0.1 + seed))
        ts = time_grid(SCHEDULE, steps, end=0.01 * (seed + 1))
        return edit(DDIM(SCHEDULE, 1.0), eps, eps, X0 + seed, ts, KEY, latent="cycle", manipulate=lambda x: x + seed)

    run(0)
    once = len(traces)
    run(1), run(2)
    assert once >= 1 and len(traces) == once
    run(0, steps=6)
    assert len(traces) > once


@pytest.mark.parametrize(
    ("solver", "latent", "end", "match"),
    [
        (DDIM(SCHEDULE, 1.0), "invert", 0.1, r"invert.*stochastic"),
        (DDIM(SCHEDULE, 0.0), "cycle", 0.1, r"record.*stochastic solver"),
        (Heun(SCHEDULE), "cycle", 0.1, r"record.*stochastic solver"),
        (DDIM(SCHEDULE, 1.0), "cycle", 0.0, r"record.*above t = 0"),
    ],
)
def test_solvers_that_do_not_fit(solver, latent, end, match):
    """ValueError from the step that cannot be taken."""
    with pytest.raises(ValueError, match=match):
        edit(solver, EPS, EPS, X0, time_grid(SCHEDULE, 4, end=end), KEY, latent=latent)


def test_unknown_latent():
    """The message lists the latents; edit is unwrapped since the type checker of the tests comes first."""
    unchecked = edit
    while hasattr(unchecked, "__wrapped__"):
        unchecked = unchecked.__wrapped__
    with pytest.raises(ValueError, match=r"'cylce'.*noise, invert, cycle"):
        unchecked(DDIM(SCHEDULE), EPS, EPS, X0, time_grid(SCHEDULE, 4), KEY, latent="cylce")


def test_any_shape():
    """A point, a batch and a picture-like array are edited alike: nothing here knows what x is."""
    ts = time_grid(SCHEDULE, 4, end=0.01)
    for shape in ((), (3,), (2, 3, 4, 1)):
        x0 = normal(*shape)
        out = np.asarray(edit(Heun(SCHEDULE), EPS, EPS, x0, ts, KEY, latent="invert"))
        assert out.shape == shape and 0 < np.abs(out - x0).max() < 2
