"""The loops: sampling is replaying its own noise, recording is undone by replaying, nothing compiles twice."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.tree_util import Partial

from tests import tolerances
from tests.cases import DETERMINISTIC, SCHEDULES, STOCHASTIC, assert_close, normal, two_wells
from theory.compilations import traces
from theory.processes import forward_path
from theory.schedules import LinearVP, ScaledLinearVP
from theory.solve import Constraint, invert, record, replay, sample, sample_parts, time_grid, unit_noise
from theory.solvers import DDIM, DPMSolverPP2M, EulerMaruyama, Heun

pytestmark = pytest.mark.hasty

SCHEDULE = LinearVP(0.1, 10.0)
SOLVERS = STOCHASTIC | DETERMINISTIC
EPS = two_wells(SCHEDULE)
X = normal(4, 2)
stochastic = pytest.mark.parametrize("name", STOCHASTIC)


@pytest.mark.parametrize("name", ["DDIM(1.0)", "DPMSolverPP2M(0.5)", "Heun"])
def test_sample_replays_its_own_noise(name):
    """sample(key) == replay(unit_noise(key))[-1]; with other noise only an ODE solver ends at the same point."""
    solver, ts = SOLVERS[name](SCHEDULE), time_grid(SCHEDULE, 6)
    end = sample(solver, EPS, X, ts, jr.key(1))
    path = np.asarray(replay(solver, EPS, X, ts, unit_noise(jr.key(1), X, ts)))
    assert path.shape == (7, 4, 2)
    np.testing.assert_array_equal(path[0], X)
    assert_close(end, path[-1], tolerances.ROUNDING)
    other = np.asarray(replay(solver, EPS, X, ts, normal(6, 4, 2)))[-1]
    assert (np.abs(end - other).max() > 0.1) == solver.stochastic


@pytest.mark.parametrize(("name", "size"), [("DDIM(1.0)", 100), ("DPMSolverPP2M(0.5)", 4)])
def test_parts_of_a_sampling(name, size):
    """Every part is a point of the whole path, to the last, with a constraint too; all lengths share one program."""
    solver, made = SOLVERS[name](SCHEDULE), []
    for steps in (6, 9):
        ts = time_grid(SCHEDULE, steps)
        constraint = Constraint(jnp.array([[1.0, 0.0]]), normal(steps + 1, 4, 2))
        with traces() as count:
            parts = list(sample_parts(solver, EPS, X, ts, jr.key(1), constraint, size=size))
        made.append(count["_advance"])
        path = np.asarray(replay(solver, EPS, X, ts, unit_noise(jr.key(1), X, ts), constraint))
        places = [min(i, steps) for i in range(size, steps + size, size)]
        assert_close(np.stack(parts), path[places], tolerances.ROUNDING)
    assert made == [1, 0]


def test_a_step_of_no_length_is_left_out():
    """Where a time is repeated nothing happens. A solver that took the step would divide 0 by 0 there."""
    solver = DPMSolverPP2M(SCHEDULE, 0.0)
    ts = time_grid(SCHEDULE, 5)
    repeated = jnp.asarray(np.pad(ts, (0, 2), mode="edge"))
    end = sample(solver, EPS, X, ts, jr.key(0))
    np.testing.assert_array_equal(sample(solver, EPS, X, repeated, jr.key(0)), end)
    taken = replay(solver, EPS, X, repeated, normal(7, 4, 2))
    assert np.isnan(taken[-1]).any() and not np.isnan(taken[5]).any()


def test_unit_noise_is_white():
    """Independent unit normals in every step and entry, within standard errors; steps do not share noise."""
    ts = jnp.linspace(1, 0, 5)
    noise = np.asarray(unit_noise(jr.key(3), jnp.zeros(10_000), ts))
    error = tolerances.STANDARD_ERRORS / 10_000**0.5
    assert np.abs(noise.mean(1)).max() < error
    assert np.abs(np.cov(noise) - np.eye(4)).max() < 2**0.5 * error
    twice = np.cov(noise[[0, 0]])  # negative control: noise used twice
    assert np.abs(twice - np.eye(2)).max() > 2**0.5 * error


def reconstruction_errors(solver, steps, dtype):
    """Largest error of the replayed path, relative to the path; and when one recorded number is off by 0.01."""
    ts = time_grid(SCHEDULE, steps, end=1e-3).astype(dtype)
    path = forward_path(SCHEDULE, X.astype(dtype), ts, jr.key(4))
    noise = record(solver, EPS, path, ts)
    assert path.dtype == noise.dtype == dtype and noise.shape == (steps, 4, 2)
    off = np.zeros(noise.shape, dtype)
    off[0, 0, 0] = 0.01
    for given in (noise, jnp.asarray(np.asarray(noise) + off)):
        back = np.asarray(replay(solver, EPS, path[0], ts, given))
        yield np.abs(back - path).max() / np.abs(path).max()


@pytest.mark.parametrize("steps", [100, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (10, 1000))])
@stochastic
def test_replay_undoes_record(name, steps):
    """The whole path comes back in float64 and in float32, for one-step and two-step solvers."""
    solver = STOCHASTIC[name](SCHEDULE)
    error, disturbed = reconstruction_errors(solver, steps, jnp.float64)
    assert error <= tolerances.RECONSTRUCTION_64 < disturbed
    error, disturbed = reconstruction_errors(solver, steps, jnp.float32)
    assert error <= tolerances.RECONSTRUCTION_32 < disturbed


@pytest.mark.parametrize("name", ["DDIM(1.0)", "DPMSolverPP2M(1.0)"])
def test_record_in_batches(name):
    """batch_size changes how many predictions are made at once, not the noise; another path has other noise."""
    solver, ts = STOCHASTIC[name](SCHEDULE), time_grid(SCHEDULE, 7, end=0.01)
    path = normal(8, 4, 2)
    noise = record(solver, EPS, path, ts)
    for batch_size in (3, 7) if name == "DDIM(1.0)" else (3,):
        assert_close(record(solver, EPS, path, ts, batch_size=batch_size), noise, tolerances.ROUNDING)
    assert np.abs(record(solver, EPS, path + 0.01, ts) - noise).max() > 1e-3


def test_recorded_noise_of_a_sampled_path_is_the_noise_that_made_it():
    """record is also a left inverse: the noise of a replayed path, not only of a forward path."""
    solver, ts = DPMSolverPP2M(SCHEDULE, 1.0), time_grid(SCHEDULE, 20, end=0.01)
    noise = normal(20, 4, 2)
    assert_close(record(solver, EPS, replay(solver, EPS, X, ts, noise), ts), noise, tolerances.IDENTITY)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_record_refuses_ode_solvers(name):
    """std = 0 at every step: w would be 0/0."""
    ts = time_grid(SCHEDULE, 3, end=0.1)
    with pytest.raises(ValueError, match=r"step 0 from t = 1 to 0\.7 has no noise"):
        record(DETERMINISTIC[name](SCHEDULE), EPS, normal(4, 4, 2), ts)


def test_record_refuses_a_grid_that_ends_at_the_data():
    """DDIM and DPM-Solver++ have std = 0 into t = 0, and the step is named; Euler-Maruyama has noise there."""
    ts = time_grid(SCHEDULE, 4)
    path = normal(5, 4, 2)
    for solver in (DDIM(SCHEDULE, 1.0), DPMSolverPP2M(SCHEDULE, 1.0)):
        with pytest.raises(ValueError, match=r"step 3 from t = 0\.25 to 0 has no noise"):
            record(solver, EPS, path, ts)
    assert np.all(np.isfinite(record(EulerMaruyama(SCHEDULE, 1.0), EPS, path, ts)))


def test_invert_refuses_sde_solvers():
    """Steps of an SDE solver have no meaning upwards; the message names the solver."""
    with pytest.raises(ValueError, match=r"DDIM.*stochastic"):
        invert(DDIM(SCHEDULE, 1.0), EPS, X, time_grid(SCHEDULE, 4))


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_invert_solves_up_the_grid(name):
    """path[-1] is x, path[0] the latent; solving the ODE back approaches x as the grid is refined."""
    solver = DETERMINISTIC[name](SCHEDULE)
    errors = []
    for steps in (20, 40):
        ts = time_grid(SCHEDULE, steps, end=0.05)
        path = invert(solver, EPS, X, ts)
        np.testing.assert_array_equal(path[-1], X)
        back = replay(solver, EPS, path[0], ts, jnp.zeros((steps, 4, 2)))
        errors.append(np.abs(np.asarray(back)[-1] - X).max())
    assert errors[1] < 0.7 * errors[0] < 0.3


@pytest.mark.parametrize("name", ["DDIM(1.0)", "EulerMaruyama(0.5)", "DPMSolverPP2M(1.0)", "Heun"])
def test_constraint_keeps_masked_values_exactly(name):
    """Where the mask is 0 every time of the path is the reference, bit by bit; elsewhere, and without it, not."""
    solver, ts = SOLVERS[name](SCHEDULE), time_grid(SCHEDULE, 5, end=0.01)
    reference = np.asarray(normal(6, 4, 2))
    noise = normal(5, 4, 2)
    free = np.asarray(replay(solver, EPS, X, ts, noise))
    for mask in (np.array([[1.0, 0.0]] * 4), np.array([[0.0] * 2, [1.0] * 2] * 2)):
        path = np.asarray(replay(solver, EPS, X, ts, noise, Constraint(jnp.asarray(mask), jnp.asarray(reference))))
        kept = np.broadcast_to(mask == 0, path[1:].shape)
        np.testing.assert_array_equal(path[1:][kept], reference[1:][kept])
        assert np.all(path[1:][~kept] != reference[1:][~kept])
        assert np.all(free[1:][kept] != reference[1:][kept])


def test_constraint_broadcasts_and_samples():
    """A mask of one row serves the batch, in sample as in replay."""
    solver, ts, mask = DDIM(SCHEDULE, 1.0), time_grid(SCHEDULE, 5), jnp.array([[1.0, 0.0]])
    constraint = Constraint(mask, normal(6, 4, 2))
    end = np.asarray(sample(solver, EPS, X, ts, jr.key(8), constraint))
    path = np.asarray(replay(solver, EPS, X, ts, unit_noise(jr.key(8), X, ts), constraint))
    assert_close(end, path[-1], tolerances.ROUNDING)
    np.testing.assert_array_equal(end[:, 1], np.asarray(constraint.path)[-1, :, 1])


@pytest.mark.parametrize("loop", [sample, replay, record])
def test_one_trace(loop):
    """Three sets of mixture parameters, noise, grids and points compile once; another solver compiles again."""
    traced = []

    def counted(eps_fn, x, t):
        traced.append(loop)
        return eps_fn(x, t)

    def run(solver, seed):
        key = jr.key(seed)
        eps, x = Partial(counted, two_wells(SCHEDULE, 0.5 + seed, 0.1 + seed)), X + seed
        ts = time_grid(SCHEDULE, 5, end=0.01 * (1 + seed))
        if loop is sample:
            return sample(solver, eps, x, ts, key)
        if loop is replay:
            return replay(solver, eps, x, ts, normal(5, 4, 2) + seed)
        return record(solver, eps, normal(6, 4, 2) + seed, ts)

    results = [run(DDIM(SCHEDULE, 1.0), 0)]
    once = len(traced)
    results += [run(DDIM(SCHEDULE, 1.0), seed) for seed in (1, 2)]
    assert once >= 1 and len(traced) == once
    assert np.abs(results[0] - results[1]).max() > 0.01  # the parameters are not baked in
    run(DDIM(SCHEDULE, 0.5), 0)
    assert len(traced) == 2 * once


SD = ScaledLinearVP()


@pytest.mark.parametrize("steps", [1, 7, 20, 30, 50])
@pytest.mark.parametrize(("spacing", "offset"), [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)])
def test_time_grid_has_the_timesteps_of_diffusers(spacing, offset, steps):
    """t = (k + 1) / 1000 for diffusers' timesteps k, then 0; an offset of one timestep is told apart."""
    import diffusers

    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    scheduler.set_timesteps(steps)
    expected = (scheduler.timesteps.numpy() + 1) / 1000
    ts = time_grid(SD, steps, spacing, offset=offset)
    assert_close(ts, [*expected, 0.0], tolerances.ROUNDING)
    with pytest.raises(AssertionError):
        assert_close(ts, [*(expected + 1e-3), 0.0], tolerances.ROUNDING)


@pytest.mark.parametrize("strength", [0.35, 0.6, 1.0])
def test_time_grid_of_image_to_image(strength):
    """diffusers' image-to-image pipelines keep the last strength * steps timesteps; so does `start` on the grid."""
    import diffusers

    scheduler = diffusers.DDIMScheduler(timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(20)
    kept = scheduler.timesteps.numpy()[20 - int(20 * strength) :]
    ts = time_grid(SD, 20, "leading", offset=1, start=float(kept[0] + 1) / 1000)
    assert_close(ts, [*(kept + 1) / 1000, 0.0], tolerances.ROUNDING)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_time_grid_spacings(schedule):
    """uniform is uniform in t, log_snr in log_snr and not in t; both meet their ends exactly and decrease."""
    uniform = time_grid(schedule, 8, start=0.9, end=0.1)
    log_snr = time_grid(schedule, 8, "log_snr", start=0.9, end=0.1)
    assert_close(np.diff(uniform), np.full(8, -0.1), tolerances.ROUNDING)
    steps = np.diff(jax.jit(schedule.log_snr)(log_snr))
    assert_close(steps, np.full(8, steps[0]), tolerances.IDENTITY)
    assert np.ptp(np.diff(log_snr)) > 1e-2
    for ts in (uniform, log_snr):
        assert ts[0] == 0.9 and ts[-1] == 0.1 and np.all(np.diff(ts) < 0)


@pytest.mark.parametrize(
    ("schedule", "arguments", "match"),
    [
        (SD, {"steps": 0}, "steps=0"),
        (SD, {"steps": 5, "start": 1.1}, "start=1.1"),
        (SD, {"steps": 5, "end": -0.1}, "end=-0.1"),
        (SD, {"steps": 5, "start": 0.2, "end": 0.2}, "end=0.2"),
        (SD, {"steps": 5, "spacing": "log_snr"}, "log_snr is infinite"),
        (SCHEDULE, {"steps": 5, "spacing": "leading"}, "leading.*DiscreteVP"),
        (SD, {"steps": 5, "spacing": "leading", "start": 1e-3, "end": 0.5e-3, "offset": 1}, "no timestep"),
        (SD, {"steps": 1001, "spacing": "leading"}, "1001 steps.*1000"),
        (SD, {"steps": 1001, "spacing": "trailing"}, "1001 steps.*1000"),
    ],
)
def test_time_grid_errors(schedule, arguments, match):
    """ValueError naming what does not fit."""
    with pytest.raises(ValueError, match=match):
        time_grid(schedule, **arguments)


def test_unknown_spacing():
    """The message lists the spacings; time_grid is unwrapped since the type checker of the tests comes first."""
    plain = time_grid
    while hasattr(plain, "__wrapped__"):
        plain = plain.__wrapped__
    with pytest.raises(ValueError, match=r"'cosine'.*uniform, log_snr, leading, trailing, linspace"):
        plain(SCHEDULE, 5, "cosine")


def test_heun_is_accepted_by_every_loop_but_record():
    """An ODE solver needs no noise: sample does not depend on the key."""
    ts = time_grid(SCHEDULE, 5)
    np.testing.assert_array_equal(*(sample(Heun(SCHEDULE), EPS, X, ts, jr.key(i)) for i in range(2)))
