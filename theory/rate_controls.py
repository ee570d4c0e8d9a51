"""False statements about rates: each must be caught. All of them err by a little, where the true one is an equality."""

import jax
import jax.numpy as jnp
import numpy as np

from theory.checks import GAUSSIANS, Check, Study, at_most, equal, paper_problem
from theory.inequalities import poincare
from theory.mixtures import mixture_1d
from theory.rate_statements import mean_shift
from theory.rates import mixture_constants


def rate_one_percent_too_fast(study: Study) -> Check:
    p = study.problem
    shift = mean_shift(p.schedule, float(p.t0), np.full(10, 0.3), np.ones(10))
    return at_most(
        "KL decays 1 % faster than the log-Sobolev rate (Gaussian mean shift, d = 10)",
        "KL(0) <= exp(-1.01 ∫ g²/V) KL(t0)",
        shift.after,
        (shift.promised / shift.before) ** 1.01 * shift.before,
        about=GAUSSIANS,
        lie="1 % in the rate",
    )


def poincare_constant_one_percent_too_small(study: Study) -> Check:
    g, about = study.gaussians
    law = g.target
    return at_most(
        "The Poincaré constant of a Gaussian is 0.99 times its variance",
        "Var p <= 0.99 C_P",
        law.variances.item(),
        0.99 * float(poincare(law).upper),
        about=about,
        lie="1 % in C_P",
    )


def narrow_axes_decide(study: Study) -> Check:
    # 1 % narrower than the widest axis, along which the mean is shifted
    p, variances = study.problem, np.array([1.0, 0.5])
    shift = mean_shift(p.schedule, float(p.t0), variances, np.eye(2)[0])
    narrower = mean_shift(p.schedule, float(p.t0), 0.99 * variances, np.eye(2)[0])
    return equal(
        "The rate is that of an axis 1 % narrower than the widest one",
        "KL(0) = exp(-∫ g²/V) KL(t0), V = 0.99 max V",
        shift.after,
        narrower.promised / narrower.before * shift.before,
        1e-11,
        about=GAUSSIANS,
        lie="1 % in V",
    )


def modes_at_half_their_distance(study: Study) -> Check:
    # On the paper's toy: modes of other pairs may be so close that half their distance changes nothing.
    p = paper_problem()
    closer = jax.jit(mixture_constants)(mixture_1d([0.5, 0.5], [-1.0, 1.0], [0.2, 0.2]))
    return at_most(
        "The constant of the toy's data is at most that of modes half as far apart",
        "C_P <= max V exp(D²/16)",
        poincare(p.target).lower,
        jnp.asarray(closer.poincare),
        about="the paper's toy",
        lie="a factor 2 in the distance",
    )
