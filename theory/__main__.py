"""theory-check: every statement of the paper, verified to many digits, in one table."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from theory.command_line import one_line, parsed, said
from theory.compilations import OLD_EMITTERS, collect_rarely, set_flags, stay_on_cpu
from theory.components import Components, components
from theory.contents import CONTROLS, STATEMENTS
from theory.files import held


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


def read_json(flag: str, text: str) -> Any:
    """What the text is in JSON, or the file that it names. Raises ValueError, naming the option."""
    try:
        return json.loads(text if text.lstrip().startswith("{") else Path(text).read_text())
    except OSError as error:
        raise ValueError(f"{flag} {text}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{flag}: is not JSON ({error})") from None


# By name, and by "kind" in JSON, with the parameters of each; `theory.command` makes them.
NAMED_SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear", "beta_min": 0.1, "beta_max": 10.0},
    "cosine": {"kind": "cosine"},
    "sd": {"kind": "scaled_linear"},
}
KINDS: dict[str, dict[str, type]] = {
    "linear": {"beta_min": float, "beta_max": float},
    "cosine": {"offset": float, "end": float},
    "scaled_linear": {"beta_start": float, "beta_end": float, "steps": int},
    "discrete": {"alphas_cumprod": list},
}


def read_schedule(text: str) -> dict[str, Any]:
    """A schedule's kind and parameters, from its name, JSON text or a JSON file. Raises ValueError."""
    if text in NAMED_SCHEDULES:
        return NAMED_SCHEDULES[text]
    if not text.lstrip().startswith("{") and not Path(text).exists():
        raise ValueError(f"--schedule {text}: choose from {', '.join(NAMED_SCHEDULES)}, or give JSON or a JSON file")
    data = read_json("--schedule", text)
    kind = data.pop("kind", None) if isinstance(data, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f'--schedule: needs "kind", one of {", ".join(KINDS)}')
    known = KINDS[kind]
    if kind == "discrete" and not data:
        raise ValueError('--schedule: needs "alphas_cumprod", a list of numbers')
    read: dict[str, Any] = {}
    for name, value in data.items():
        if name not in known:
            raise ValueError(f"--schedule: {kind} has no {name}; it has {', '.join(known)}")
        wanted, description = known[name], {float: "a number", int: "an integer", list: "a list of numbers"}
        numbers = value if wanted is list else [value]
        if not isinstance(numbers, list) or not all(
            type(n) in ((int,) if wanted is int else (int, float)) for n in numbers
        ):
            raise ValueError(f"--schedule: {name} must be {description[wanted]}")
        read[name] = tuple(map(float, numbers)) if wanted is list else wanted(value)
    return {"kind": kind, **read}


def read_law(flag: str, text: str) -> Components:
    """The components of a mixture, from JSON text or a JSON file. Raises ValueError, naming the option."""
    data = read_json(flag, text)
    if not isinstance(data, dict) or set(data) not in (
        {"weights", "means", "covariances"},
        {"weights", "means", "stds"},
    ):
        raise ValueError(f'{flag}: needs the keys "weights", "means" and "covariances" (or "stds" on the line)')
    try:
        if "stds" in data:
            stds, means = np.asarray(data["stds"], float), np.asarray(data["means"], float)
            if stds.ndim != 1 or np.any(stds <= 0):
                raise ValueError(f'"stds" must be a list of positive numbers, got {data["stds"]}')
            return components(data["weights"], means.reshape(len(means), -1), stds[:, None, None] ** 2)
        return components(data["weights"], data["means"], data["covariances"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{flag}: {error}") from None


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
