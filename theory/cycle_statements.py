"""What keeps the guarantee of Cycle-SDE: Theorem 3.3 of arXiv 2311.01410, where it holds, and where it ends.

The argument behind, for any data, solver and number of steps: x_s = F(x_t0, W) with W the recorded noise, and replay
is x~_s = F(x~_t0, W). If W is independent of x_t0, then F(x, W) has the law of x_s given x_t0 = x, the exact reverse
kernel, and an edit of x_t0 alone ends in the law of the SDE. W need not be white for that. `theory.cycles` has the
laws; the rows say which solvers, edits, masks and prompts do, and how far the others are off.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from theory.chains import Moments
from theory.checks import CYCLE, GAUSSIANS, Check, Study, at_most, equal, gaussian_problem, less
from theory.contraction import contraction_curve
from theory.cycles import (
    Edit,
    Standard,
    cycle_kl,
    cycle_limit,
    edit_of,
    gaussian_cycle,
    information,
    line_cycle,
    monotone_edit,
    recorded_noise,
    to_start,
)
from theory.divergences import gaussian_kl
from theory.gaussians import inexact_score
from theory.mixtures import GaussianMixture, gaussian, noise_fn
from theory.problems import Problem
from theory.processes import forward_path, transition
from theory.ratios import law_gaussian
from theory.solve import record, replay, time_grid
from theory.solvers import DDIM, DPMSolverPP2M, EulerMaruyama
from theory.types import Estimate, PRNGKey, Schedule, Solver, Time, Times

END = 1e-3  # where recording has to stop, above t = 0, as a part of t0
STEPS = 32
SEES_ALL = "exact score, eta = 1, an edit that reads x_0"
OTHER_LEVEL = "exact score, an edit that sees x_t0 alone, eta other than 1"


def cycle_contraction(study: Study) -> Iterator[Check]:
    """Theorem 3.3: noise that is independent of x_t0 gives Cycle-SDE the marginals of the SDE; and without it?"""
    yield from _noise(study)
    yield from _law(study)
    yield from _other_levels(study)
    yield from _edits_that_read_the_source(study)
    yield from _masks(study)
    yield from _prompts(study)
    yield from _edit_friendly()


def grid(p: Problem, steps: int, end: float = END) -> Times:
    return time_grid(p.schedule, steps, start=float(p.t0), end=end * float(p.t0))


# --- the noise ---------------------------------------------------------------------------------------------------


def _noise(study: Study) -> Iterator[Check]:
    (g, about), p = study.gaussians, study.problem
    ts, known = grid(g, STEPS), {"about": about}
    ddim, multistep = DDIM(g.schedule, 1.0), DPMSolverPP2M(g.schedule, 1.0)
    law = recorded_noise(ddim, g.target, ts)
    white, latent = off_diagonal(law)
    yield at_most(
        "Recorded noise is white: DDIM(1), Gaussian data, any number of steps",
        "Cor(w_i, w_j) = 0",
        np.abs(white).max(),
        0.0,
        1e-11,
        **known,
    )
    yield at_most(
        "It is independent of the latent it is recorded from",
        "Cor(w_i, x_t0) = 0",
        np.abs(latent).max(),
        0.0,
        1e-11,
        **known,
    )
    laws = PathLaws.of(g.target, g.schedule, ts)
    expected = (1 + laws.v0 * laws.snr[1:]) / (1 + laws.v0 * laws.snr[:-1])
    variances = np.diag(law.covariance)[:-1]
    worst = np.argmax(np.abs(variances / expected - 1))
    yield equal(
        "Its variance is above 1, by what the mean of a step leaves open (the worst step)",
        "Var(w) = (1 + V0 snr_s) / (1 + V0 snr_t)",
        variances[worst],
        expected[worst],
        1e-9,
        **known,
    )
    yield at_most(
        "For any data it has mean zero given x_t, so it is not correlated with itself nor with the latent",
        "E[w | x_t] = 0",
        np.max(np.abs(np.subtract(*_means_of_a_step(p, jr.key(0))))),
        0.0,
        1e-12,
    )
    white, latent = off_diagonal(recorded_noise(multistep, g.target, ts))
    yield at_most(
        "That of DPM-Solver++(2M) SDE is independent of the latent as well, at any number of steps",
        "Cor(w_i, x_t0) = 0",
        np.abs(latent).max(),
        0.0,
        1e-11,
        **known,
    )
    yield equal(
        "but is not white: what it extrapolates correlates it with the step before",
        "max |Cor(w_i, w_{i+1})|, closed form",
        np.abs(np.diag(white, 1)).max(),
        np.abs(laws.lag_one_of_multistep()).max(),
        1e-8,
        **known,
    )
    for solver in (DDIM(g.schedule, 0.5), EulerMaruyama(g.schedule, 1.0)):
        _, latent = off_diagonal(recorded_noise(solver, g.target, ts))
        expected = laws.latent_correlations(laws.slopes(solver))
        yield equal(
            f"That of {_name(solver)} is correlated with the latent ({STEPS} steps, the largest)",
            "max |Cor(w_i, x_t0)|, closed form",
            np.abs(latent).max(),
            np.abs(expected).max(),
            1e-8,
            **known,
        )


class PathLaws:
    """What the forward path of Gaussian data on the line has at the times of a grid, in NumPy and by hand.

    alpha, sigma, snr and V at the times; regression = Cov(x_s, x_t) / V_t and left = Var(x_s | x_t) for every step.
    """

    def __init__(self, alpha, sigma, f, beta, ts, v0):
        self.alpha, self.sigma, self.f, self.beta, self.ts, self.v0 = alpha, sigma, f, beta, ts, v0
        self.snr = (alpha / sigma) ** 2
        self.V = alpha**2 * v0 + sigma**2
        forward = alpha[:-1] / alpha[1:]
        fresh = sigma[:-1] ** 2 * (1 - self.snr[:-1] / self.snr[1:])  # of the forward transition
        self.regression = forward * self.V[1:] / self.V[:-1]
        self.left = self.V[1:] * fresh / self.V[:-1]
        self.to_latent = alpha[0] / alpha * np.sqrt(self.V / self.V[0])  # Cor(x_t, x_t0)

    @classmethod
    def of(cls, data: GaussianMixture, schedule: Schedule, ts: Times) -> "PathLaws":
        alpha, sigma, f, beta = jax.device_get(_scales(schedule, ts))
        return cls(alpha, sigma, f, beta, np.asarray(ts), data.variances.item())

    def slopes(self, solver: Solver) -> np.ndarray:
        """d mean / d x of every step of a one-step solver, from its published formula."""
        alpha, sigma, V, v0 = self.alpha, self.sigma, self.V, self.v0
        if isinstance(solver, DDIM):
            var = (solver.eta * sigma[1:]) ** 2 * (1 - self.snr[:-1] / self.snr[1:])
            clean, noise = alpha[:-1] * v0 / V[:-1], sigma[:-1] / V[:-1]  # slopes of E[x_0 | x_t] and E[eps | x_t]
            return alpha[1:] * clean + np.sqrt(sigma[1:] ** 2 - var) * noise
        assert isinstance(solver, EulerMaruyama)
        drift = self.f + (1 + solver.lam**2) / 2 * self.beta / V
        return 1 + drift[:-1] * np.diff(self.ts)

    def latent_correlations(self, slopes: np.ndarray) -> np.ndarray:
        """Cor(w_i, x_t0): w is x_s - slope x_t up to constants, and E[x_s | x_t, x_t0] = regression x_t + constant."""
        bias = (self.regression - slopes) * np.sqrt(self.V[:-1])
        return bias * self.to_latent[:-1] / np.sqrt(self.left + bias**2)

    def lag_one_of_multistep(self) -> np.ndarray:
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


def off_diagonal(law: Moments) -> tuple[Float[np.ndarray, "steps steps"], Float[np.ndarray, " steps"]]:
    """Correlations of the noise among itself, with 0 on the diagonal, and with the latent; d = 1."""
    found = correlation(law.covariance)
    np.fill_diagonal(found, 0.0)
    return found[:-1, :-1], found[-1, :-1]


def correlation(covariance: Float[Array, "n n"]) -> Float[np.ndarray, "n n"]:
    """Correlation matrix of a covariance matrix."""
    scale = 1 / np.sqrt(np.diag(covariance))
    return np.asarray(covariance) * scale[:, None] * scale


def _name(solver: Solver) -> str:
    return f"{type(solver).__name__}({getattr(solver, 'eta', getattr(solver, 'lam', 0)):g})"


@jax.jit
def _means_of_a_step(p: Problem, key: PRNGKey) -> tuple[Float[Array, "50 d"], Float[Array, "50 d"]]:
    """E[x_s | x_t] by DDIM and by the reverse kernel, at 50 draws of the start."""
    t, s = 0.6 * p.t0, 0.5 * p.t0
    x = p.start.sample(key, (50,))
    q, _ = DDIM(p.schedule, eta=1.0).kernel(noise_fn(p.target, p.schedule), x, t, s, ())
    return q.mean, jax.vmap(lambda x: p.target.reverse_kernel(p.schedule, x, t, s).mean())(x)


# --- the law, where the theorem holds ----------------------------------------------------------------------------


def _law(study: Study) -> Iterator[Check]:
    (g, about), p = study.gaussians, study.problem
    for solver, steps in (
        (DDIM(g.schedule, 1.0), 5),
        (DDIM(g.schedule, 1.0), STEPS),
        (DPMSolverPP2M(g.schedule, 1.0), 5),
    ):
        ts = grid(g, steps)
        yield equal(
            f"Gaussian data, {steps} steps of {_name(solver)}: the law of the exact SDE, no discretisation bias",
            "KL(p~_s | p_s), Cycle = SDE",
            cycle_kl(gaussian_cycle(solver, g.target, ts, to_start(g)), g.schedule, g.target, ts)[-1],
            inexact_score(g, ts[-1], 1.0).kl(),
            1e-8,
            about=about,
            assumes=CYCLE,
        )
    if study.on_line:
        ends = jax.device_put(float(p.t0) * np.array([1.0, 0.75]))
        yield equal(
            "On the mixture the exact law tends to that of the SDE (at 3/4 t0, from 8 and 16 steps)",
            "KL(p~_s | p_s), Cycle -> SDE",
            cycle_extrapolated(p),
            contraction_curve(p.target, p.start, p.schedule, ends).kl.value[-1],
            1e-2,
            assumes=CYCLE,
        )
        found, expected = cycle_by_sampling(p)
        yield equal(
            "Cycle-SDE on the mixture ends in the modes as the SDE does (20000 draws, 150 steps)",
            "P(top mode), Cycle = SDE",
            Estimate(found.value, 4 * found.error),
            expected,
            0.05,
            assumes=CYCLE,
        )


def cycle_extrapolated(p: Problem) -> Estimate:
    """KL at 3/4 t0 from 8 and 16 steps of DDIM(1), whose errors are of first order.

    The error is what the two differ by, what twice the spacing of the offsets changes, and the mass that is lost.
    """
    coarse, fine, apart = (_cycle_end(p, steps, spacing) for steps, spacing in ((8, 1.0), (16, 1.0), (16, 2.0)))
    error = abs(fine.value - coarse.value) + abs(fine.value - apart.value) + coarse.error + fine.error
    return Estimate(2 * fine.value - coarse.value, error)


def _cycle_end(p: Problem, steps: int, spacing: float) -> Estimate:
    """KL at 3/4 t0, and what is amiss with the mass there; above 1e-4 nothing is known."""
    ts = np.pad(grid(p, steps, end=0.75), (0, 16 - steps), mode="edge")  # one length, one program
    laws = line_cycle(
        DDIM(p.schedule, 1.0), p, jax.device_put(ts), monotone_edit(p), panels=32, offsets=128, spacing=spacing
    )
    lost = jnp.abs(laws.rule.weights[-1] @ jnp.abs(laws.edited[-1]) - 1)
    return Estimate(laws.kl()[-1], jnp.where(lost < 1e-4, lost, jnp.inf))


@partial(jax.jit, static_argnames=("independent", "particles", "steps"))
def _top_mode(
    p: Problem, key: PRNGKey, independent: bool, particles: int, steps: int
) -> tuple[Float[Array, " draws"], Float[Array, ""]]:
    """P(top mode) at the end of every draw of Cycle-SDE, and its mean by the SDE."""
    solver, eps_fn = DDIM(p.schedule, eta=1.0), noise_fn(p.target, p.schedule)
    ts = jnp.linspace(1.0, END, steps + 1) * p.t0
    data_key, path_key = jr.split(key)
    x = p.marginal(ts[-1]).sample(data_key, (particles,))
    path = forward_path(p.schedule, x, ts, path_key)
    if independent:
        noised = jax.vmap(lambda t: transition(p.schedule, x, ts[-1], t))(ts[:-1])
        anew = noised.mean + jax.vmap(jnp.multiply)(noised.std, jr.normal(path_key, noised.mean.shape))
        path = jnp.concatenate([anew, x[None]])
    latent = monotone_edit(p)(path[0][:, 0])[:, None]
    end = replay(solver, eps_fn, latent, ts, record(solver, eps_fn, path, ts))[-1]
    top = jnp.argmax(p.target.means[:, 0])
    weights, z = _hermite(80)
    y = p.start.means[:, None] + jnp.sqrt(p.start.variances)[:, None] * z[None, :, None]
    by_sde = p.start.weights[:, None] * weights[None] * p.marginal(p.t0).responsibilities(y)[top]
    return p.marginal(ts[-1]).responsibilities(end)[top], by_sde.sum()


def cycle_by_sampling(p: Problem, independent: bool = False, particles: int = 20_000) -> tuple[Estimate, float]:
    """P(top mode) by 150 steps of Cycle-SDE, with its standard error, and by the SDE; the edit is the monotone one.

    `independent` noises the data anew for every time, as "edit-friendly" inversion does.
    """
    member, expected = jax.device_get(_top_mode(p, jr.key(0), independent, particles, 150))
    return Estimate(member.mean(), member.std() / np.sqrt(particles)), float(expected)


def _hermite(points: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights and nodes of E[F(z)], z ~ N(0, 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    return weights / np.sqrt(2 * np.pi), nodes


# --- where it ends: other noise levels ---------------------------------------------------------------------------


def _other_levels(study: Study) -> Iterator[Check]:
    g, about = study.gaussians
    ts = grid(g, STEPS)
    for lam in (0.5, 2.0):
        kl = cycle_limit(g.target, g.schedule, ts, healed_half_way(g, ts, lam), lam).kl()
        yield less(
            f"Counter-example, eta = {lam:g} in continuous time: an edit of x_t0 whose KL is 0 on the way, and grows",
            "KL(s) = 0 < KL(0)",
            kl[STEPS // 2],
            kl[-1],
            about=about,
            assumes=OTHER_LEVEL,
        )
    solver = DDIM(g.schedule, 0.5)
    laws = PathLaws.of(g.target, g.schedule, ts)
    shrunk = np.cumprod(laws.slopes(solver)) * np.sqrt(laws.V[0] / laws.V[1:])
    half = STEPS // 2
    edit = edit_of(Standard(1 - 2 * laws.to_latent[half] / shrunk[half - 1]), g.target, g.schedule, ts)
    kl = cycle_kl(gaussian_cycle(solver, g.target, ts, edit), g.schedule, g.target, ts)
    yield less(
        f"The same with {STEPS} steps of DDIM(0.5)",
        "KL(s) = 0 < KL(0)",
        kl[half],
        kl[-1],
        about=about,
        assumes=OTHER_LEVEL,
    )


def healed_half_way(g: Problem, ts: Times, lam: float) -> Standard:
    """The edit that stretches x_t0 about its mean so that KL is 0 in the middle of the grid, in continuous time.

    r - 1 = l (c - 1) [2 k + l (c - 1)] is 0 for c = 1 - 2 k / l = 1 - 2 k^(1 - lam²), and is so at one time only.
    """
    laws = PathLaws.of(g.target, g.schedule, ts)
    return Standard(1 - 2 * laws.to_latent[len(ts) // 2] ** (1 - lam**2))


# --- where it ends: edits that see more than x_t0 ----------------------------------------------------------------


def reads_the_source(g: Problem, ts: Times, source: float) -> Standard:
    """An edit that reads x_0 and leaves the law of x_t0 as it is: y~ = c y_t0 + source y_0."""
    Cor = PathLaws.of(g.target, g.schedule, ts).to_latent[-1]
    return Standard(np.sqrt(1 - source**2 * (1 - Cor**2)) - source * Cor, source)


def _edits_that_read_the_source(study: Study) -> Iterator[Check]:
    g, about = study.gaussians
    ts, known = grid(g, STEPS), {"about": about, "assumes": SEES_ALL}
    source = 0.6
    standard = reads_the_source(g, ts, source)
    edit = edit_of(standard, g.target, g.schedule, ts)
    kl = cycle_kl(gaussian_cycle(DDIM(g.schedule, 1.0), g.target, ts, edit), g.schedule, g.target, ts)
    rho = PathLaws.of(g.target, g.schedule, ts).to_latent[-1] ** 2
    excess = 2 * source * np.sqrt(rho) * (1 - rho)
    yield equal(
        "An edit that reads x_0 and leaves the law of the latent right ends in a wrong law",
        "KL = (x - log(1 + x)) / 2, x = 2 k sqrt(ρ) (1 - ρ)",
        kl[-1],
        (excess - np.log1p(excess)) / 2,
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
        np.max(np.asarray(kl - kl[0] - information(g.target, g.schedule, ts, standard))),
        0.0,
        1e-12,
        **known,
    )


# The built-in Gaussian of the plane, of which a mask keeps the first coordinate.
CORRELATION = 0.8


def in_plane(correlation: float = CORRELATION) -> GaussianMixture:
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


KEEP_FIRST = np.array([0.0, 1.0])


def masked_kl(data: GaussianMixture, schedule: Schedule, ts: Times, edit: Edit) -> tuple[Moments, np.ndarray]:
    """The laws, and KL at every time, where the first coordinate is kept."""
    laws = gaussian_cycle(DDIM(schedule, 1.0), data, ts, edit, mask=jnp.asarray(KEEP_FIRST))
    return laws, np.asarray(cycle_kl(laws, schedule, data, ts))


def _masks(study: Study) -> Iterator[Check]:
    g = gaussian_problem()
    ts, known = grid(g, STEPS), {"about": GAUSSIANS, "assumes": "exact score, eta = 1, a mask"}
    data = in_plane()
    laws, kl = masked_kl(data, g.schedule, ts, redrawn(data, g.schedule, g.t0))
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
        _conditional_kl(laws, data.marginal(g.schedule, ts[-1])),
        1e-8,
        **known,
    )
    apart = in_plane(0.0)
    shifted = Edit(0.5 * jnp.eye(2), jnp.zeros((2, 2)), jnp.zeros((2, 2)), jnp.ones(2))
    _, kl = masked_kl(apart, g.schedule, ts, shifted)
    second, marginal = gaussian([-1.0], [[0.25]]), apart.marginal(g.schedule, g.t0)
    start = gaussian([0.5 * float(marginal.means[0, 1]) + 1.0], [[0.25 * float(marginal.covariances[0, 1, 1])]])
    yield equal(
        "Where what is kept is independent of the rest, the rest has the law of the SDE: no harm",
        "KL(p~_s | p_s), Cycle = SDE",
        kl[-1],
        inexact_score(Problem(second, start, g.schedule, g.t0), ts[-1], 1.0).kl(),
        1e-8,
        **known,
    )


def _conditional_kl(laws: Moments, right: GaussianMixture) -> float:
    """E KL(x~² | x¹ || x² | x¹) at the end, over the law of what is kept, by regression."""
    mean, C = (np.asarray(leaf[-1]) for leaf in laws)
    m, D = np.asarray(right.means[0]), np.asarray(right.covariances[0])
    slope, expected = C[1, 0] / C[0, 0], D[1, 0] / D[0, 0]
    ratio = (C[1, 1] - slope * C[0, 1]) / (D[1, 1] - expected * D[0, 1])
    gap = mean[1] - m[1] - expected * (mean[0] - m[0])
    squared = gap**2 + (slope - expected) ** 2 * C[0, 0]
    return float(squared / (D[1, 1] - expected * D[0, 1]) + ratio - 1 - np.log(ratio)) / 2


# --- another prompt ----------------------------------------------------------------------------------------------


def _prompts(study: Study) -> Iterator[Check]:
    g = gaussian_problem()
    solver, known = DDIM(g.schedule, 1.0), {"about": GAUSSIANS, "assumes": "exact scores of both prompts, eta = 1"}
    unchanged = Edit(jnp.eye(1), jnp.zeros((1, 1)), jnp.zeros((1, 1)), jnp.zeros(1))
    ts = grid(g, STEPS)

    def kl(prompt: GaussianMixture, ts: Times) -> float:
        laws = gaussian_cycle(solver, g.target, ts, unchanged, prompt)
        return float(cycle_kl(laws, g.schedule, prompt, ts)[-1])

    moved = gaussian([-0.7], [[0.04]])
    yield equal(
        "Replayed with a prompt of the same covariance, the latent ends in the law of the prompt's SDE, at any number",
        "KL(p~_s | prompt), Cycle = SDE",
        kl(moved, ts),
        prompt_sde_kl(g, moved, ts[-1]),
        1e-8,
        **known,
    )
    wider = gaussian([-0.7], [[0.09]])
    mean, variance = prompt_moments(g, wider, ts)
    p_end = wider.marginal(g.schedule, ts[-1])
    yield equal(
        "With one of another covariance, noise of variance above 1 makes an error, which has a closed form",
        "V~_s = c² V~_t + Var(x_s | x_t)",
        kl(wider, ts),
        gaussian_kl(gaussian([mean], [[variance]]), p_end),
        1e-8,
        **known,
    )
    right = law_gaussian(Problem(wider, g.marginal(g.t0), g.schedule, g.t0), ts[-1], 1.0).variances.item()
    errors = [prompt_moments(g, wider, grid(g, n))[1] - right for n in (500, 1000)]
    yield equal(
        "It is of first order: with many steps Cycle-SDE has the law of the prompt's SDE (measured order)",
        "Var(x~_s) = Var by the SDE + O(1/N)",
        np.log2(errors[0] / errors[1]),
        1.0,
        0.1,
        **known,
    )


def prompt_sde_kl(g: Problem, prompt: GaussianMixture, s: Time) -> float:
    """KL to the prompt's law at s, of the prompt's SDE started from the source's law."""
    given = Problem(prompt, g.marginal(g.t0), g.schedule, g.t0)
    return float(gaussian_kl(law_gaussian(given, s, 1.0), given.marginal(s)))


def prompt_moments(g: Problem, prompt: GaussianMixture, ts: Times) -> tuple[float, float]:
    """Mean and variance at the end of DDIM(1), by hand: a step has the prompt's slope, and adds the data's variance."""
    data, goal = (PathLaws.of(law, g.schedule, ts) for law in (g.target, prompt))
    gap, variance = data.alpha[0] * (g.target.means.item() - prompt.means.item()), data.V[0]
    for slope, left in zip(goal.regression, data.left, strict=True):
        gap, variance = slope * gap, slope**2 * variance + left
    return goal.alpha[-1] * prompt.means.item() + gap, variance


# --- another way to record ---------------------------------------------------------------------------------------


def _edit_friendly() -> Iterator[Check]:
    g = gaussian_problem()
    white, _ = off_diagonal(recorded_noise(DDIM(g.schedule, 1.0), g.target, grid(g, 64), independent=True))
    yield equal(
        'Counter-example: "edit-friendly" noise, drawn independently for each t, is not white',
        "Cor(w_i, w_{i+1}) -> -1/2",
        np.diag(white, 1)[len(white) // 2],
        -0.5,
        0.02,
        about=GAUSSIANS,
    )
