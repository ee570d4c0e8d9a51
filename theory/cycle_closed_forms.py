"""Cycle-SDE for Gaussian data on the line by hand, in NumPy: what its exact laws are compared with.

y = (x - m) / sqrt(V) are the standardised states, of which `theory.cycles.Standard` is an edit.
"""

import jax
import numpy as np
from jaxtyping import Float

from theory.cycles import Standard
from theory.divergences import gaussian_kl
from theory.gaussians import Offset
from theory.mixtures import GaussianMixture
from theory.problems import Problem
from theory.ratios import law_gaussian
from theory.solvers import DDIM, EulerMaruyama
from theory.types import Schedule, Solver, Time, Times

Values = Float[np.ndarray, " times"]
Steps = Float[np.ndarray, " steps"]


class PathLaws:
    """What the forward path of Gaussian data on the line has at the times of a grid.

    alpha, sigma, snr, the mean m and the variance V at the times, and to_latent = Cor(x_t, x_t0); regression =
    Cov(x_s, x_t) / V_t and left = Var(x_s | x_t) for every step.
    """

    def __init__(self, data: GaussianMixture, schedule: Schedule, ts: Times):
        self.ts, self.v0 = np.asarray(ts), data.variances.item()
        self.alpha, self.sigma, self.f, self.beta = jax.device_get(_scales(schedule, ts))
        self.snr = (self.alpha / self.sigma) ** 2
        self.m, self.V = self.alpha * data.means.item(), self.alpha**2 * self.v0 + self.sigma**2
        forward = self.alpha[:-1] / self.alpha[1:]
        fresh = self.sigma[:-1] ** 2 * (1 - self.snr[:-1] / self.snr[1:])  # of the forward transition
        self.regression = forward * self.V[1:] / self.V[:-1]
        self.left = self.V[1:] * fresh / self.V[:-1]
        self.to_latent = self.alpha[0] / self.alpha * np.sqrt(self.V / self.V[0])

    def noise_variances(self) -> Steps:
        """Var(w) of DDIM(1), which is above 1 by what the mean of a step leaves open."""
        return (1 + self.v0 * self.snr[1:]) / (1 + self.v0 * self.snr[:-1])

    def slopes(self, solver: Solver) -> Steps:
        """d mean / d x of every step of a one-step solver, from its published formula."""
        alpha, sigma, V, v0 = self.alpha, self.sigma, self.V, self.v0
        if isinstance(solver, DDIM):
            var = (solver.eta * sigma[1:]) ** 2 * (1 - self.snr[:-1] / self.snr[1:])
            clean, noise = alpha[:-1] * v0 / V[:-1], sigma[:-1] / V[:-1]  # slopes of E[x_0 | x_t] and E[eps | x_t]
            return alpha[1:] * clean + np.sqrt(sigma[1:] ** 2 - var) * noise
        assert isinstance(solver, EulerMaruyama)
        drift = self.f + (1 + solver.lam**2) / 2 * self.beta / V
        return 1 + drift[:-1] * np.diff(self.ts)

    def latent_correlations(self, solver: Solver) -> Steps:
        """Cor(w_i, x_t0): w is x_s - slope x_t up to constants, and E[x_s | x_t, x_t0] = regression x_t + constant."""
        bias = (self.regression - self.slopes(solver)) * np.sqrt(self.V[:-1])
        return bias * self.to_latent[:-1] / np.sqrt(self.left + bias**2)

    def lag_one_of_multistep(self) -> Float[np.ndarray, " steps_1"]:
        """Cor(w_i, w_{i+1}) for DPM-Solver++(2M) SDE.

        Its first order is DDIM(1); what is extrapolated, E[x_0 | x_t] - E[x_0 | x_last], is the last innovation
        x_t - E[x_t | x_last] times alpha_t V_0 / V_t: with i_k the innovations, std w_k = i_k - theta_k i_{k-1}.
        """
        h = np.diff(np.log(self.snr)) / 2
        clean = self.alpha * self.v0 / self.V
        theta = np.zeros(len(h))
        theta[1:] = self.alpha[2:] * -np.expm1(-2 * h[1:]) * h[1:] / h[:-1] / 2 * clean[1:-1]
        variances = self.left.copy()
        variances[1:] += theta[1:] ** 2 * self.left[:-1]
        return -theta[1:] * self.left[:-1] / np.sqrt(variances[1:] * variances[:-1])


@jax.jit
def _scales(schedule: Schedule, ts: Times) -> tuple[Times, Times, Times, Times]:
    return schedule.alpha(ts), schedule.sigma(ts), schedule.f(ts), schedule.beta(ts)


# --- in continuous time ------------------------------------------------------------------------------------------


def cycle_limit(
    data: GaussianMixture, schedule: Schedule, ts: Times, edit: Standard, lam: float | Time = 1.0
) -> Offset:
    """The law of x~_s in continuous time at every time of a grid, by its moments, each (times,); Gaussian data, d = 1.

    y~_s = y_s + l (y~_t0 - y_t0) with l = k^(lam²) and k = Cor(x_s, x_t0): the replayed noise is that of y_s, and what
    two states differ by shrinks as the lambda-SDE's mean does. So e = l shift, and with j = Cor(x_s, x_0)

        r = 1 + 2 l [(latent - 1) k + source j] + l² [(latent - 1)² + source² + 2 (latent - 1) source Cor + noise²].

    At lam = 1 this is r - 1 = k² (r_t0 - 1) + 2 source Cor (1 - k²): without source the contraction of the SDE.
    """
    k = PathLaws(data, schedule, ts).to_latent
    j = k[-1] / k
    shrunk, moved = k ** (lam**2), edit.latent - 1.0
    cross = 2 * shrunk * (moved * k + edit.source * j)
    square = moved**2 + edit.source**2 + 2 * moved * edit.source * k[-1] + edit.noise**2
    return Offset(shrunk * edit.shift, 1 + cross + shrunk**2 * square)


def information(data: GaussianMixture, schedule: Schedule, ts: Times, edit: Standard) -> Values:
    """I(x~_t0; W) = -1/2 log(1 - Cor(x~_t0, x_s - G x_t0)²), W the noise from t0 to s; Gaussian data, lam = 1, d = 1.

    Of x_s the noise makes x_s - G x_t0, and nothing else of it is in x_0 and so in the edit. 0 without source.
    """
    k = PathLaws(data, schedule, ts).to_latent
    j, Cor = k[-1] / k, k[-1]
    variance = edit.latent**2 + edit.source**2 + 2 * edit.latent * edit.source * Cor + edit.noise**2
    return -np.log1p(-((edit.source * j) ** 2) * (1 - k**2) / variance) / 2


# --- edits -------------------------------------------------------------------------------------------------------


def healed_half_way(g: Problem, ts: Times, process: float | DDIM) -> Standard:
    """The edit that stretches x_t0 about its mean so that KL is 0 in the middle of the grid.

    r - 1 = l (c - 1) [2 k + l (c - 1)] is 0 for c = 1 - 2 k / l, and is so at one time only. l is what is left there
    of a difference of standardised states: k^(lam²) in continuous time at a noise level, the product of the slopes
    for the steps of a solver.
    """
    laws, half = PathLaws(g.target, g.schedule, ts), len(ts) // 2
    k = laws.to_latent[half]
    if isinstance(process, DDIM):
        left = np.prod(laws.slopes(process)[:half]) * np.sqrt(laws.V[0] / laws.V[half])
    else:
        left = k ** (process**2)
    return Standard(1 - 2 * k / left)


def reads_the_source(g: Problem, ts: Times, source: float) -> Standard:
    """An edit that reads x_0 and leaves the law of x_t0 as it is: y~ = c y_t0 + source y_0."""
    Cor = PathLaws(g.target, g.schedule, ts).to_latent[-1]
    return Standard(np.sqrt(1 - source**2 * (1 - Cor**2)) - source * Cor, source)


def reading_kl(g: Problem, ts: Times, source: float) -> float:
    """KL at the end of DDIM(1) after `reads_the_source`, at any number of steps: r - 1 = 2 source sqrt(ρ) (1 - ρ)."""
    rho = PathLaws(g.target, g.schedule, ts).to_latent[-1] ** 2
    return _kl(0.0, 2 * source * np.sqrt(rho) * (1 - rho))


# --- another prompt ----------------------------------------------------------------------------------------------


def prompt_sde_law(g: Problem, prompt: GaussianMixture, s: Time) -> GaussianMixture:
    """The law at s of the prompt's SDE, started from the source's law at t0."""
    return law_gaussian(Problem(prompt, g.marginal(g.t0), g.schedule, g.t0), s, 1.0)


def prompt_sde_kl(g: Problem, prompt: GaussianMixture, s: Time) -> float:
    """KL of that law to the prompt's at s."""
    return float(gaussian_kl(prompt_sde_law(g, prompt, s), prompt.marginal(g.schedule, s)))


def prompt_moments(g: Problem, prompt: GaussianMixture, ts: Times) -> tuple[float, float]:
    """Mean and variance at the end of DDIM(1): a step has the prompt's slope, and adds the data's variance."""
    data, goal = (PathLaws(law, g.schedule, ts) for law in (g.target, prompt))
    gap, variance = data.m[0] - goal.m[0], data.V[0]
    for slope, left in zip(goal.regression, data.left, strict=True):
        gap, variance = slope * gap, slope**2 * variance + left
    return goal.m[-1] + gap, variance


def prompt_kl(g: Problem, prompt: GaussianMixture, ts: Times) -> float:
    """KL to the prompt's law at the end of DDIM(1)."""
    mean, variance = prompt_moments(g, prompt, ts)
    goal = PathLaws(prompt, g.schedule, ts)
    return _kl((mean - goal.m[-1]) / np.sqrt(goal.V[-1]), variance / goal.V[-1] - 1)


def _kl(e: float, excess: float) -> float:
    """1/2 [e² + r - 1 - log r] for r = 1 + excess."""
    return float(e**2 + excess - np.log1p(excess)) / 2
