"""theory-check: every statement of the paper, verified to many digits, in one table."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import UNSET, Meta, Struct, UnsetType

from theory.command_line import one_line, parsed, said
from theory.compilations import OLD_EMITTERS, collect_rarely, set_flags, stay_on_cpu
from theory.components import Components, components
from theory.contents import CONTROLS, STATEMENTS
from theory.files import held
from theory.reading import converted, from_json, read_json


@dataclasses.dataclass(frozen=True)
class Args:
    """Verifies the contraction theorems of "The Blessing of Randomness" (arXiv 2311.01410) on Gaussian mixtures.

    Exit code 0 if every statement holds (with --controls: if every false statement is caught), 1 if not, 3 if nothing
    is worse than undecided (the quadrature's own error is above what is allowed), 2 for bad input.
    """

    only: tuple[str, ...] = ()
    """Check only these groups (see --list)."""
    target: str | None = None
    """The data law as JSON or a JSON file: {"weights": [..], "means": [[..]], "covariances": [[[..]]]}, or on the line
    {"weights": [..], "means": [..], "stds": [..]}. Default: the paper's toy."""
    start: str | None = None
    """The law that the reverse process wrongly starts from, in the same form."""
    schedule: str = "linear"
    """linear (the toy's), cosine, sd (that of Stable Diffusion 1.5), or JSON, also as a file: {"kind": "linear",
    "beta_min": 0.1, "beta_max": 20}, {"kind": "cosine", "offset": 0.008, "end": 0.9946}, {"kind": "scaled_linear",
    "beta_start": 0.00085, "beta_end": 0.012, "steps": 1000} or {"kind": "discrete", "alphas_cumprod": [..]}."""
    t0: float = 1.0
    """The time at which it starts, in (0, 1]."""
    json: Path | None = None
    """Write all checks, with problem and versions, to this file."""
    plot: Path | None = None
    """Draw the contraction curves to this file (.png, .pdf, .svg)."""
    controls: bool = False
    """Put false statements to the same machinery; each must be caught."""
    list: bool = False
    """List the groups of statements and the controls."""


def main(argv: list[str] | None = None) -> None:
    """The command `theory-check`."""
    with one_line("theory-check"):
        sys.exit(run(parsed(Args, argv, "theory-check")))


def run(args: Args) -> int:
    """Checks what the arguments ask for and returns the exit code. Raises ValueError for bad input."""
    check(args)
    if args.list:
        show()
        return 0
    given = {"target": args.target, "start": args.start}
    laws = {name: read_law(f"--{name}", text) for name, text in given.items() if text}
    schedule = read_schedule(args.schedule)
    set_flags(OLD_EMITTERS)
    collect_rarely()
    stay_on_cpu()
    from theory.command import verify  # loads what computes

    return verify(args, laws, schedule)


def check(args: Args) -> None:
    """Raises ValueError, naming the option, for one that cannot be."""
    known = CONTROLS if args.controls else STATEMENTS
    for name in args.only:
        if name not in known:
            raise ValueError(f"--only {name}: no such name; choose from {', '.join(known)}")
    for flag, path in (("--json", args.json), ("--plot", args.plot)):
        if path is not None:
            check_place(flag, path)
    if args.plot and args.plot.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--plot {args.plot}: the name must end in .png, .pdf or .svg")


def check_place(flag: str, path: Path) -> None:
    """Raises ValueError, naming the option, for a file that cannot be written."""
    if not path.resolve().parent.is_dir():
        raise ValueError(f"{flag} {path}: the folder {path.resolve().parent} does not exist")
    if path.is_dir():
        raise ValueError(f"{flag} {path}: is a folder; give the name of a file")
    try:
        with held(path):
            pass
    except OSError as error:
        raise ValueError(f"{flag} {said(error)}") from None


Number = Annotated[float, Meta(ge=-1e100, le=1e100)]  # squares of them are finite
Numbers = Annotated[list[Number], Meta(min_length=1, max_length=10_000)]
Steps = Annotated[int, Meta(ge=1, le=100_000)]


class Mixture(Struct, forbid_unknown_fields=True):
    """Components in any dimension."""

    weights: Numbers
    means: list[Numbers]
    covariances: list[list[Numbers]]


class LineMixture(Struct, forbid_unknown_fields=True):
    """Components on the line."""

    weights: Numbers
    means: Numbers
    stds: list[Annotated[float, Meta(ge=1e-100, le=1e100)]]


class Schedule(Struct, tag_field="kind", forbid_unknown_fields=True, omit_defaults=True):
    """A schedule's kind and parameters; what is UNSET `theory.schedules` has a default for."""


class Linear(Schedule, tag="linear"):
    beta_min: Number | UnsetType = UNSET
    beta_max: Number | UnsetType = UNSET


class Cosine(Schedule, tag="cosine"):
    offset: Number | UnsetType = UNSET
    end: Number | UnsetType = UNSET


class ScaledLinear(Schedule, tag="scaled_linear"):
    beta_start: Number | UnsetType = UNSET
    beta_end: Number | UnsetType = UNSET
    steps: Steps | UnsetType = UNSET


class Discrete(Schedule, tag="discrete"):
    alphas_cumprod: Annotated[tuple[Number, ...], Meta(min_length=1, max_length=100_000)]


NAMED_SCHEDULES = {"linear": Linear(beta_min=0.1, beta_max=10.0), "cosine": Cosine(), "sd": ScaledLinear()}


def read_schedule(text: str) -> dict[str, Any]:
    """A schedule's kind and parameters, from its name, JSON text or a JSON file. Raises ValueError, with the option."""
    try:
        read = NAMED_SCHEDULES.get(text) or option("--schedule", text, Linear | Cosine | ScaledLinear | Discrete)
    except FileNotFoundError:
        names = ", ".join(NAMED_SCHEDULES)
        raise ValueError(f"--schedule {text}: choose from {names}, or give JSON or a JSON file") from None
    return msgspec.to_builtins(read)


def read_law(flag: str, text: str) -> Components:
    """The components of a mixture, from JSON text or a JSON file.

    Raises ValueError, naming the option, or FileNotFoundError.
    """
    given, name = option(flag, text, dict[str, Any]), named(flag, text)
    law = converted(given, LineMixture if "stds" in given else Mixture, name)
    try:
        if isinstance(law, Mixture):
            return components(law.weights, law.means, law.covariances)
        return components(law.weights, np.array(law.means)[:, None], np.array(law.stds)[:, None, None] ** 2)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def option(flag: str, text: str, kind: Any) -> Any:
    """What an option gives in JSON, or in the file that it names."""
    if is_json(text):
        return from_json(text.encode(errors="surrogateescape"), kind, flag)
    return read_json(text, kind, named(flag, text))


def named(flag: str, text: str) -> str:
    """How messages call it: the option, and the file that it names."""
    return flag if is_json(text) else f"{flag} {text}"


def is_json(text: str) -> bool:
    return text.lstrip().startswith("{")


def show() -> None:
    """The groups of statements, and the controls."""
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "statement")
    for name, theorem in STATEMENTS.items():
        table.add_row(name, theorem.title)
    table.add_section()
    for name in CONTROLS:
        table.add_row(name, "control: a false statement")
    Console().print(table)


if __name__ == "__main__":
    main()
