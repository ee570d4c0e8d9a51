"""One look for every figure: colours that stay apart for colour-blind readers and in print, small legible type."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

P = ParamSpec("P")

# Okabe & Ito 2008, "Color Universal Design".
ODE, SDE, CYCLE = "#D55E00", "#0072B2", "#009E73"
SAMPLERS = {"ODE": ODE, "SDE": SDE, "Cycle-SDE": CYCLE}
OTHERS = ("#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
INK = "0.35"
TEXT_WIDTH = 7.0  # inches: a page with both columns

STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 2.8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "image.cmap": "Greys",
    "pdf.fonttype": 42,  # letters, not outlines: searchable, and accepted by publishers
    "savefig.dpi": 200,
}


def styled(plot: Callable[P, Figure]) -> Callable[P, Figure]:
    """A plot in this style, wherever it is called from."""

    @wraps(plot)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(STYLE):
            return plot(*args, **kwargs)

    return wrapped


def figure(height: float, width: float = TEXT_WIDTH) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def letter(axes: list[Axes]) -> None:
    """a, b, c ... beside the titles of the panels, for the text to refer to."""
    for axis, name in zip(axes, "abcdefghijklmnop", strict=False):
        axis.annotate(
            name,
            (0, 1),
            xytext=(-6, 5),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="right",
            fontsize=9,
            fontweight="bold",
        )
