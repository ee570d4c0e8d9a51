"""theory-check: every statement of the paper, verified to many digits, in one table."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import tyro

from theory.compilations import OLD_EMITTERS, collect_rarely, set_flags, stay_on_cpu
from theory.components import Components, components
from theory.contents import CONTROLS, STATEMENTS


@dataclasses.dataclass(frozen=True)
class Args:
    """Verifies the contraction theorems of "The Blessing of Randomness" (arXiv 2311.01410) on Gaussian mixtures.

    Exit code 0 if every statement holds (with --controls: if every false statement is caught), 1 if not, 2 for bad
    input.
    """

    only: tuple[str, ...] = ()
    """Check only these groups (see --list)."""
    target: str | None = None
    """The data law as JSON or a JSON file: {"weights": [..], "means": [[..]], "covariances": [[[..]]]}, or on the line
    {"weights": [..], "means": [..], "stds": [..]}. Default: the paper's toy."""
    start: str | None = None
    """The law that the reverse process wrongly starts from, in the same form."""
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
    args = tyro.cli(Args, args=argv, prog="theory-check", config=(tyro.conf.FlagCreatePairsOff,))
    try:
        sys.exit(run(args))
    except ValueError as error:
        print(f"theory-check: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def run(args: Args) -> int:
    """Checks what the arguments ask for and returns the exit code. Raises ValueError for bad input."""
    check(args)
    if args.list:
        show()
        return 0
    given = {"target": args.target, "start": args.start}
    laws = {name: read_law(f"--{name}", text) for name, text in given.items() if text}
    set_flags(OLD_EMITTERS)
    collect_rarely()
    stay_on_cpu()
    from theory.command import verify  # loads what computes

    return verify(args, laws)


def check(args: Args) -> None:
    """Raises ValueError, naming the option, for one that cannot be."""
    known = CONTROLS if args.controls else STATEMENTS
    for name in args.only:
        if name not in known:
            raise ValueError(f"--only {name}: no such name; choose from {', '.join(known)}")
    for flag, path in (("--json", args.json), ("--plot", args.plot)):
        if path is not None and not path.resolve().parent.is_dir():
            raise ValueError(f"{flag} {path}: the folder {path.resolve().parent} does not exist")
    if args.plot and args.plot.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--plot {args.plot}: the name must end in .png, .pdf or .svg")


def read_law(flag: str, text: str) -> Components:
    """The components of a mixture, from JSON text or a JSON file. Raises ValueError, naming the option."""
    try:
        data = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text())
    except OSError as error:
        raise ValueError(f"{flag} {text}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{flag}: is not JSON ({error})") from None
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
