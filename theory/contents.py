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
    "cycle": Theorem(
        "Theorem 3.3: Cycle-SDE contracts, and what it needs", "theory.cycle_statements:cycle_contraction"
    ),
    "reconstruction": Theorem("Appendix A: reconstruction", "theory.theorems:reconstruction"),
    "lambda": Theorem("Any noise level between and beyond", "theory.beyond:lambda_family"),
    "divergences": Theorem("Any f-divergence", "theory.beyond:f_divergences"),
    "scores": Theorem("Inexact scores", "theory.beyond:inexact_scores"),
    "guidance": Theorem("Classifier-free guidance", "theory.guidance_statements:guidance"),
    "steps": Theorem("Finitely many steps", "theory.beyond:discretisation"),
}


def _controls(module: str, *names: str) -> dict[str, str]:
    """By its name the function of a control, module:function, which has the same name."""
    return {name: f"{module}:{name.replace('-', '_')}" for name in names}


CONTROLS = (
    _controls(
        "theory.controls",
        "ode-contracts",
        "sde-is-invariant",
        "fisher-without-half",
        "fisher-one-percent-off",
        "start-off-by-a-millionth",
        "kernel-one-percent-off",
        "diffusion-one-percent-off",
        "hellinger-rate-one-percent-off",
        "noise-level-one-percent-off",
        "error-term-one-percent-off",
        "eta-one-percent-off",
        "recorded-mean-one-percent-off",
        "kernels-are-interchangeable",
        "weights-of-another-start",
        "rate-twice-too-fast",
        "inversion-reconstructs",
        "noise-level-does-not-matter",
        "inexact-ode-is-invariant",
        "discretisation-is-free",
    )
    | _controls(
        "theory.guidance_controls",
        "guided-sampling-ends-at-the-class-law",
        "ddim-and-ddpm-have-one-limit-under-guidance",
        "the-guided-drift-is-the-drift-of-p-t",
        "guided-runs-contract-as-unguided-ones",
        "girsanovs-factor-off-by-one-percent",
        "the-whole-bound-is-least-at-lam-1",
    )
    | _controls(
        "theory.rate_controls",
        "rate-one-percent-too-fast",
        "poincare-constant-one-percent-too-small",
        "narrow-axes-decide",
        "modes-at-half-their-distance",
    )
    | _controls(
        "theory.cycle_controls",
        "edit-friendly-is-white",
        "edit-friendly-has-the-law-of-the-sde",
        "recorded-noise-has-unit-variance",
        "fresh-noise-reconstructs",
        "noise-of-ddim-with-less-is-white",
        "noise-of-euler-maruyama-is-white",
        "noise-of-dpm-solver-is-white",
        "cycle-sde-heals-at-half-the-noise",
        "cycle-sde-has-the-law-of-the-sde-at-half-the-noise",
        "ddim-with-less-has-the-law-of-the-sde",
        "an-edit-may-read-the-source",
        "a-mask-keeps-the-guarantee",
        "a-prompt-keeps-the-law-at-few-steps",
        "a-start-off-by-a-millionth-is-not-seen",
    )
)


def control(name: str, study: "Study") -> "Check":
    """A false statement, put to the same machinery."""
    return _loaded(CONTROLS[name])(study)


def _loaded(where: str) -> Callable[..., Any]:
    module, function = where.split(":")
    return getattr(import_module(module), function)
