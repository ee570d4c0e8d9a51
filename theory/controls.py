"""False statements put to the machinery that verifies the true ones: each must be caught."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np

from theory.beyond import two_chain_moments
from theory.checks import Check, Study, at_most, equal, gaussian_problem
from theory.divergences import gaussian_kl
from theory.flows import kl_ode
from theory.gaussians import clock, inexact_score
from theory.mixtures import gaussian
from theory.ratios import law_gaussian
from theory.theorems import inversion_error


def ode_contracts(study: Study) -> Check:
    before = study.sde.kl.value[0]
    return at_most(
        "The ODE halves the KL divergence", "KL(0) <= KL(t0) / 2", kl_ode(study.problem, 0.0).value, before / 2
    )


def sde_is_invariant(study: Study) -> Check:
    kl = study.sde.kl.value
    return equal("The SDE leaves the KL divergence as it is", "KL(0) = KL(t0)", kl[-1], kl[0], 1e-9)


def fisher_without_half(study: Study) -> Check:
    kl, rate = study.sde.kl.value, study.integral(study.sde.fisher.value[1:-1])
    return equal("dKL/dt is g² I, without the 1/2", "KL(t0) - KL(0) = ∫ g² I dt", kl[0] - kl[-1], rate, 1e-12)


def rate_twice_too_fast(study: Study) -> Check:
    g, zero = gaussian_problem(), jnp.zeros(())
    marginal = g.marginal(g.t0)
    shifted = g._replace(start=gaussian([0.5], [[marginal.variances.item()]]))
    return at_most(
        "KL decays at twice the log-Sobolev rate (Gaussian mean shift)",
        "KL(0) <= exp(-2 ∫ g²/V) KL(t0)",
        gaussian_kl(law_gaussian(shifted, zero, 1.0), shifted.target),
        np.exp(-2 * float(clock(g, zero))) * float(gaussian_kl(shifted.start, marginal)),
    )


def inversion_reconstructs(study: Study) -> Check:
    p = study.problem
    error = inversion_error(p, p.target.sample(jr.key(0), (20,)), 100)
    return at_most("DDIM inversion with 100 steps returns the source exactly", "x~_0 = x_0", error, 0.0)


def noise_level_does_not_matter(study: Study) -> Check:
    g, zero = gaussian_problem(), jnp.zeros(())
    half, full = (inexact_score(g, zero, lam).kl() for lam in (0.5, 1.0))
    return equal("The noise level of the reverse process does not matter", "KL_½(0) = KL_1(0)", half, full, 1e-3)


def inexact_ode_is_invariant(study: Study) -> Check:
    g, zero = gaussian_problem(), jnp.zeros(())
    after, before = inexact_score(g, zero, 0.0, 0.1).kl(), inexact_score(g, g.t0, 0.0, 0.1).kl()
    return equal("The ODE is invariant with an inexact score, too", "KL(0) = KL(t0), 1.1 score", after, before, 1e-3)


def discretisation_is_free(study: Study) -> Check:
    g = gaussian_problem()
    _, right = two_chain_moments(g, 1.0, 10)
    return at_most(
        "DDPM with 10 steps ends at the data law", "KL(p_N | q0) <= 1e-3", gaussian_kl(right, g.target), 1e-3
    )
