"""SDE against ODE, paired by scene: differences with bootstrap intervals, and whether they are what theory predicts."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from sd_port.experiments.judge import Judged
from sd_port.metrics.bootstrap import LEVEL, Interval, bootstrap
from toys.results import Row

TO_TRUTHS = "MMD² to the truths of other scenes"


class Measure(NamedTuple):
    """A field of `Judged`: its name in a figure and in a table, and whether it is a matter of the law of the results.

    Theorems 3.1 and 3.3 say of an SDE, and of Cycle-SDE, that the law of its results comes nearer to that of the data;
    Theorem 3.2 that the ODE's stays as far. Of where in that law one result lies they say nothing.
    """

    short: str
    what: str
    by_law: bool = False


MEASURES = {
    "away": Measure("to target, px", "from the target, px"),
    "undone": Measure("not as asked", "share of what was asked for that is not there"),
    "reflection": Measure("reflection to sun, px", "from the reflection to below the sun, px", by_law=True),
    "others": Measure("others moved, px", "other things moved, px"),
    "facts": Measure("facts lost", "share of other facts that are lost"),
    "ghosts": Measure("ghosts", "boats and islands too many", by_law=True),
    "light": Measure("light", "light: RMS to the truth on boat and peak"),
    "residual": Measure("residual", "residual: RMS to the nearest scene", by_law=True),
    "rmse": Measure("RMS to truth", "RMS to the truth"),
}


class Cell(NamedTuple):
    """Results of both methods on the same scenes."""

    name: str
    ode: Judged
    sde: Judged


def paired(ode: Float[np.ndarray, " n"], sde: Float[np.ndarray, " n"]) -> Interval:
    """SDE less ODE over the same scenes: negative where SDE is better, as of all measures less is."""
    return bootstrap(sde - ode)


def verdict(difference: Interval) -> str:
    """What the interval says of SDE, by itself: it is not widened for being one of many."""
    return "wins" if difference.high < 0 else "loses" if difference.low > 0 else "ties"


def row(
    what: str, first: Float[np.ndarray, " n"], second: Float[np.ndarray, " n"], names: tuple[str, str] = ("ODE", "SDE")
) -> Row:
    """The second less the first, with its interval, what that says of the second, and both means."""
    off = paired(first, second)
    means = f"{names[0]} {first.mean():.4g}, {names[1]} {second.mean():.4g}"
    return Row(
        what, off.mean, off.error, remark=f"{off.low:+.3g} to {off.high:+.3g}: {names[1]} {verdict(off)}; {means}"
    )


def differences(cells: Sequence[Cell], measures: Sequence[str]) -> list[Row]:
    """A row for every cell and measure."""
    return [
        row(f"{cell.name}: {MEASURES[name].what}", getattr(cell.ode, name), getattr(cell.sde, name))
        for cell in cells
        for name in measures
    ]


def to_the_data(cells: Sequence[Cell], mmds: Float[np.ndarray, "*axes methods 2"]) -> list[Row]:
    """The squared MMD between each cell's results and `TO_TRUTHS`, with the p-value of both being of one law."""
    found = []
    for cell, (ode, sde) in zip(cells, mmds.reshape(-1, 2, 2), strict=True):
        remark = f"p = {sde[1]:.2g}; ODE {ode[0]:.3g}, p = {ode[1]:.2g}"
        found.append(Row(f"{cell.name}: {TO_TRUTHS}, SDE", float(sde[0]), remark=remark))
    return found


def summary(cells: Sequence[Cell], measures: Sequence[str]) -> list[Row]:
    """In how many comparisons SDE wins: of those that the theorems speak of, and of the others."""
    found = []
    for by_law, what in ((True, "of what the theorems speak"), (False, "of what they leave open")):
        verdicts: dict[str, list[str]] = {"wins": [], "ties": [], "loses": []}
        for cell, name in itertools.product(cells, measures):
            if MEASURES[name].by_law == by_law:
                off = paired(getattr(cell.ode, name), getattr(cell.sde, name))
                verdicts[verdict(off)].append(f"{cell.name} ({name})")
        wins, ties, losses = map(len, verdicts.values())
        lost = f"; SDE loses: {', '.join(verdicts['loses'])}" if losses else ""
        count = wins + ties + losses
        chance = f"{(1 - LEVEL) / 2 * count:.1f} of each by chance alone, were there no difference"
        remark = f"of {count}, with {ties} ties and {losses} losses; {chance}{lost}"
        found.append(Row(f"**comparisons that SDE wins, {what}**", float(wins), remark=remark))
    return found
