"""False statements about Cycle-SDE: each must be caught, the near misses too; `lie` says by how much it is false."""

from typing import Any

import jax
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from theory.checks import CYCLE, GAUSSIANS, Check, Study, at_most, equal, paper_problem
from theory.cycle_closed_forms import healed_half_way, prompt_sde_law, reads_the_source
from theory.cycle_edits import another, in_plane, masked_cycle, redrawn
from theory.cycle_laws import top_mode
from theory.cycle_noise import STEPS
from theory.cycles import Standard, gaussian_cycle, grid, off_diagonal, recorded_noise, to_start
from theory.gaussians import inexact_score
from theory.mixtures import noise_fn
from theory.processes import forward_path
from theory.solve import sample
from theory.solvers import DDIM, DPMSolverPP2M, EulerMaruyama
from theory.types import Solver

# --- the noise ---------------------------------------------------------------------------------------------------


def _white(study: Study, solver: Solver, statement: str, independent: bool = False) -> Check:
    """The largest correlation of recorded noise among itself and with the latent, said to be 0."""
    g, about = study.gaussians
    white, latent = off_diagonal(recorded_noise(solver, g.target, grid(g, STEPS), independent))
    worst = max(np.abs(white).max(), np.abs(latent).max())
    lie = f"{worst:.2g} is no 0"
    return at_most(statement, "Cor(w_i, w_j) = Cor(w_i, x_t0) = 0", worst, 0.0, 1e-11, about=about, lie=lie)


def edit_friendly_is_white(study: Study) -> Check:
    solver = DDIM(study.problem.schedule, 1.0)
    return _white(study, solver, 'Noise drawn independently for each t ("edit-friendly") is white', independent=True)


def noise_of_ddim_with_less_is_white(study: Study) -> Check:
    return _white(study, DDIM(study.problem.schedule, 0.99), "Recorded noise is white: DDIM(0.99)")


def noise_of_euler_maruyama_is_white(study: Study) -> Check:
    return _white(study, EulerMaruyama(study.problem.schedule, 1.0), "Recorded noise is white: Euler-Maruyama")


def noise_of_dpm_solver_is_white(study: Study) -> Check:
    return _white(study, DPMSolverPP2M(study.problem.schedule, 1.0), "Recorded noise is white: DPM-Solver++(2M) SDE")


def recorded_noise_has_unit_variance(study: Study) -> Check:
    g, about = study.gaussians
    variances = np.diag(recorded_noise(DDIM(g.schedule, 1.0), g.target, grid(g, STEPS)).covariance)[:-1]
    found = variances[STEPS // 2]
    lie = f"it is {found - 1:.1%} larger"
    statement = f"Recorded noise has unit variance at {STEPS} steps"
    return equal(statement, "Var(w) = 1", found, 1.0, 1e-9, about=about, lie=lie)


def edit_friendly_has_the_law_of_the_sde(study: Study) -> Check:
    # On the paper's toy. Gaussian data makes it true: the edited law depends on (x_0, x_t0) alone. From t0 = .3, where
    # modes are decided, or with the cosine schedule, whose x_1 has forgotten x_0, it is true but for .004.
    found = top_mode(paper_problem(), independent=True)
    return at_most(
        '"Edit-friendly" noise ends in the modes as the SDE does',
        "|P(top mode) - P(top mode by the SDE)| = 0",
        found.apart,
        0.0,
        0.01,  # more than a hundred steps of Cycle-SDE leave
        about="the paper's toy",
        lie=f"{found.cycle:.3f} is no {found.sde:.3f}",
    )


# --- reconstruction ----------------------------------------------------------------------------------------------


def fresh_noise_reconstructs(study: Study) -> Check:
    p = study.problem
    ts = grid(p, 64)
    x = p.target.sample(jr.key(0), (20,))
    latent = forward_path(p.schedule, x, ts, jr.key(1))[0]
    end = sample(DDIM(p.schedule, 1.0), noise_fn(p.target, p.schedule), latent, ts, jr.key(2))
    worst = np.abs(np.subtract(end, x)).max()
    statement, lie = "The SDE returns the source without recorded noise", f"it is {worst:.2g} away"
    return at_most(statement, "x~_0 = x_0", worst, 0.0, lie=lie)


# --- the guarantee -----------------------------------------------------------------------------------------------


def cycle_sde_heals_at_half_the_noise(study: Study) -> Check:
    g, about = study.gaussians
    ts, solver = grid(g, STEPS), DDIM(g.schedule, 0.5)
    kl = np.asarray(gaussian_cycle(solver, g.target, ts, healed_half_way(g, ts, 0.5)).kl)
    grown = np.max(np.diff(kl))
    statement, lie = "Theorem 3.3 for eta = 0.5: KL never grows", f"KL grows by {grown:.1g} in one step"
    return at_most(statement, "max [KL(s) - KL(t)] <= 0, s < t", grown, 0.0, about=about, lie=lie)


def _stays_right(statement: str, kl: Float[Array, " times"], about: str) -> Check:
    """KL that is 0 at the start, said to stay so."""
    first, *_, last = np.asarray(kl)
    lie = f"KL grows to {last:.1g}"
    return at_most(statement, "KL(0) <= KL(t0) = 0", last, first, about=about, lie=lie)


def an_edit_may_read_the_source(study: Study) -> Check:
    g, about = study.gaussians
    ts = grid(g, STEPS)
    kl = gaussian_cycle(DDIM(g.schedule, 1.0), g.target, ts, reads_the_source(g, ts, 0.01)).kl
    return _stays_right("Theorem 3.3 for an edit that reads x_0, one part in a hundred", kl, about)


def a_mask_keeps_the_guarantee(study: Study) -> Check:
    p, data = study.problem, in_plane()
    kl = masked_cycle(data, p.schedule, grid(p, STEPS), redrawn(data, p.schedule, p.t0)).kl
    return _stays_right("Theorem 3.3 for what a mask leaves free", kl, GAUSSIANS)


def _has_the_law_of(statement: str, found: float, expected: float, **more: Any) -> Check:
    """KL at the end, said to be that of an SDE as closely as it is where it is true."""
    lie = f"off by {found / expected - 1:.1g} of it"
    return equal(statement, "KL(p~_s | p_s), Cycle = SDE", found, expected, 1e-8, lie=lie, **more)


def _end(study: Study, eta: float, edit: Standard) -> float:
    """KL at the end of DDIM(eta), on the study's Gaussians."""
    g, _ = study.gaussians
    return float(np.asarray(gaussian_cycle(DDIM(g.schedule, eta), g.target, grid(g, STEPS), edit).kl)[-1])


def _by_sde(study: Study, lam: float) -> float:
    g, _ = study.gaussians
    return float(inexact_score(g, grid(g, STEPS)[-1], lam).kl())


def cycle_sde_has_the_law_of_the_sde_at_half_the_noise(study: Study) -> Check:
    statement = "Theorem 3.3 for eta = 0.5: Cycle-SDE has the law of the lambda-SDE of its own level"
    g, about = study.gaussians
    return _has_the_law_of(statement, _end(study, 0.5, to_start(g)), _by_sde(study, 0.5), about=about)


def ddim_with_less_has_the_law_of_the_sde(study: Study) -> Check:
    statement = "Cycle-SDE with 32 steps of DDIM(0.99) has the law of the SDE"
    g, about = study.gaussians
    return _has_the_law_of(statement, _end(study, 0.99, to_start(g)), _by_sde(study, 1.0), about=about)


def a_start_off_by_a_millionth_is_not_seen(study: Study) -> Check:
    g, about = study.gaussians
    edit, far = jax.device_get(to_start(g)), 1 + 1e-6
    further = Standard(1 + far * (edit.latent - 1), shift=far * edit.shift)  # of mean and width, whichever is wrong
    statement = "Cycle-SDE from a start that is a millionth farther off has the law of the SDE"
    return _has_the_law_of(statement, _end(study, 1.0, further), _by_sde(study, 1.0), about=about, assumes=CYCLE)


def a_prompt_keeps_the_law_at_few_steps(study: Study) -> Check:
    g, about = study.gaussians
    ts, prompt = grid(g, STEPS), another(g.target, 1.01)
    cycle = gaussian_cycle(DDIM(g.schedule, 1.0), g.target, ts, Standard(1.0), prompt)
    found, expected = np.asarray(cycle.laws.covariance)[-1, 0, 0], prompt_sde_law(g, prompt, ts[-1]).variances.item()
    return equal(
        "With a prompt whose variance is 1 % larger, too, no number of steps makes an error",
        "Var(x~_s) = Var by the prompt's SDE",
        found,
        expected,
        1e-8,
        about=about,
        assumes="exact scores of both prompts, eta = 1",
        lie=f"off by {found / expected - 1:.1g} of it",
    )
