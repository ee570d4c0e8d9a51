"""The laws of Cycle-SDE with finitely many steps on Gaussian data, exactly: what Theorem 3.3 needs, where it ends.

Record and replay in one line: of two states under the same noise the solver's standard deviation cancels,

    x~_s = x_s + mean(x~_t) - mean(x_t),

whatever the edit, the prompt of the way back (then the first mean is its own) or the noise level. x is the forward
path, whose law p_s is right at any number of steps. With W the recorded noise, x_s = F(x_t0, W), x~_s = F(x~_t0, W).

What it needs   W independent of x_t0. Then F(x, W) has the law of x_s given x_t0 = x, and an edit of x_t0 alone ends in
                the law of the exact SDE, for any data, solver and number of steps. W need not be white.
Who has it      With the exact score in continuous time, eta = 1: W is the Brownian motion of the reverse SDE. With
                finitely many steps and Gaussian data: DDIM(1), whose mean is E[x_s | x_t], and DPM-Solver++(2M) SDE,
                which adds multiples of E[x_0 | x_t] - E[x_0 | x_last] to it. For other data the noise of both is not
                correlated with any function of x_t0, which is less. At another noise level nobody, on Gaussian data.
More than that  An edit that knows of W has KL(p~_s | p_s) <= KL(p~_t0 | p_t0) + I(x~_t0; W), by data processing.
                Another prompt needs W to be white and of variance 1, too, and then has the law of its own SDE: in
                continuous time. A mask replaces what the SDE would have done by what the source did.

For Gaussian data everything is an affine function of unit normals, and a law is a mean and a covariance. Mixtures on
the line are in `theory.line_cycles`, closed forms in `theory.cycle_closed_forms`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from theory.chains import Moments
from theory.mixtures import GaussianMixture, noise_fn
from theory.problems import Problem
from theory.processes import driven_path
from theory.solve import Constraint, record, replay, time_grid
from theory.types import Path, Schedule, Solver, Time, Times

Scalar = Float[Array, ""]
Number = float | Scalar | Float[np.ndarray, ""]

END = 1e-3  # where recording stops, above t = 0, as a part of t0


def grid(p: Problem, steps: int, end: float = END, length: int = 0) -> Times:
    """A uniform grid from t0 to end t0; steps of no length fill it up to `length` steps, so that programs are shared.

    What such steps record is not a number, nor is what is replayed after them.
    """
    ts = time_grid(p.schedule, steps, start=float(p.t0), end=end * float(p.t0))
    return jax.device_put(np.pad(ts, (0, max(length - steps, 0)), mode="edge"))


class Edit(NamedTuple):
    """An affine edit x~_t0 = latent x_t0 + source x_0 + noise z + shift, z ~ N(0, I) independent of all else.

    Theorem 3.3 wants source = 0. x_0 stands at the end of the grid.
    """

    latent: Float[Array, "d d"]
    source: Float[Array, "d d"]
    noise: Float[Array, "d d"]
    shift: Float[Array, " d"]

    def __call__(self, latent, source, noise):
        return self.latent @ latent + self.source @ source + self.noise @ noise + self.shift


class Standard(NamedTuple):
    """The same on the line for the standardised y = (x - m) / sqrt(V): latent y_t0 + source y_0 + noise z + shift.

    It leaves the law of the latent right where shift = 0 and latent² + source² + noise² + 2 latent source Cor = 1, with
    Cor that of x_0 and x_t0. Standard(1) edits nothing.
    """

    latent: Number
    source: Number = 0.0
    noise: Number = 0.0
    shift: Number = 0.0

    def of(self, data: GaussianMixture, schedule: Schedule, ts: Times) -> Edit:
        """The edit of x itself, for Gaussian data on the line; x_0 stands at ts[-1]."""
        (m, std), (m_0, std_0) = (_standard(data.marginal(schedule, t)) for t in (ts[0], ts[-1]))
        gain = self.source * std / std_0
        latent, source, noise = (jnp.reshape(a, (1, 1)) for a in (self.latent, gain, self.noise * std))
        return Edit(latent, source, noise, (m + self.shift * std - self.latent * m - gain * m_0)[None])


def _standard(law: GaussianMixture) -> tuple[Scalar, Scalar]:
    return law.means[0, 0], jnp.sqrt(law.variances[0, 0])


@jax.jit
def to_start(g: Problem) -> Standard:
    """The edit of x_t0 alone that turns the Gaussian marginal into the Gaussian start, d = 1."""
    (m, std), (mean, edited) = _standard(g.marginal(g.t0)), _standard(g.start)
    zero = jnp.zeros(())
    return Standard(edited / std, zero, zero, (mean - m) / std)


class GaussianCycle(NamedTuple):
    """Cycle-SDE on Gaussian data: joint laws, and KL(p~_s | p_s), p_s the marginal of the data, or of the prompt."""

    laws: Moments  # of (x~_s, x_s), one after the other, at every time of the grid: (times, 2 d)
    noise: Moments  # of (w_1, ..., w_N, x_t0), the noise of Eq. (8) and the latent, each of them (d,)
    kl: Float[Array, " times"]


def gaussian_cycle(
    solver: Solver,
    data: GaussianMixture,
    ts: Times,
    edit: Edit | Standard,
    prompt: GaussianMixture | None = None,
    mask: Float[Array, " d"] | None = None,
    independent: bool | Bool[Array, ""] = False,
) -> GaussianCycle:
    """Record, edit, replay for Gaussian data: any solver that is stochastic, any d; ts[-1] > 0.

    `prompt` is what the score of the way back describes, by default the data. Where the mask is 0, x~ is set to x at
    every time, the first included (`theory.solve.Constraint`). `independent` noises x_0 anew for every time, as
    "edit-friendly" inversion does (Huberman-Spiegelglas et al., arXiv 2304.06140).
    """
    # of one type whatever was given, numbers or arrays: one program for all edits, and for all prompts
    edit = jax.tree.map(lambda a: jnp.asarray(a, float), edit)
    return _gaussian_cycle(solver, data, ts, edit, data if prompt is None else prompt, mask, independent)


@jax.jit
def _gaussian_cycle(
    solver: Solver,
    data: GaussianMixture,
    ts: Times,
    edit: Edit | Standard,
    prompt: GaussianMixture,
    mask: Float[Array, " d"] | None,
    independent: bool | Bool[Array, ""],
) -> GaussianCycle:
    affine = edit.of(data, solver.schedule, ts) if isinstance(edit, Standard) else edit

    def run(z: Float[Array, "normals d"]) -> tuple[Float[Array, "times both"], Float[Array, " n"]]:
        path = _path(data, solver.schedule, ts, z[1:], independent)
        noise = record(solver, noise_fn(data, solver.schedule), path, ts)
        constraint = None if mask is None else Constraint(mask, path)
        x = affine(path[0], path[-1], z[0])
        x = x if constraint is None else constraint.apply(x, path[0])
        back = replay(solver, noise_fn(prompt, solver.schedule), x, ts, noise, constraint)
        return jnp.concatenate([back, path], axis=1), jnp.concatenate([noise, path[:1]]).ravel()

    # An affine function is known by its values at 0 and at the unit vectors.
    size = (len(ts) + 2) * data.dim
    units = jnp.concatenate([jnp.zeros((1, size)), jnp.eye(size)]).reshape(size + 1, -1, data.dim)
    laws, noise = map(_affine_law, jax.vmap(run)(units))
    return GaussianCycle(laws, noise, _kl(laws, solver.schedule, prompt, ts))


def _path(data: GaussianMixture, schedule: Schedule, ts: Times, z: Float[Array, "normals d"], independent) -> Path:
    """The forward path of Gaussian data from unit normals, the last of which makes x_0; or x_0 noised for each time."""
    x0 = data.means[0] + data.axes[0] @ (jnp.sqrt(data.variances[0]) * z[-1])
    along = driven_path(schedule, x0, jnp.append(ts, 0.0), z[:-1])[:-1]
    anew = schedule.alpha(ts)[:, None] * x0[None] + schedule.sigma(ts)[:, None] * z[:-1]
    return jnp.where(independent, anew, along)


def _affine_law(values: Float[Array, "normals_1 *times n"]) -> Moments:
    """The law of an affine function of unit normals from its values at 0 and at the unit vectors."""
    mean = values[0]
    root = jnp.moveaxis(values[1:] - mean[None], 0, -1)
    return Moments(mean, root @ jnp.swapaxes(root, -1, -2))


def _kl(laws: Moments, schedule: Schedule, right: GaussianMixture, ts: Times) -> Float[Array, " times"]:
    """KL(p~_s | p_s) at every time; `right` is the law p_0."""

    def at(law: Moments, s: Time) -> Scalar:
        p, d = right.marginal(schedule, s), right.dim
        whiten = (p.axes[0] / jnp.sqrt(p.variances[0])[None]).T
        gap = whiten @ (law.mean[:d] - p.means[0])
        # KL is of second order in what R differs from I by: the difference first, then its logarithm.
        excess = jnp.linalg.eigvalsh(whiten @ law.covariance[:d, :d] @ whiten.T - jnp.eye(d))
        return (gap @ gap + jnp.sum(excess - jnp.log1p(excess))) / 2

    return jax.vmap(at)(laws, ts)


def recorded_noise(
    solver: Solver, data: GaussianMixture, ts: Times, independent: bool | Bool[Array, ""] = False
) -> Moments:
    """The joint law of (w_1, ..., w_N, x_t0) for Gaussian data on the line: whatever the edit."""
    return gaussian_cycle(solver, data, ts, Standard(1.0), independent=independent).noise


def correlation(covariance: Float[Array, "n n"]) -> Float[np.ndarray, "n n"]:
    """Correlation matrix of a covariance matrix."""
    scale = 1 / np.sqrt(np.diag(covariance))
    return np.asarray(covariance) * scale[:, None] * scale


def off_diagonal(noise: Moments) -> tuple[Float[np.ndarray, "steps steps"], Float[np.ndarray, " steps"]]:
    """Correlations of the noise among itself, with 0 on the diagonal, and with the latent; d = 1."""
    found = correlation(noise.covariance)
    np.fill_diagonal(found, 0.0)
    return found[:-1, :-1], found[-1, :-1]
