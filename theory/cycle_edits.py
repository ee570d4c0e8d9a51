"""Where the guarantee of Cycle-SDE ends, as checks: edits that see more than x_t0, masks, another prompt."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from theory.chains import Moments
from theory.checks import GAUSSIANS, Check, Study, at_most, equal, less
from theory.cycle_closed_forms import (
    information,
    prompt_kl,
    prompt_moments,
    prompt_sde_kl,
    prompt_sde_law,
    reading_kl,
    reads_the_source,
)
from theory.cycle_noise import STEPS
from theory.cycles import Edit, GaussianCycle, Standard, gaussian_cycle, grid
from theory.gaussians import inexact_score
from theory.mixtures import GaussianMixture, gaussian
from theory.problems import Problem
from theory.solvers import DDIM
from theory.types import Schedule, Time, Times

SEES_ALL = "exact score, eta = 1, an edit that reads x_0"


def edits_that_read_the_source(study: Study) -> Iterator[Check]:
    """KL grows after an edit that reads x_0, at most by what the edited latent tells of the noise."""
    (g, about), source = study.gaussians, 0.6
    ts, known = grid(g, STEPS), {"about": about, "assumes": SEES_ALL}
    edit = reads_the_source(g, ts, source)
    kl = np.asarray(gaussian_cycle(DDIM(g.schedule, 1.0), g.target, ts, edit).kl)
    yield equal(
        "An edit that reads x_0 and leaves the law of the latent right ends in a wrong law",
        "KL = (x - log(1 + x)) / 2, x = 2 k sqrt(ρ) (1 - ρ)",
        kl[-1],
        reading_kl(g, ts, source),
        1e-6,
        **known,
    )
    yield less(
        "Counter-example: its KL grows from 0, whatever the number of steps",
        "KL(t0) = 0 < KL(0)",
        kl[0],
        kl[-1],
        **known,
    )
    yield at_most(
        "KL exceeds that of the start at most by what the edited latent tells of the noise",
        "KL(s) <= KL(t0) + I(x~_t0; W)",
        np.max(kl - kl[0] - information(g.target, g.schedule, ts, edit)),
        0.0,
        1e-12,
        **known,
    )


# --- masks -------------------------------------------------------------------------------------------------------


def in_plane(correlation: float = 0.8) -> GaussianMixture:
    """The built-in Gaussian of the plane, of which a mask keeps the first coordinate."""
    return gaussian([0.5, -1.0], 0.25 * np.array([[1.0, correlation], [correlation, 1.0]]))


@jax.jit
def redrawn(data: GaussianMixture, schedule: Schedule, t0: Time) -> Edit:
    """Draws the second coordinate of x_t0 anew, given the first one: the law of the latent stays as it is."""
    law = data.marginal(schedule, t0)
    mean, C, zero = law.means[0], law.covariances[0], jnp.zeros((2, 2))
    slope = C[1, 0] / C[0, 0]
    latent = zero.at[0, 0].set(1.0).at[1, 0].set(slope)
    noise = zero.at[1, 1].set(jnp.sqrt(C[1, 1] - slope * C[0, 1]))
    return Edit(latent, zero, noise, jnp.zeros(2).at[1].set(mean[1] - slope * mean[0]))


def masked_cycle(data: GaussianMixture, schedule: Schedule, ts: Times, edit: Edit) -> GaussianCycle:
    """DDIM(1) in the plane, where the first coordinate is kept."""
    return gaussian_cycle(DDIM(schedule, 1.0), data, ts, edit, mask=jax.device_put(np.array([0.0, 1.0])))


def masks(study: Study) -> Iterator[Check]:
    """A mask keeps the guarantee where what it keeps is independent of the rest."""
    # The study's pair is on the line, where there is nothing to keep: its schedule and t0 are left.
    p, data = study.problem, in_plane()
    ts, known = grid(p, STEPS), {"about": GAUSSIANS, "assumes": "exact score, eta = 1, a mask"}
    laws, _, kl = jax.device_get(masked_cycle(data, p.schedule, ts, redrawn(data, p.schedule, p.t0)))
    yield less(
        "Counter-example: what a mask keeps is not what the SDE would have done, and KL grows from 0",
        "KL(t0) = 0 < KL(0)",
        kl[0],
        kl[-1],
        **known,
    )
    yield equal(
        "What is kept has the right law: all of the KL is that of the rest given what is kept",
        "KL(x~) = E KL(x~² | x¹)",
        kl[-1],
        _conditional_kl(laws, jax.device_get(data.marginal(p.schedule, ts[-1]))),
        1e-8,
        **known,
    )
    apart, half = in_plane(0.0), 0.5 * np.eye(2)
    edit = Edit(*map(jax.device_put, (half, 0 * half, 0 * half, np.ones(2))))
    kl = np.asarray(masked_cycle(apart, p.schedule, ts, edit).kl)
    second = gaussian(apart.means[0, 1:], apart.covariances[0, 1:, 1:])
    marginal = jax.device_get(second.marginal(p.schedule, p.t0))
    start = gaussian(0.5 * marginal.means[0] + 1.0, 0.25 * marginal.variances)
    yield equal(
        "Where what is kept is independent of the rest, the rest has the law of the SDE: no harm",
        "KL(p~_s | p_s), Cycle = SDE",
        kl[-1],
        inexact_score(Problem(second, start, p.schedule, p.t0), ts[-1], 1.0).kl(),
        1e-8,
        **known,
    )


def _conditional_kl(laws: Moments, right: GaussianMixture) -> float:
    """E KL(x~² | x¹ || x² | x¹) at the end, over the law of what is kept, by regression."""
    mean, C = laws.mean[-1], laws.covariance[-1]
    m, D = right.means[0], (right.axes[0] * right.variances[0]) @ right.axes[0].T
    slope, expected = C[1, 0] / C[0, 0], D[1, 0] / D[0, 0]
    left = D[1, 1] - expected * D[0, 1]
    excess = (C[1, 1] - slope * C[0, 1] - left) / left
    gap = mean[1] - m[1] - expected * (mean[0] - m[0])
    squared = gap**2 + (slope - expected) ** 2 * C[0, 0]
    return float(squared / left + excess - np.log1p(excess)) / 2


# --- another prompt ----------------------------------------------------------------------------------------------


def another(data: GaussianMixture, wider: float = 1.0) -> GaussianMixture:
    """A prompt whose law is ten standard deviations below that of the data, and has a multiple of its variance."""
    mean, variance = data.means.item(), data.variances.item()
    return gaussian([mean - 10 * np.sqrt(variance)], [[wider * variance]])


def prompts(study: Study) -> Iterator[Check]:
    """Another prompt on the way back: no harm where it has the data's covariance, nor with many steps."""
    (g, about), nothing = study.gaussians, Standard(1.0)
    solver, known = DDIM(g.schedule, 1.0), {"about": about, "assumes": "exact scores of both prompts, eta = 1"}
    ts, moved, wider = grid(g, STEPS), another(g.target), another(g.target, 2.25)
    yield equal(
        "Replayed with a prompt of the same covariance, the latent ends in the law of the prompt's SDE, at any number",
        "KL(p~_s | prompt), Cycle = SDE",
        np.asarray(gaussian_cycle(solver, g.target, ts, nothing, moved).kl)[-1],
        prompt_sde_kl(g, moved, ts[-1]),
        1e-8,
        **known,
    )
    yield equal(
        "With one of another covariance, noise of variance above 1 makes an error, which has a closed form",
        "V~_s = c² V~_t + Var(x_s | x_t)",
        np.asarray(gaussian_cycle(solver, g.target, ts, nothing, wider).kl)[-1],
        prompt_kl(g, wider, ts),
        1e-8,
        **known,
    )
    right = prompt_sde_law(g, wider, ts[-1]).variances.item()
    errors = [prompt_moments(g, wider, grid(g, n))[1] - right for n in (500, 1000)]
    yield equal(
        "It is of first order: with many steps Cycle-SDE has the law of the prompt's SDE (measured order)",
        "Var(x~_s) = Var by the SDE + O(1/N)",
        np.log2(errors[0] / errors[1]),
        1.0,
        0.1,
        **known,
    )
