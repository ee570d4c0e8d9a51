"""Another one."""

from functools import partial

from tests.toys.trivial import first
from tests.toys.trivial.first import Arrays, Config, plot, rows

__all__ = ["TITLE", "Arrays", "Config", "plot", "rows", "run"]

TITLE = "Second"
run = partial(first.run, title=TITLE)
