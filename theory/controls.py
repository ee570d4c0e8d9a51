"""False statements put to the machinery that verifies the true ones: each must be caught.

Some are what a reader might believe; the others are true but for a constant, a start or a kernel that is off by a
little.
"""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from theory.beyond import (
    balanced,
    heat_is_average,
    heat_kl,
    integrated,
    two_chain_closed_form,
    two_chain_moments,
)
from theory.checks import GAUSSIANS, Check, Study, at, at_most, difference, equal, scaled
from theory.contraction import contraction_curve
from theory.divergences import gaussian_kl
from theory.gaussians import clock, inexact_score
from theory.mixtures import gaussian
from theory.problems import Curve
from theory.ratios import law_gaussian
from theory.solvers import DDIM, EulerMaruyama
from theory.theorems import by_bayes, inversion_error, off_equation, reconstruction_error

LITTLE = 0.01


def ode_contracts(study: Study) -> Check:
    before = study.sde.kl.value[0]
    lie = "a factor 2"
    return at_most("The ODE halves the KL divergence", "KL(0) <= KL(t0) / 2", study.ode, before / 2, lie=lie)


def sde_is_invariant(study: Study) -> Check:
    before, after = at(study.sde.kl, 0), at(study.sde.kl, -1)
    lie = f"a factor {float(after.value / before.value):.3g}"
    return equal("The SDE leaves the KL divergence as it is", "KL(0) = KL(t0)", after, before, 1e-9, lie=lie)


def fisher_without_half(study: Study) -> Check:
    return _loses(study, 1.0, "dKL/dt is g² I, without the 1/2", "KL(t0) - KL(0) = ∫ g² I dt", "a factor 2")


def fisher_one_percent_off(study: Study) -> Check:
    return _loses(study, 0.505, "dKL/dt is 0.505 g² I", "KL(t0) - KL(0) = 0.505 ∫ g² I dt", "1 % in the rate")


def _loses(study: Study, factor: float, statement: str, equation: str, lie: str) -> Check:
    kl, rate = study.sde.kl, study.integral(at(study.sde.fisher, slice(1, -1)))
    removed = difference(at(kl, 0), at(kl, -1))
    return equal(statement, equation, removed, scaled(rate, factor), study.tolerance, lie=lie)


def _moved(study: Study) -> Curve:
    """At t0, from a start whose mean is 1e-6 of its deviation away."""
    p = study.problem
    start = p.start._replace(means=p.start.means + 1e-6 * jnp.sqrt(p.start.variances[:, :1]))
    return jax.device_get(contraction_curve(p.target, start, p.schedule, jnp.array([float(p.t0)]), w2=False))


def weights_of_another_start(study: Study) -> Check:
    moved, weights = at(_moved(study).mode_weights, 0), at(study.sde.mode_weights, -1)
    k = int(np.argmax(np.abs(moved.value / weights.value - 1)))
    return equal(
        "The SDE ends with the weights that the modes have in a start 1e-6 of its deviation away",
        "E_p~[P(mode | x_0)] = E_p~~[P(mode | x_t0)]",
        at(weights, k),
        at(moved, k),
        study.tolerance,
        lie="1e-6 deviations in the start",
    )


def start_off_by_a_millionth(study: Study) -> Check:
    before = _moved(study).kl
    return equal(
        "The KL divergence falls as it does from a start that is 1e-6 of its deviation away",
        "KL~(t0) - KL(0) = 1/2 ∫ g² I dt",
        difference(at(before, 0), at(study.sde.kl, -1)),
        scaled(study.integral(at(study.sde.fisher, slice(1, -1))), 0.5),
        study.tolerance,
        lie="1e-6 deviations in the start",
    )


def kernel_one_percent_off(study: Study) -> Check:
    return at_most(
        "h averaged over a kernel whose mean is 1 % off solves the equation of the reverse SDE",
        "∂r/∂t + f x·∇r + g²/2 (Δr + |∇r|²) = 0, r = log h(1.01 x)",
        off_equation(study.problem, scale=1 + LITTLE),
        0.0,
        1e-11 if study.on_line else 1e-8,
        lie="1 % in the kernel's mean",
    )


def diffusion_one_percent_off(study: Study) -> Check:
    return at_most(
        "h solves the Fokker-Planck equation of an SDE with 1 % more diffusion",
        "∂r/∂t + f x·∇r + 0.505 g² (Δr + |∇r|²) = 0, r = log h",
        off_equation(study.problem, half=0.5 * (1 + LITTLE)),
        0.0,
        1e-11 if study.on_line else 1e-8,
        lie="1 % in g²",
    )


def hellinger_rate_one_percent_off(study: Study) -> Check:
    check = integrated(study, "hellinger", 0.5 * (1 + LITTLE))
    statement = "What the SDE removes of the squared Hellinger distance is 1 % more than its integrated rate"
    return check._replace(statement=statement, lie="1 % in the rate")


def noise_level_one_percent_off(study: Study) -> Check:
    check = heat_is_average(study, heat_kl(study, (1 + LITTLE,))[0])
    return check._replace(
        statement="The forward-kernel average is the heat equation with lam = 1.01", lie="1 % in the noise level"
    )


def error_term_one_percent_off(study: Study) -> Check:
    check = balanced(study.bundled, 1.0, 0.1, factor=1 + LITTLE)
    return check._replace(
        statement="What the error of the score adds is 0.505 (1+λ²) g² E[e·∇log h]", lie="1 % in (1+λ²)/2"
    )


def eta_one_percent_off(study: Study) -> Check:
    g, about = study.gaussians
    return equal(
        "DDIM(0.99) with 10 steps contracts as DDIM(1), two chains on Gaussian data",
        "KL_N(0) = KL(ρ_N), η = 1",
        gaussian_kl(*two_chain_moments(g, 1 - LITTLE, 10)),
        two_chain_closed_form(g, 1.0, 10),
        1e-11,
        about=about,
        lie="1 % in η",
    )


def recorded_mean_one_percent_off(study: Study) -> Check:
    p = study.problem
    return at_most(
        "Noise recorded with a mean that is 1 % off, replayed by DDIM(1), returns the source's path",
        f"x~_t = x_t, {by_bayes.equation}",
        reconstruction_error(p, p.target.sample(jr.key(0), (20,)), DDIM(p.schedule, 1.0), by_bayes, LITTLE),
        0.0,
        1e-11,
        lie="1 % in E[x_s | x_t]",
    )


def kernels_are_interchangeable(study: Study) -> Check:
    p = study.problem
    error = reconstruction_error(p, p.target.sample(jr.key(0), (20,)), EulerMaruyama(p.schedule, 1.0), by_bayes)
    return at_most(
        "Noise recorded with DDIM's kernel, replayed by Euler-Maruyama, returns the source's path",
        f"x~_t = x_t, {by_bayes.equation}",
        error,
        0.0,
        1e-11,
        lie="another kernel",
    )


def rate_twice_too_fast(study: Study) -> Check:
    g, zero = study.bundled, jnp.zeros(())
    marginal = g.marginal(g.t0)
    shifted = g._replace(start=gaussian([0.5], [[marginal.variances.item()]]))
    return at_most(
        "KL decays at twice the log-Sobolev rate (Gaussian mean shift)",
        "KL(0) <= exp(-2 ∫ g²/V) KL(t0)",
        gaussian_kl(law_gaussian(shifted, zero, 1.0), shifted.target),
        np.exp(-2 * float(clock(g, zero))) * float(gaussian_kl(shifted.start, marginal)),
        about=GAUSSIANS,
        lie="a factor 2",
    )


def inversion_reconstructs(study: Study) -> Check:
    p = study.problem
    error = inversion_error(p, p.target.sample(jr.key(0), (20,)), 100)
    lie = f"it is {error:.2g} away"
    return at_most("DDIM inversion with 100 steps returns the source exactly", "x~_0 = x_0", error, 0.0, lie=lie)


def noise_level_does_not_matter(study: Study) -> Check:
    (g, about), zero = study.gaussians, jnp.zeros(())
    half, full = (float(inexact_score(g, zero, lam).kl()) for lam in (0.5, 1.0))
    return equal(
        "The noise level of the reverse process does not matter",
        "KL_½(0) = KL_1(0)",
        half,
        full,
        1e-3,
        about=about,
        lie=f"a factor {half / full:.3g}",
    )


def inexact_ode_is_invariant(study: Study) -> Check:
    g, zero = study.bundled, jnp.zeros(())
    after, before = (float(inexact_score(g, s, 0.0, 0.1).kl()) for s in (zero, g.t0))
    return equal(
        "The ODE is invariant with an inexact score, too",
        "KL(0) = KL(t0), 1.1 score",
        after,
        before,
        1e-3,
        about=GAUSSIANS,
        lie=f"a factor {after / before:.3g}",
    )


def discretisation_is_free(study: Study) -> Check:
    g = study.bundled
    _, right = two_chain_moments(g, 1.0, 10)
    found = float(gaussian_kl(right, g.target))
    lie = f"it is {found:.2g} away"
    return at_most(
        "DDPM with 10 steps ends at the data law", "KL(p_N | q0) <= 1e-3", found, 1e-3, about=GAUSSIANS, lie=lie
    )
