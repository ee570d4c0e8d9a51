"""What theory-check checks: names and titles. What computes them is loaded when it is asked for."""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from theory.checks import Check, Study


class Theorem(NamedTuple):
    """A group of checks; `max_dim` is the largest dimension of the data in which it can be computed."""

    title: str
    where: str  # module:function, Study -> checks
    max_dim: int = 2

    def run(self, study: "Study") -> "Iterator[Check]":
        return _loaded(self.where)(study)


STATEMENTS = {
    "sde": Theorem("Theorem 3.1: the SDE contracts", "theory.theorems:sde_contraction"),
    "ode": Theorem("Theorem 3.2: the ODE does not", "theory.theorems:ode_invariance"),
    "rate": Theorem("The linear rate under a log-Sobolev inequality", "theory.rate_statements:linear_rate"),
    "cycle": Theorem("Theorem 3.3: Cycle-SDE contracts", "theory.theorems:cycle_contraction"),
    "reconstruction": Theorem("Appendix A: reconstruction", "theory.theorems:reconstruction"),
    "lambda": Theorem("Any noise level between and beyond", "theory.beyond:lambda_family"),
    "divergences": Theorem("Any f-divergence", "theory.beyond:f_divergences"),
    "scores": Theorem("Inexact scores", "theory.beyond:inexact_scores"),
    "steps": Theorem("Finitely many steps", "theory.beyond:discretisation"),
}

CONTROLS = {
    "ode-contracts": "theory.controls:ode_contracts",
    "sde-is-invariant": "theory.controls:sde_is_invariant",
    "fisher-without-half": "theory.controls:fisher_without_half",
    "rate-twice-too-fast": "theory.controls:rate_twice_too_fast",
    "edit-friendly-is-white": "theory.controls:edit_friendly_is_white",
    "edit-friendly-has-the-law-of-the-sde": "theory.controls:edit_friendly_has_the_law_of_the_sde",
    "recorded-noise-has-unit-variance": "theory.controls:recorded_noise_has_unit_variance",
    "fresh-noise-reconstructs": "theory.controls:fresh_noise_reconstructs",
    "inversion-reconstructs": "theory.controls:inversion_reconstructs",
    "noise-level-does-not-matter": "theory.controls:noise_level_does_not_matter",
    "inexact-ode-is-invariant": "theory.controls:inexact_ode_is_invariant",
    "discretisation-is-free": "theory.controls:discretisation_is_free",
    "rate-one-percent-too-fast": "theory.rate_controls:rate_one_percent_too_fast",
    "poincare-constant-one-percent-too-small": "theory.rate_controls:poincare_constant_one_percent_too_small",
    "narrow-axes-decide": "theory.rate_controls:narrow_axes_decide",
    "modes-at-half-their-distance": "theory.rate_controls:modes_at_half_their_distance",
}


def control(name: str, study: "Study") -> "Check":
    """A false statement, put to the same machinery."""
    return _loaded(CONTROLS[name])(study)


def _loaded(where: str) -> Callable[..., Any]:
    module, function = where.split(":")
    return getattr(import_module(module), function)
