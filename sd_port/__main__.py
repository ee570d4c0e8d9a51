"""sd-edit: Stable Diffusion from the command line."""

import sys
import warnings

from theory.command_line import one_line, parsed, say

ABOUT = "Generates and edits images with Stable Diffusion, by the solvers of the theory."


def main(argv: list[str] | None = None) -> None:
    """The command `sd-edit`. Exit codes and errors are those of `one_line`."""
    argv = sys.argv[1:] if argv is None else argv
    with one_line("sd-edit"):
        from sd_port.commands.table import COMMANDS  # here, so that an interrupt is one line from the beginning

        if not argv or argv[0] not in COMMANDS:  # for help, or what is wrong
            parsed(COMMANDS, argv, "sd-edit", ABOUT)
        with one_line(program := f"sd-edit {argv[0]}"):
            command = parsed(COMMANDS[argv[0]], argv[1:], program)
            from theory.compilations import LITTLE_MEMORY, collect_rarely, set_flags

            set_flags(LITTLE_MEMORY)
            collect_rarely()
            warnings.showwarning = lambda message, *_: say(program, message)
            command.run()


if __name__ == "__main__":
    main()
