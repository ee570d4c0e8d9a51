"""What theory-check does once its options have been read: laws in, checks and a figure out."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from theory.checks import Check, Study, paper_problem
from theory.compilations import keep_compilations
from theory.components import Components
from theory.contents import CONTROLS, STATEMENTS, control
from theory.contraction import contraction_curve
from theory.files import write_whole
from theory.inequalities import log_sobolev
from theory.mixtures import GaussianMixture, mixture
from theory.problems import Problem, problem
from theory.progress import progress
from theory.ratios import ratio_ode, ratio_sde
from theory.schedules import CosineVP, DiscreteVP, LinearVP, ScaledLinearVP
from theory.types import Schedule

if TYPE_CHECKING:
    from theory.__main__ import Args


def verify(args: "Args", laws: Mapping[str, Components], schedule: Mapping[str, Any]) -> int:
    """Checks what the arguments ask for, and returns the exit code; `laws` are target and start, as far as given.

    Raises ValueError for laws and schedules that cannot be.
    """
    jax.config.update("jax_enable_x64", True)
    keep_compilations()
    given = _problem(args.t0, laws, _schedule(**schedule))
    names = [name for name in (CONTROLS if args.controls else STATEMENTS) if not args.only or name in args.only]
    checks = _control(given, names) if args.controls else _verify(given, names)
    _print(checks, args.controls)
    if args.json:
        write_whole(args.json, lambda file: file.write(json.dumps(_report(given, checks), indent=1).encode()))
    if args.plot:
        figure, kind = draw(given), args.plot.suffix[1:]
        write_whole(args.plot, lambda file: figure.savefig(file, format=kind, dpi=160))
    return _exit_code([check.verdict for group in checks.values() for check in group], args.controls)


def _exit_code(verdicts: list[str], controls: bool) -> int:
    """0 if every statement holds (of controls: fails), 3 if all that is amiss are undecided ones, else 1."""
    amiss = {verdict for verdict in verdicts if verdict != ("fails" if controls else "holds")}
    return 0 if not amiss else 3 if amiss == {"undecided"} else 1


def _schedule(kind: str, **parameters: Any) -> Schedule:
    kinds = {"linear": LinearVP, "cosine": CosineVP, "scaled_linear": ScaledLinearVP, "discrete": DiscreteVP}
    try:
        return kinds[kind](**parameters)
    except ValueError as error:
        raise ValueError(f"--schedule: {error}") from None


def _problem(t0: float, laws: Mapping[str, Components], schedule: Schedule) -> Problem:
    bundled = paper_problem()
    given = {name: mixture(*law) for name, law in laws.items()}
    target, start = given.get("target", bundled.target), given.get("start", bundled.start)
    if "target" in given and "start" not in given and target.dim != start.dim:
        raise ValueError(f"--target has d = {target.dim}; give a --start of the same dimension")
    return problem(target, start, schedule, t0)


def _verify(given: Problem, names: list[str]) -> dict[str, list[Check]]:
    chosen = [name for name in names if STATEMENTS[name].max_dim >= given.target.dim]
    if not chosen:
        raise ValueError(
            f"{', '.join(names)}: can be checked on the line only, and the target has d = {given.target.dim}"
        )
    checks = {}
    with progress(width=48) as bar:
        task = bar.add_task("Compiling, once; the curves of the SDE", total=len(chosen))
        study = Study(given)
        for name in chosen:
            bar.update(task, description=STATEMENTS[name].title)
            checks[STATEMENTS[name].title] = list(STATEMENTS[name].run(study))
            bar.advance(task)
    return checks


def _control(given: Problem, names: list[str]) -> dict[str, list[Check]]:
    checks = []
    with progress(width=48) as bar:
        task = bar.add_task("Compiling, once; the curves of the SDE", total=len(names))
        study = Study(given)
        for name in names:
            bar.update(task, description=f"False: {name}")
            checks.append(control(name, study))
            bar.advance(task)
    return {"Each must be caught": checks}


# --- output ------------------------------------------------------------------------------------------------------


WIDTH = 100  # columns of what is not a terminal


def _print(checks: dict[str, list[Check]], controls: bool) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("statement", ratio=1)
    table.add_column("of what: assuming", width=21)
    table.add_column("left\nright", no_wrap=True)
    if controls:
        table.add_column("false by", width=12)
        table.add_column("margin", justify="right", no_wrap=True)
    else:
        table.add_column("residual\n± error\nallowed", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for title, group in checks.items():
        table.add_row(Text(title, "bold"))
        for check in group:
            table.add_row(*_cells(check, controls))
        table.add_section()
    console.print(table)
    good = [_is_good(check, controls) for group in checks.values() for check in group]
    console.print(f"{sum(good)} of {len(good)} {'false statements caught' if controls else 'statements hold'}")


def _is_good(check: Check, controls: bool) -> bool:
    return check.verdict == ("fails" if controls else "holds")


def _cells(check: Check, controls: bool) -> list[Text]:
    """A row of the table: what is said, of what it is said, the two sides, how far they are apart, and the verdict."""
    said = Text.assemble(check.statement, "\n", (check.equation, "cyan"))
    about = Text.assemble(check.about, ": ", (check.assumes, "dim"))
    sides = Text(f"   {check.lhs:.9g}\n{check.relation:<2} {check.rhs:.9g}")
    words = {"undecided": "undecided"} | (
        {"fails": "caught", "holds": "NOT CAUGHT"} if controls else {"holds": "holds", "fails": "FAILS"}
    )
    verdict = Text(words[check.verdict], "green" if _is_good(check, controls) else "bold red")
    if controls:
        return [said, about, sides, Text(check.lie), Text(f"{check.margin:.1e}"), verdict]
    apart = Text(f"{check.residual:.1e}\n±{check.error:.0e}\n{check.tolerance:.0e}")
    return [said, about, sides, apart, verdict]


def _report(given: Problem, checks: dict[str, list[Check]]) -> dict[str, Any]:
    def law(m: GaussianMixture) -> dict[str, Any]:
        return {"weights": m.weights.tolist(), "means": m.means.tolist(), "covariances": m.covariances.tolist()}

    return {
        "target": law(given.target),
        "start": law(given.start),
        "schedule": repr(given.schedule),
        "t0": float(given.t0),
        "versions": {name: version(name) for name in ("blessing", "jax", "numpy", "scipy")},
        "checks": [
            {"group": title, **check._asdict(), "margin": check.margin, "verdict": check.verdict}
            for title, group in checks.items()
            for check in group
        ],
    }


def draw(given: Problem):
    """The divergences on the way back under the ODE and the SDE; on the line, also what the two end with."""
    from matplotlib.figure import Figure

    t0 = float(given.t0)
    ts = jnp.asarray(t0 * np.linspace(1.0, 0.0, 41))
    sde = contraction_curve(given.target, given.start, given.schedule, ts, 1.0)
    on_line = given.target.dim == 1
    figure = Figure(figsize=(10, 3.8) if on_line else (5.4, 3.8), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, 2 if on_line else 1))
    blue, orange, grey = "#0072B2", "#D55E00", "0.45"

    axis = axes[0]
    axis.axhline(sde.kl.value[0], color=orange, lw=2, label="ODE: the gap stays (Theorem 3.2)")
    axis.plot(ts, sde.kl.value, color=blue, lw=2, label="SDE, Cycle-SDE: it shrinks (3.1, 3.3)")
    if on_line:
        constants = jax.lax.map(lambda t: log_sobolev(given.marginal(t)).upper, ts)
        rate = given.schedule.beta(ts) / constants
        passed = jnp.concatenate([jnp.zeros(1), jnp.cumsum((rate[1:] + rate[:-1]) / 2 * -jnp.diff(ts))])
        bound = sde.kl.value[0] * jnp.exp(-passed)
        axis.plot(ts, bound, color=grey, ls="--", label="certified log-Sobolev bound")
    axis.set(
        yscale="log", xlim=(t0, 0), xlabel="time t: from the edited latent to the image", ylabel="KL(p̃ₜ | pₜ), nats"
    )
    axis.set_title("How far the edited law is from the right one", fontsize=11)
    axis.legend(frameon=False, fontsize=9)

    if on_line:
        s = ts[-1]
        spread = 5 * jnp.sqrt(given.target.variances[:, 0])
        x = jnp.linspace(jnp.min(given.target.means[:, 0] - spread), jnp.max(given.target.means[:, 0] + spread), 1200)
        data = jnp.exp(given.target.log_prob(x[:, None]))
        axis = axes[1]
        axis.fill_between(x, data, color="0.85", label="data")
        for name, ratio, color in (("ODE", ratio_ode(given, s), orange), ("SDE", ratio_sde(given, s), blue)):
            axis.plot(x, data * jnp.exp(jax.vmap(ratio)(x[:, None]).log_h), color=color, lw=2, label=name)
        axis.set(xlabel="x", ylabel="density at t = 0", ylim=(0, None))
        axis.set_title("What each of them ends with", fontsize=11)
        axis.legend(frameon=False, fontsize=9, loc="upper center")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure
