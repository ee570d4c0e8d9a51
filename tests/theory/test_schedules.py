"""Schedules against their definitions: autodiff, arbitrary precision (mpmath) and diffusers' tables."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from tests import tolerances
from tests.cases import SCHEDULES, VP_SCHEDULES, assert_close
from theory.schedules import CosineVP, DiscreteVP, LinearVP, ScaledLinearVP, VarianceExploding
from theory.types import Schedule

all_schedules = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
vp_schedules = pytest.mark.parametrize("schedule", VP_SCHEDULES.values(), ids=VP_SCHEDULES)
TIMES = np.array([1e-4, 0.0123, 0.25, 0.5501, 0.8, 0.9999])  # no node of a table: f jumps there
MANY = np.sort(np.concatenate([[1e-6, 1.0], np.random.default_rng(0).uniform(1e-6, 1.0, 300)]))


@partial(jax.jit, static_argnums=0)
def coefficients(schedule, t):
    """Everything that a schedule says of the times t, and the way back from log_snr."""
    log_snr = schedule.log_snr(t)
    scales = {"log_alpha": schedule.log_alpha(t), "alpha": schedule.alpha(t), "sigma": schedule.sigma(t)}
    rates = {"f": schedule.f(t), "beta": schedule.beta(t)}
    return scales | rates | {"log_snr": log_snr, "back": schedule.t_of_log_snr(log_snr)}


def at(schedule, t) -> dict[str, np.ndarray]:
    return jax.tree.map(np.asarray, coefficients(schedule, jnp.asarray(t)))


@vp_schedules
def test_variance_is_preserved(schedule):
    """alpha² + sigma² = 1."""
    found = at(schedule, MANY)
    assert np.abs(found["alpha"] ** 2 + found["sigma"] ** 2 - 1).max() < tolerances.ROUNDING


def test_variance_exploding_is_not_preserved():
    """Negative control of the above, and what is kept instead: alpha = 1."""
    schedule = SCHEDULES["exploding"]
    found = at(schedule, MANY)
    np.testing.assert_array_equal(found["alpha"], 1.0)
    assert np.all(found["alpha"] ** 2 + found["sigma"] ** 2 - 1 > tolerances.ROUNDING)


@partial(jax.jit, static_argnums=0)
def slopes(schedule, t):
    """d log(alpha) / dt and d sigma² / dt by autodiff."""
    log_alpha, sigma2 = schedule.log_alpha, lambda t: schedule.sigma(t) ** 2
    return [jax.vmap(jax.grad(f))(t) for f in (log_alpha, sigma2)]


def assert_forward_sde(schedule):
    """f = d log(alpha) / dt and g² = d sigma² / dt - 2 f sigma² by autodiff; log_snr = 2 log(alpha / sigma)."""
    f, growth = map(np.asarray, slopes(schedule, jnp.asarray(TIMES)))
    found = at(schedule, TIMES)
    assert_close(found["f"], f, tolerances.IDENTITY)
    assert_close(found["beta"], growth - 2 * f * found["sigma"] ** 2, tolerances.IDENTITY)
    assert_close(found["alpha"], np.exp(found["log_alpha"]), tolerances.ROUNDING)
    assert_close(found["log_snr"], 2 * np.log(found["alpha"] / found["sigma"]), tolerances.ROUNDING)


@all_schedules
def test_coefficients_are_those_of_the_forward_sde(schedule):
    """Every closed form of f and beta against derivatives of alpha and sigma."""
    assert isinstance(schedule, Schedule)
    assert_forward_sde(schedule)


@dataclass(frozen=True)
class DriftOff(LinearVP):
    def f(self, t):
        return 1.001 * super().f(t)


@dataclass(frozen=True)
class DiffusionOff(VarianceExploding):
    def beta(self, t):
        return self.vp.beta(t)  # forgets the change of variables


@pytest.mark.parametrize("wrong", [DriftOff(), DiffusionOff(LinearVP())])
def test_wrong_coefficients_are_seen(wrong):
    """Negative control: a drift off by 1e-3, and a VE schedule with the g² of its VP schedule."""
    with pytest.raises(AssertionError):
        assert_forward_sde(wrong)


def test_derived_drift_agrees_with_the_closed_form():
    """The default f of a VP schedule differentiates log_alpha."""
    derived = super(LinearVP, LinearVP()).f(jnp.asarray(TIMES))
    assert_close(derived, at(LinearVP(), TIMES)["f"], tolerances.ROUNDING)


@all_schedules
def test_t_of_log_snr_inverts_log_snr(schedule):
    """There and back in t, and log_snr decreases."""
    found = at(schedule, MANY)
    np.testing.assert_allclose(found["back"], MANY, rtol=tolerances.IDENTITY)
    assert np.all(np.diff(found["log_snr"]) < 0)


def assert_inverts_in_float32(schedule, log_snr):
    times = jnp.array([1e-3, 1e-2, 0.1, 0.5, 1.0], jnp.float32)
    back = jax.jit(lambda times: schedule.t_of_log_snr(log_snr(times)))(times)
    assert back.dtype == jnp.float32
    np.testing.assert_allclose(back, times, rtol=tolerances.INVERSE_32)


@all_schedules
def test_float32_inverse(schedule):
    """t_of_log_snr keeps the digits of float32; negative control: log_snr through 1 - alpha² does not."""
    assert_inverts_in_float32(schedule, schedule.log_snr)
    vp = getattr(schedule, "vp", schedule)
    with pytest.raises(AssertionError):
        assert_inverts_in_float32(schedule, lambda t: jnp.log(vp.alpha(t) ** 2 / (1 - vp.alpha(t) ** 2)))


def exact_alpha(schedule, t: float) -> mpmath.mpf:
    """alpha(t) from the definition of the schedule, in 40 digits."""
    t = mpmath.mpf(t)
    match schedule:
        case LinearVP():
            beta = lambda r: schedule.beta_min + r * (mpmath.mpf(schedule.beta_max) - schedule.beta_min)  # noqa: E731
            return mpmath.exp(-mpmath.quad(beta, [0, t]) / 2)
        case CosineVP():
            cos = lambda u: mpmath.cos(mpmath.pi / 2 * (u + schedule.offset) / (1 + mpmath.mpf(schedule.offset)))  # noqa: E731
            return cos(schedule.end * t) / cos(mpmath.mpf(0))
        case DiscreteVP():
            below = int(mpmath.floor(t * schedule.steps))
            nodes = [mpmath.mpf(1), *map(mpmath.mpf, schedule.alphas_cumprod), mpmath.mpf(1)]
            part = t * schedule.steps - below
            return mpmath.sqrt(nodes[below] ** (1 - part) * nodes[below + 1] ** part)
    raise AssertionError(schedule)


def assert_precise_near_data(schedule, sigma):
    times = jnp.array([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.3], jnp.float32)
    with mpmath.workdps(40):
        expected = [float(mpmath.sqrt(1 - exact_alpha(schedule, float(t)) ** 2)) for t in times]
    actual = jax.jit(sigma)(times)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=tolerances.ROUNDING_32)


@vp_schedules
def test_sigma_is_precise_near_the_data_in_float32(schedule):
    """Against 40 digits from t = 1e-6 on; negative control: sqrt(1 - alpha²) loses them."""
    assert_precise_near_data(schedule, schedule.sigma)
    with pytest.raises(AssertionError):
        assert_precise_near_data(schedule, lambda t: jnp.sqrt(1 - schedule.alpha(t) ** 2))


EDGES = {"from_zero": LinearVP(0.0, 10.0), "constant": LinearVP(2.0, 2.0)}


@pytest.mark.parametrize("schedule", EDGES.values(), ids=EDGES)
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_linear_schedules_at_the_edges(schedule, dtype):
    """No noise at first, and always the same: sigma in 40 digits, the way back, its derivative 1 / f, and t = 0."""
    assert_precise_near_data(schedule, schedule.sigma)
    t = jnp.array([0.0, 1e-6, 1e-4, 0.01, 0.3, 1.0], dtype)

    @jax.jit
    def there_and_back(t):
        log_alpha = schedule.log_alpha(t)
        slope = jax.vmap(jax.grad(schedule.t_of_log_alpha))(log_alpha)
        return schedule.t_of_log_alpha(log_alpha), schedule.t_of_log_snr(schedule.log_snr(t)), slope, schedule.f(t)

    by_alpha, by_snr, slope, f = there_and_back(t)
    tolerance = tolerances.ROUNDING if dtype == jnp.float64 else tolerances.INVERSE_32
    for back in (by_alpha, by_snr):
        assert back.dtype == dtype and back[0] == 0
        np.testing.assert_allclose(back, t, rtol=tolerance)
    np.testing.assert_allclose(slope[1:] * f[1:], 1.0, rtol=tolerance)
    assert slope[0] == (-1.0 if schedule.beta_min else -jnp.inf)  # 1 / f(0), f(0) = -beta_min / 2
    np.testing.assert_allclose(f, [float(jax.grad(schedule.log_alpha)(t)) for t in t], rtol=tolerance)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(by_snr, 1.01 * t, rtol=tolerance)


def test_scaled_linear_is_stable_diffusions():
    """The nodes t = (k + 1) / 1000 hold diffusers' alphas_cumprod, made in float32; another schedule's do not."""
    import diffusers

    reference = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    nodes = (np.arange(1000) + 1) / 1000
    expected = reference.alphas_cumprod.numpy()
    np.testing.assert_allclose(at(ScaledLinearVP(), nodes)["alpha"] ** 2, expected, rtol=tolerances.PARITY_32)
    linear = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="linear")
    assert np.abs(linear.alphas_cumprod.numpy() / expected - 1).max() > tolerances.PARITY_32


@all_schedules
def test_schedules_are_static(schedule):
    """No leaves, equal by value, hashable, and an equal schedule does not trace again; another one does."""
    traces = []

    @jax.jit
    def sigma(schedule, t):
        traces.append(schedule)
        return schedule.sigma(t)

    twin = replace(schedule)
    assert jax.tree.leaves(schedule) == []
    assert schedule == twin and schedule is not twin and hash(schedule) == hash(twin)
    for s, t in ((schedule, 0.1), (twin, 0.2), (schedule, 0.3)):
        np.testing.assert_array_equal(sigma(s, jnp.array(t)).shape, ())
    assert len(traces) == 1
    sigma(LinearVP(0.2, 3.0), jnp.array(0.1))
    assert len(traces) == 2


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: LinearVP(-0.1, 1.0), "LinearVP.*beta_min"),
        (lambda: LinearVP(2.0, 1.0), "LinearVP.*beta_min"),
        (lambda: LinearVP(0.0, 0.0), "LinearVP.*beta_max > 0"),
        (lambda: LinearVP(0.1, float("inf")), "LinearVP.*beta_max"),
        (lambda: LinearVP(float("nan"), 1.0), "LinearVP.*nan"),
        (lambda: CosineVP(offset=-1.0), "CosineVP.*offset"),
        (lambda: CosineVP(end=1.0), "CosineVP.*end"),
        (lambda: DiscreteVP((0.9, 0.9)), "DiscreteVP.*alphas_cumprod"),
        (lambda: DiscreteVP((1.0, 0.5)), "DiscreteVP.*alphas_cumprod"),
        (lambda: DiscreteVP((0.9, 0.0)), "DiscreteVP.*alphas_cumprod"),
        (lambda: DiscreteVP(()), "DiscreteVP.*alphas_cumprod"),
        (lambda: ScaledLinearVP(beta_start=-0.1), "ScaledLinearVP.*beta_start"),
        (lambda: ScaledLinearVP(beta_end=1.5), "ScaledLinearVP.*beta_end"),
        (lambda: ScaledLinearVP(steps=0), "ScaledLinearVP.*steps"),
    ],
)
def test_bad_parameters_are_named(make, match):
    """ValueError with the schedule and the parameter."""
    with pytest.raises(ValueError, match=match):
        make()
