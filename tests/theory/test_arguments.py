"""What newcomers pass by mistake is named in one line, at the first call; what is traced passes, and what is right."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from tests import tolerances
from tests.cases import assert_close, normal, two_wells
from tests.problems import BETA, ZERO, pair
from theory.arguments import as_static
from theory.compilations import traces
from theory.contraction import contraction_curve
from theory.divergences import gaussian_kl
from theory.editing import edit
from theory.fokker_planck import inexact_curve
from theory.gaussians import inexact_score
from theory.heat import heat_curve
from theory.mixtures import mixture_1d, noise_fn
from theory.problems import problem
from theory.processes import forward_path, reverse_diffusion, reverse_drift
from theory.ratios import law_gaussian
from theory.schedules import VarianceExploding, VariancePreserving
from theory.solve import invert, record, replay, sample, sample_parts, time_grid
from theory.solvers import DDIM, Heun

pytestmark = pytest.mark.hasty

PAIR, X, EPS = pair(), normal(4, 2), two_wells(BETA)
LEVELS = {
    "reverse_drift": lambda lam: reverse_drift(BETA, EPS, X, jnp.array(0.5), lam),
    "reverse_diffusion": lambda lam: reverse_diffusion(BETA, jnp.array(0.5), lam),
    "law_gaussian": lambda lam: law_gaussian(PAIR, ZERO, lam),
    "inexact_score": lambda lam: inexact_score(PAIR, ZERO, lam),
}
WAY = jnp.array([1.0, 0.5])
CURVES = {  # contraction_curve's are in test_contraction
    "heat_curve": lambda lam: heat_curve(PAIR, WAY, lam, cells=20, steps=4),
    "inexact_curve": lambda lam: inexact_curve(PAIR, EPS, WAY, lam, cells=20, steps=4),
}
IMPOSSIBLE = (-0.1, float("nan"), float("inf"), np.float64(-1.0), jnp.array(jnp.nan))


def one_line(error: pytest.ExceptionInfo) -> str:
    """The message, which is one line."""
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_refused(name, function, lam):
    """One line that names the function and the noise level."""
    with pytest.raises(ValueError, match=f"{name}: lam must be finite and not negative") as error:
        function(lam)
    assert str(lam) in one_line(error)


@pytest.mark.parametrize("name", LEVELS)
def test_noise_levels_that_cannot_be(name):
    """Negative, infinite, nan: named, with the value; not where they are traced, and not zero or five."""
    for bad in IMPOSSIBLE:
        assert_refused(name, LEVELS[name], bad)
    found = jax.jit(lambda lam: LEVELS[name](lam))(jnp.array([-0.1, jnp.nan])[1])
    assert any(np.isnan(leaf).any() for leaf in jax.tree.leaves(found))
    for good in (0.0, 5.0, jnp.array(1.0)):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(LEVELS[name](good)))


@pytest.mark.parametrize("name", CURVES)
def test_noise_levels_of_curves(name):
    """The same for curves, which take long to compile: a traced level and a good one pass the check."""
    for bad in IMPOSSIBLE:
        assert_refused(name, CURVES[name], bad)
    assert jax.eval_shape(CURVES[name], jnp.array(jnp.nan)).ts.shape == WAY.shape
    assert jax.eval_shape(lambda: CURVES[name](5.0)).ts.shape == WAY.shape


def test_ddim_takes_no_more_noise_than_ddpm():
    """sqrt(sigma_s² - var) is nan for eta = 1.2 and a long step; the message says what takes such levels."""
    with pytest.raises(
        ValueError, match=r"DDIM: eta must be at most 1.*1\.2.*EulerMaruyama and DPMSolverPP2M"
    ) as error:
        DDIM(BETA, 1.2)
    one_line(error)
    assert DDIM(BETA, 1.0).stochastic


TS, KEY = time_grid(BETA, 4, end=0.1), jr.key(0)
PATH, NOISE = normal(5, 4, 2), normal(4, 4, 2)
ODE, SDE = DDIM(BETA, 0.0), DDIM(BETA, 1.0)
LOOPS = {
    "sample": lambda eps, ts: sample(SDE, eps, X, ts, KEY),
    "sample_parts": lambda eps, ts: list(sample_parts(SDE, eps, X, ts, KEY, size=2))[-1],
    "replay": lambda eps, ts: replay(SDE, eps, X, ts, NOISE),
    "record": lambda eps, ts: record(SDE, eps, PATH, ts),
    "invert": lambda eps, ts: invert(ODE, eps, X, ts),
    "edit": lambda eps, ts: edit(SDE, eps, eps, X, ts, KEY, latent="noise", mask=jnp.array([[1.0, 0.0]])),
}


def bare(x, t):
    return EPS(x, t)


class Network:
    """A noise prediction as a method."""

    def __init__(self, scale):
        self.scale = scale

    def eps(self, x, t):
        return self.scale * EPS(x, t)


@pytest.mark.parametrize("name", LOOPS)
def test_noise_predictions_may_be_bare_functions(name):
    """A function, a lambda, a method: what the Partial gives, traced once for each; another one gives another."""
    expected = LOOPS[name](EPS, TS)
    network = Network(1.0)
    for eps in (bare, lambda x, t: EPS(x, t), network.eps):
        assert_close(LOOPS[name](eps, TS), expected, tolerances.ROUNDING)
    other = 0.99 * TS
    with traces() as count:
        for eps in (bare, network.eps):
            LOOPS[name](eps, other)
    assert not count.total()
    assert np.abs(np.asarray(LOOPS[name](Network(1.1).eps, TS)) - np.asarray(expected)).max() > 1e-3


@pytest.mark.parametrize("name", [*LOOPS, "forward_path"])
def test_grids_that_grow_are_refused(name):
    """One line that names the function and the two times; a repeated time and a traced grid pass."""
    loops = LOOPS | {"forward_path": lambda eps, ts: forward_path(BETA, X, ts, KEY)}
    for bad in (TS[::-1], TS.at[2].set(0.99), TS.at[1].set(jnp.nan)):
        with pytest.raises(ValueError, match=f"{name}: ts must decrease, got .* and then") as error:
            loops[name](EPS, bad)
        one_line(error)
    if name == "forward_path":
        jax.jit(loops[name])(EPS, TS[::-1])
    if name in ("sample", "sample_parts"):
        repeated = TS.at[3].set(TS[2])
        assert np.isfinite(loops[name](EPS, repeated)).all()


@dataclass(frozen=True)
class Geometric:
    """A user's schedule, of no family here and unknown to JAX: alpha = 1, sigma = sqrt(low² ((high / low)^2t - 1))."""

    low: float = 0.05
    high: float = 3.0

    def log_alpha(self, t):
        return jnp.zeros_like(t)

    def alpha(self, t):
        return jnp.ones_like(t)

    def sigma(self, t):
        return self.low * jnp.sqrt(jnp.expm1(2 * t * np.log(self.high / self.low)))

    def log_snr(self, t):
        return -2 * jnp.log(self.sigma(t))

    def t_of_log_snr(self, log_snr):
        return jnp.log1p(jnp.exp(-log_snr) / self.low**2) / (2 * np.log(self.high / self.low))

    def f(self, t):
        return jnp.zeros_like(t)

    def beta(self, t):
        return 2 * np.log(self.high / self.low) * self.low**2 * (self.high / self.low) ** (2 * t)


class Plain(Geometric):
    """The same, each object for itself."""

    __eq__, __hash__ = object.__eq__, object.__hash__


class Shifted(VariancePreserving):
    """A user's variance-preserving schedule: beta = 2, by log alpha and its inverse alone."""

    def log_alpha(self, t):
        return -t

    def t_of_log_alpha(self, log_alpha):
        return -log_alpha


LAW, START = mixture_1d([0.5, 0.5], [-1.0, 1.0], [0.3, 0.3]), mixture_1d([1.0], [0.4], [0.8])
GAUSSIAN = mixture_1d([1.0], [-1.0], [0.3])
ENTRIES = {
    "noise_fn": lambda schedule: noise_fn(LAW, schedule)(X[:, :1], jnp.array(0.5)),
    "problem": lambda schedule: jax.jit(lambda p: p.marginal(p.t0))(problem(LAW, START, schedule)).variances,
    "forward_path": lambda schedule: forward_path(schedule, X, TS, KEY),
    "time_grid": lambda schedule: time_grid(schedule, 4, "log_snr", end=0.1),
    "marginal": lambda schedule: LAW.marginal(schedule, jnp.array(0.5)).variances,
    "sample": lambda schedule: sample(Heun(schedule), noise_fn(LAW, schedule), X[:, :1], TS, KEY),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_user_s_schedule_works_wherever_it_comes_first(entry):
    """A class that JAX does not know, new for every entry: what a registered one of the same values gives."""
    for base in (Geometric, Plain, Shifted):
        new = type(base.__name__, (base,), {"__eq__": base.__eq__, "__hash__": base.__hash__})
        known = jax.tree_util.register_static(type(base.__name__, (base,), {"__hash__": base.__hash__}))
        assert_close(ENTRIES[entry](new()), ENTRIES[entry](known()), tolerances.ROUNDING)


@pytest.mark.parametrize("data", [GAUSSIAN, pytest.param(LAW, marks=pytest.mark.exhaustive)], ids=["one", "two"])
def test_a_user_s_schedule_is_right(data):
    """KL falls along its reverse SDE as along that of another exploding schedule, at equal log_snr."""
    own, known, ts = Geometric(), VarianceExploding(BETA), jnp.array([1.0, 0.6, 0.2])
    snr = own.log_snr(ts)
    assert_close(own.t_of_log_snr(snr), ts, tolerances.IDENTITY)

    def curve(schedule, ts):
        if data is LAW:
            return contraction_curve(data, START, schedule, ts).kl.value
        given = problem(data, START, schedule, float(ts[0]))
        return np.array([float(gaussian_kl(law_gaussian(given, t, 1.0), given.marginal(t))) for t in ts])

    curves = curve(own, ts), curve(known, known.t_of_log_snr(snr))
    assert_close(curves[0], curves[1], tolerances.IDENTITY)
    with pytest.raises(AssertionError):
        assert_close(curves[0][1:], curves[1][:-1], 1e-3)


def test_schedules_that_cannot_be_are_named():
    """One line: no hash, as a dataclass has that is not frozen; methods that are missing."""

    class Mutable(Geometric):
        __hash__ = None

    class Half:
        def alpha(self, t):
            return t

    for call in (lambda s: noise_fn(LAW, s), lambda s: problem(LAW, START, s), lambda s: LAW.marginal(s, ZERO)):
        with pytest.raises(ValueError, match=r"Mutable.* has no hash.*frozen dataclass") as error:
            call(Mutable())
        one_line(error)
    with pytest.raises(ValueError, match=r"Half.* is not a theory.types.Schedule: it lacks log_alpha, sigma,") as error:
        as_static(Half())
    one_line(error)
    assert as_static(BETA) is BETA
