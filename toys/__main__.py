"""toy-figures: every toy experiment as figures, arrays and tables."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from theory.command_line import one_line, parsed
from theory.compilations import OLD_EMITTERS, collect_rarely, compile_hastily, keep_compilations, set_flags, stay_on_cpu
from toys import runner
from toys.runner import Options, Suite

EXPERIMENTS = (
    "priors",
    "kl",
    "plane",
    "learned",
    "guidance",
    "steps",
    "cycles",
    "drag",
)  # modules of this package, in reading order


def prepare(tiny: bool) -> None:
    """Sets up this process: float64, and how programs are traced, compiled and kept."""
    set_flags(OLD_EMITTERS)
    collect_rarely()
    import jax  # here, so that options are checked before it is loaded

    jax.config.update("jax_enable_x64", True)
    stay_on_cpu()
    keep_compilations()
    compile_hastily(tiny)


SUITE = Suite(
    package="toys",
    names=EXPERIMENTS,
    label="Toys",
    heading="# The toy experiments in numbers\n\n"
    "Errors are standard errors of samples; `exact` is known otherwise than by sampling.\n",
    folders=("theory", "toys"),
    at_once=("learned", "plane", "kl", "drag", "guidance", "steps", "cycles", "priors"),
    prepare=prepare,
)


@dataclass(frozen=True)
class Args(Options):
    """Draws the figures of the toy experiments, and writes their arrays and numbers beside them.

    What is there already, from the same configuration, versions and sources, is not computed again.
    """

    out: Path = Path("out/toys")
    only: tuple[str, ...] = EXPERIMENTS


def main(argv: list[str] | None = None) -> None:
    """The command `toy-figures`."""
    with one_line("toy-figures"):
        args = parsed(Args, argv, "toy-figures")
        runner.check(SUITE, args)
        run(args)
    sys.exit(0)


def experiment(name: str) -> Any:
    """The module of an experiment: TITLE, Config, Arrays, run, plot and rows."""
    return SUITE.experiment(name)


def run(args: Args) -> None:
    """Makes what the arguments ask for. Raises OSError where it cannot write."""
    if args.list:
        runner.show(SUITE)
        return
    prepare(args.tiny)
    runner.run(SUITE, args)


if __name__ == "__main__":
    from toys.__main__ import main as named

    named()  # by the module's name, by which other processes find what is defined here
