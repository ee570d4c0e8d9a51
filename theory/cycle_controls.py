"""False statements about Cycle-SDE: each must be caught, the near misses too; `lie` says by how much it is false."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np

from theory.checks import CYCLE, GAUSSIANS, Check, Study, at_most, equal, gaussian_problem, paper_problem
from theory.cycle_statements import (
    cycle_by_sampling,
    grid,
    healed_half_way,
    in_plane,
    masked_kl,
    off_diagonal,
    prompt_sde_kl,
    reads_the_source,
    redrawn,
)
from theory.cycles import Edit, cycle_kl, edit_of, gaussian_cycle, recorded_noise, to_start
from theory.gaussians import inexact_score
from theory.mixtures import gaussian, noise_fn
from theory.processes import forward_path
from theory.solve import sample
from theory.solvers import DDIM, DPMSolverPP2M, EulerMaruyama
from theory.types import Solver

STEPS = 32


def _white(solver: Solver, statement: str, independent: bool = False, **more: str) -> Check:
    """Largest correlation of recorded noise among itself and with the latent, said to be 0."""
    g = gaussian_problem()
    white, latent = off_diagonal(recorded_noise(solver, g.target, grid(g, STEPS), independent))
    worst = max(np.abs(white).max(), np.abs(latent).max())
    lie = f"{worst:.2g} is no 0"
    return at_most(statement, "Cor(w_i, w_j) = Cor(w_i, x_t0) = 0", worst, 0.0, 1e-11, about=GAUSSIANS, lie=lie, **more)


def edit_friendly_is_white(study: Study) -> Check:
    solver = DDIM(gaussian_problem().schedule, 1.0)
    return _white(solver, 'Noise drawn independently for each t ("edit-friendly") is white', independent=True)


def noise_of_ddim_with_less_is_white(study: Study) -> Check:
    return _white(DDIM(gaussian_problem().schedule, 0.99), "Recorded noise is white: DDIM(0.99)")


def noise_of_euler_maruyama_is_white(study: Study) -> Check:
    return _white(EulerMaruyama(gaussian_problem().schedule, 1.0), "Recorded noise is white: Euler-Maruyama")


def noise_of_dpm_solver_is_white(study: Study) -> Check:
    return _white(DPMSolverPP2M(gaussian_problem().schedule, 1.0), "Recorded noise is white: DPM-Solver++(2M) SDE")


def edit_friendly_has_the_law_of_the_sde(study: Study) -> Check:
    # On the toy, not on Gaussian data: there the edited law depends on (x_0, x_t0) alone, and the statement is true.
    found, expected = cycle_by_sampling(paper_problem(), independent=True)
    return equal(
        '"Edit-friendly" noise ends in the modes as the SDE does',
        "P(top mode)",
        found.value,
        expected,
        4 * float(found.error) / expected,
        lie=f"{found.value:.3f} is no {expected:.3f}",
    )


def recorded_noise_has_unit_variance(study: Study) -> Check:
    g = gaussian_problem()
    variances = np.diag(recorded_noise(DDIM(g.schedule, 1.0), g.target, grid(g, 64)).covariance)[:-1]
    found = float(variances[len(variances) // 2])
    lie = f"{found - 1:.1%} too little"
    return equal(
        "Recorded noise has unit variance at 64 steps", "Var(w) = 1", found, 1.0, 1e-9, about=GAUSSIANS, lie=lie
    )


def fresh_noise_reconstructs(study: Study) -> Check:
    p = study.problem
    ts = grid(p, 64)
    x = p.target.sample(jr.key(0), (20,))
    latent = forward_path(p.schedule, x, ts, jr.key(1))[0]
    back = sample(DDIM(p.schedule, 1.0), noise_fn(p.target, p.schedule), latent, ts, jr.key(2))
    worst = float(np.abs(np.subtract(back, x)).max())
    return at_most(
        "The SDE returns the source without recorded noise", "x~_0 = x_0", worst, 0.0, lie=f"it is {worst:.2g} away"
    )


def cycle_sde_heals_at_half_the_noise(study: Study) -> Check:
    g = gaussian_problem()
    ts, solver = grid(g, STEPS), DDIM(g.schedule, 0.5)
    edit = edit_of(healed_half_way(g, ts, 0.5), g.target, g.schedule, ts)
    kl = cycle_kl(gaussian_cycle(solver, g.target, ts, edit), g.schedule, g.target, ts)
    grown = float(np.max(np.diff(kl)))
    return at_most(
        "Theorem 3.3 for eta = 0.5: KL never grows",
        "max [KL(s) - KL(t)] <= 0, s < t",
        grown,
        0.0,
        about=GAUSSIANS,
        lie=f"KL grows by {grown:.1g} in one step",
    )


def cycle_sde_has_the_law_of_the_sde_at_half_the_noise(study: Study) -> Check:
    g = gaussian_problem()
    ts = grid(g, STEPS)
    laws = gaussian_cycle(DDIM(g.schedule, 0.5), g.target, ts, to_start(g))
    found, expected = float(cycle_kl(laws, g.schedule, g.target, ts)[-1]), float(inexact_score(g, ts[-1], 0.5).kl())
    return equal(
        "Theorem 3.3 for eta = 0.5: Cycle-SDE has the law of the lambda-SDE of its own level",
        "KL(p~_s | p_s), Cycle = λ-SDE",
        found,
        expected,
        1e-2,
        about=GAUSSIANS,
        lie=f"off by {found / expected - 1:.1%}",
    )


def an_edit_may_read_the_source(study: Study) -> Check:
    g = gaussian_problem()
    ts = grid(g, STEPS)
    edit = edit_of(reads_the_source(g, ts, 0.01), g.target, g.schedule, ts)
    kl = cycle_kl(gaussian_cycle(DDIM(g.schedule, 1.0), g.target, ts, edit), g.schedule, g.target, ts)
    return at_most(
        "Theorem 3.3 for an edit that reads x_0, one part in a hundred",
        "KL(0) <= KL(t0) = 0",
        kl[-1],
        kl[0],
        about=GAUSSIANS,
        lie=f"KL grows to {float(kl[-1]):.1g}",
    )


def a_mask_keeps_the_guarantee(study: Study) -> Check:
    g, data = gaussian_problem(), in_plane()
    ts = grid(g, STEPS)
    _, kl = masked_kl(data, g.schedule, ts, redrawn(data, g.schedule, g.t0))
    return at_most(
        "Theorem 3.3 for what a mask leaves free",
        "KL(0) <= KL(t0) = 0",
        kl[-1],
        kl[0],
        about=GAUSSIANS,
        lie=f"KL grows to {kl[-1]:.1g}",
    )


def a_prompt_keeps_the_law_at_few_steps(study: Study) -> Check:
    g, prompt = gaussian_problem(), gaussian([-0.7], [[0.0404]])
    ts = grid(g, STEPS)
    unchanged = Edit(jnp.eye(1), jnp.zeros((1, 1)), jnp.zeros((1, 1)), jnp.zeros(1))
    laws = gaussian_cycle(DDIM(g.schedule, 1.0), g.target, ts, unchanged, prompt)
    found, expected = float(cycle_kl(laws, g.schedule, prompt, ts)[-1]), prompt_sde_kl(g, prompt, ts[-1])
    return equal(
        "With a prompt whose variance is 1 % larger, too, no number of steps makes an error",
        "KL(p~_s | prompt), Cycle = SDE",
        found,
        expected,
        1e-8,
        about=GAUSSIANS,
        assumes="exact scores of both prompts, eta = 1",
        lie=f"off by {found / expected - 1:.1g} of it",
    )


def a_start_off_by_a_millionth_is_not_seen(study: Study) -> Check:
    g = gaussian_problem()
    ts, edit = grid(g, STEPS), to_start(g)
    laws = gaussian_cycle(DDIM(g.schedule, 1.0), g.target, ts, edit._replace(shift=edit.shift + 1e-6))
    return equal(
        "Cycle-SDE from a start that is off by 1e-6 has the law of the SDE",
        "KL(p~_s | p_s), Cycle = SDE",
        cycle_kl(laws, g.schedule, g.target, ts)[-1],
        inexact_score(g, ts[-1], 1.0).kl(),
        1e-8,
        about=GAUSSIANS,
        assumes=CYCLE,
        lie="the mean of the start is 1e-6 away",
    )
