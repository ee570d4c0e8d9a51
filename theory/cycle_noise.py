"""Which recorded noise is independent of the latent it is recorded from: what Theorem 3.3 needs, as checks."""

from collections.abc import Iterator

import jax
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from theory.checks import Check, Study, at_most, equal
from theory.cycle_closed_forms import PathLaws
from theory.cycles import grid, off_diagonal, recorded_noise
from theory.mixtures import noise_fn
from theory.problems import Problem
from theory.solvers import DDIM, DPMSolverPP2M, EulerMaruyama
from theory.types import PRNGKey, Solver

STEPS = 32


def noise(study: Study) -> Iterator[Check]:
    """DDIM(1) records white noise, DPM-Solver++(2M) SDE such as is independent of the latent, the others neither."""
    g, about = study.gaussians
    ts, known = grid(g, STEPS), {"about": about}
    ddim, multistep = DDIM(g.schedule, 1.0), DPMSolverPP2M(g.schedule, 1.0)
    law, laws = recorded_noise(ddim, g.target, ts), PathLaws(g.target, g.schedule, ts)
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
    variances, expected = np.diag(law.covariance)[:-1], laws.noise_variances()
    worst = np.argmax(np.abs(variances / expected - 1))
    yield equal(
        "Its variance is above 1, by what the mean of a step leaves open (the worst step)",
        "Var(w) = (1 + V0 snr_s) / (1 + V0 snr_t)",
        variances[worst],
        expected[worst],
        1e-9,
        **known,
    )
    # of the study's pair, whatever that is
    yield at_most(
        "For any data it has mean zero given x_t, so it is not correlated with itself nor with the latent",
        "E[w | x_t] = 0",
        np.max(np.abs(np.subtract(*_means_of_a_step(study.problem, jr.key(0))))),
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
        yield equal(
            f"That of {name_of(solver)} is correlated with the latent ({STEPS} steps, the largest)",
            "max |Cor(w_i, x_t0)|, closed form",
            np.abs(latent).max(),
            np.abs(laws.latent_correlations(solver)).max(),
            1e-8,
            **known,
        )


def another_way_to_record(study: Study) -> Iterator[Check]:
    """Data noised independently for each time, from which "edit-friendly" inversion records."""
    g, about = study.gaussians
    white, _ = off_diagonal(recorded_noise(DDIM(g.schedule, 1.0), g.target, grid(g, STEPS), independent=True))
    yield equal(
        'Counter-example: "edit-friendly" noise, drawn independently for each t, is not white',
        "Cor(w_i, w_{i+1}) -> -1/2",
        np.diag(white, 1)[STEPS // 2],
        -0.5,
        0.02,
        about=about,
    )


def name_of(solver: Solver) -> str:
    """Method and noise level."""
    return f"{type(solver).__name__}({getattr(solver, 'eta', getattr(solver, 'lam', 0)):g})"


@jax.jit
def _means_of_a_step(p: Problem, key: PRNGKey) -> tuple[Float[Array, "50 d"], Float[Array, "50 d"]]:
    """E[x_s | x_t] by DDIM and by the reverse kernel, at 50 draws of the start."""
    t, s = 0.6 * p.t0, 0.5 * p.t0
    x = p.start.sample(key, (50,))
    q, _ = DDIM(p.schedule, eta=1.0).kernel(noise_fn(p.target, p.schedule), x, t, s, ())
    return q.mean, jax.vmap(lambda x: p.target.reverse_kernel(p.schedule, x, t, s).mean())(x)
