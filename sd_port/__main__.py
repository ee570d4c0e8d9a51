"""sd-edit: Stable Diffusion from the command line."""

import sys
import warnings

import tyro

from sd_port.commands.bench import BenchCommand
from sd_port.commands.demo import Demo
from sd_port.commands.generate import Generate
from sd_port.commands.lora import LoraCommand
from sd_port.commands.models import Models
from sd_port.commands.replay import EDITS, Replay
from sd_port.experiments.command import ExperimentsCommand
from theory.compilations import LITTLE_MEMORY, collect_rarely, set_flags

COMMANDS = {
    "generate": Generate,
    **EDITS,
    "lora": LoraCommand,
    "replay": Replay,
    "bench": BenchCommand,
    "experiments": ExperimentsCommand,
    "demo": Demo,
    "models": Models,
}


def main(argv: list[str] | None = None) -> None:
    """The command `sd-edit`. Exit code 2, with one line, for input that cannot be used."""
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        args=argv,
        prog="sd-edit",
        description="Generates and edits images with Stable Diffusion, by the solvers of the theory.",
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    set_flags(LITTLE_MEMORY)
    collect_rarely()
    warnings.showwarning = lambda message, *_: print(f"sd-edit: {message}", file=sys.stderr)
    try:
        command.run()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"sd-edit: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
