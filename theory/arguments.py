"""What callers pass, checked where it is known. Traced values pass: inside jit there is nothing to know or to pay."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jax.core import Tracer
from jax.tree_util import Partial, all_leaves, register_static


def check_level(where: str, value: Any, name: str = "lam") -> None:
    """Raises ValueError for a noise level that is negative, infinite or not a number."""
    if not (isinstance(value, Tracer) or np.all((np.asarray(value) >= 0) & np.isfinite(value))):
        raise ValueError(f"{where} needs a noise level {name} that is finite and not negative, got {value}")


def check_decreasing(where: str, ts: Any) -> None:
    """Raises ValueError for a grid of times that grows somewhere, or is not a number; a time may be repeated."""
    if isinstance(ts, Tracer):
        return
    times = np.asarray(ts)
    falls = np.diff(times) <= 0
    if not falls.all():
        i = int(np.argmin(falls))
        raise ValueError(f"{where}: ts must decrease, got {times[i]:g} and then {times[i + 1]:g} (place {i + 1})")


def as_partial(fn: Callable) -> Callable:
    """A bare function, method or lambda as a Partial, which jit takes: the same function does not trace again."""
    return Partial(fn) if all_leaves((fn,)) else fn


def as_static(schedule: Any) -> Any:
    """The schedule, whose class JAX now knows as static: told apart by its hash, and part of the program.

    Raises ValueError for one that lacks methods of a `Schedule`, and for one without a hash.
    """
    if not all_leaves((schedule,)):
        return schedule
    name = type(schedule).__name__
    needed = ("log_alpha", "alpha", "sigma", "log_snr", "t_of_log_snr", "f", "beta")
    if lacking := [method for method in needed if not callable(getattr(schedule, method, None))]:
        raise ValueError(f"{name} is not a schedule (theory.types.Schedule): it lacks {', '.join(lacking)}")
    if type(schedule).__hash__ is None:
        raise ValueError(f"{name} has no hash, by which JAX tells schedules apart: make it a frozen dataclass")
    register_static(type(schedule))
    return schedule
