"""An experiment: its own process, and a sign that it has begun; at full size it takes a minute."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from toys.results import Row
from toys.style import figure

TITLE = "First"
SIGNS = "SIGNS_OF_TRIVIAL"  # the folder for the signs


@dataclass(frozen=True)
class Config:
    seconds: float = 60.0

    @classmethod
    def tiny(cls) -> "Config":
        return cls(0.0)


class Arrays(NamedTuple):
    process: np.ndarray


def run(config: Config, title: str = TITLE) -> Arrays:
    Path(os.environ[SIGNS], title).write_text("")
    time.sleep(config.seconds)
    return Arrays(np.asarray(os.getpid()))


def plot(arrays: Arrays) -> Figure:
    made = figure(1.0)
    made.subplots()
    return made


def rows(arrays: Arrays) -> list[Row]:
    return []
