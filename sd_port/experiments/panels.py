"""What the figures of the experiments share: rows of pictures, and differences with their intervals."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes

from sd_port.experiments.compare import MEASURES, Cell, paired, verdict
from toys.style import CYCLE, INK, ODE

# Colours and shapes say the same, for readers without colours.
VERDICTS = {"wins": (CYCLE, "o"), "ties": (INK, "|"), "loses": (ODE, "s")}


def pictures(axes: Any, images: Float[np.ndarray, "rows columns _ _ 3"], rows: Sequence[str], columns: Sequence[str]):
    """A table of pictures on axes of the same shape, with names above and on the left."""
    for i, name in enumerate(rows):
        for j, title in enumerate(columns):
            axis: Axes = axes[i, j]
            axis.imshow(np.clip(images[i, j], 0, 1), interpolation="nearest")
            axis.set(xticks=[], yticks=[], title=title if i == 0 else "")
            axis.spines[:].set_visible(False)
        axes[i, 0].set_ylabel(name)


def forest(axes: Sequence[Axes], cells: Sequence[Cell], measures: Sequence[str]) -> None:
    """For each measure a panel of SDE less ODE in every cell; left of the line SDE is better."""
    for axis, name in zip(axes, measures, strict=True):
        axis.axvline(0, color=INK, lw=0.6)
        for i, cell in enumerate(cells):
            off = paired(getattr(cell.ode, name), getattr(cell.sde, name))
            colour, marker = VERDICTS[verdict(off)]
            axis.plot([off.low, off.high], [i, i], color=colour, lw=1)
            axis.plot([off.mean], [i], color=colour, marker=marker, ls="")
        axis.set(ylim=(len(cells) - 0.5, -0.5), yticks=[], title=MEASURES[name].short)
        axis.set_xlabel("SDE less ODE")
    axes[0].set_yticks(range(len(cells)), [cell.name for cell in cells])


def legend(axis: Axes) -> None:
    """The names of the verdicts."""
    for name, (colour, marker) in VERDICTS.items():
        axis.plot([], [], color=colour, marker=marker, lw=1, label=f"SDE {name}")


def line(axis: Axes, x: Any, values: Float[np.ndarray, "points n"], **style: Any) -> None:
    """Means over scenes with two standard errors."""
    error = values.std(axis=1) / np.sqrt(values.shape[1])
    axis.errorbar(x, values.mean(axis=1), 2 * error, marker="o", ms=2.5, elinewidth=0.8, **style)
