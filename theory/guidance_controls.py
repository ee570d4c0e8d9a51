"""False statements on guidance and on inexact scores: each must be caught."""

import jax.numpy as jnp
import numpy as np

from theory.beyond import attained, least, whole_bound
from theory.checks import GAUSSIANS, Check, Study, at_most, equal
from theory.gaussians import girsanov, girsanov_factor
from theory.guidance import Guided, tilted
from theory.guidance_statements import guided_gaussians, known_of


def _given(study: Study) -> Guided:
    """The built-in Gaussians on the study's schedule and t0."""
    return guided_gaussians(study.problem.schedule, float(study.problem.t0))


def guided_sampling_ends_at_the_class_law(study: Study) -> Check:
    given = _given(study)
    floor = float(known_of(given).right[1].kl(given.of_class(jnp.zeros(()))))
    return at_most(
        "Guided sampling from the right start ends at the law of the class",
        "KL(p^w|p(·|c)) = 0 at 0, λ = 1",
        floor,
        0.0,
        1e-3,
        about=GAUSSIANS,
        lie=f"by {floor:.3g} nats, w = 2",
    )


def ddim_and_ddpm_have_one_limit_under_guidance(study: Study) -> Check:
    known = known_of(_given(study))
    ode, sde = (law.variance for law in known.right)
    return equal(
        "DDIM and DDPM have one limit under guidance",
        "v_λ=0 = v_λ=1",
        ode,
        sde,
        1e-2,
        about=GAUSSIANS,
        lie=f"by a factor of {sde / ode:.3g}, w = 2",
    )


def the_guided_drift_is_the_drift_of_p_t(study: Study) -> Check:
    given = _given(study)
    schedule, t = given.problem.schedule, 0.3 * given.problem.t0
    diffused = schedule.alpha(t) ** 2 * tilted(given, jnp.zeros(())).variance + schedule.sigma(t) ** 2
    found = tilted(given, t).variance
    return equal(
        "The guided score is the score of a diffused law, of p(·|c)^w p^(1-w) (its variance at t = .3 t0)",
        "1 / [w/V_c + (1-w)/V_u] = α² v + σ²",
        found,
        diffused,
        1e-3,
        about=GAUSSIANS,
        lie=f"by {abs(found / diffused - 1):.1%}, w = 2",
    )


def guided_runs_contract_as_unguided_ones(study: Study) -> Check:
    known = known_of(_given(study))
    return equal(
        "Two guided runs contract by what two unguided ones do",
        "ρ_w = exp(-∫ g²/V)",
        known.rho,
        known.unguided,
        1e-2,
        about=GAUSSIANS,
        lie=f"by a factor of {known.unguided / known.rho:.3g}, w = 2",
    )


def girsanovs_factor_off_by_one_percent(study: Study) -> Check:
    check = attained(_given(study).problem, 1.0, lambda lam: 1.01 * girsanov_factor(lam))
    return check._replace(statement="Girsanov's bound with a factor 1 % too large is attained but for ρ", lie="by 1 %")


def the_whole_bound_is_least_at_lam_1(study: Study) -> Check:
    g = _given(study).problem
    best = least(lambda lam: girsanov(g, jnp.zeros(()), lam, 0.1))
    at_one, lowest = (float(whole_bound(g, lam, 0.1)) for lam in (1.0, best))
    return at_most(
        "Girsanov's whole bound is least at lam = 1, score off by +10%",
        "bound(1) <= bound(λ) for all λ",
        at_one,
        lowest,
        about=GAUSSIANS,
        lie=f"by {np.log(at_one / lowest):.2%}, least at λ = {best:.3f}",
    )
