"""python -m tests.toys.trivial OUT [--tiny]"""

import signal
import sys
from pathlib import Path

from toys import runner

NAMES = ("first", "second")
SUITE = runner.Suite("tests.toys.trivial", NAMES, "Trivial", "# Trivial\n", ("toys",), at_once=NAMES)


def main() -> None:
    """Exit code 130 where it is interrupted, also if a shell started it in the background, with interrupts ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        runner.run(SUITE, runner.Options(Path(sys.argv[1]), NAMES, tiny="--tiny" in sys.argv))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
