"""What callers pass, checked and brought into form before it is traced. Traced values pass: nothing is known of them.

@prepared(eps_fn=as_partial, ts=decreasing)
@jax.jit
def sample(solver, eps_fn, x, ts, key): ...
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import numpy as np
from jax.core import Tracer
from jax.tree_util import Partial, all_leaves, register_static

F = TypeVar("F", bound=Callable[..., Any])


def prepared(**steps: Callable[[Any], Any]) -> Callable[[F], F]:
    """Passes the arguments of these names through these functions first; their ValueError says where it was."""

    def decorate(function: F) -> F:
        signature, where = inspect.signature(function), getattr(function, "__name__", "")

        def bound(args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
            given = signature.bind(*args, **kwargs)
            for name in [name for name in steps if name in given.arguments]:
                try:
                    given.arguments[name] = steps[name](given.arguments[name])
                except ValueError as error:
                    raise ValueError(f"{where}: {name} {error}") from None
            return given

        @wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            given = bound(args, kwargs)
            return function(*given.args, **given.kwargs)

        def lower(*args: Any, **kwargs: Any) -> Any:
            given = bound(args, kwargs)
            return cast(Any, function).lower(*given.args, **given.kwargs)

        if hasattr(function, "lower"):  # of a jitted function, to compile ahead
            cast(Any, called).lower = lower
        return cast(F, called)

    return decorate


def level(value: Any) -> Any:
    """A noise level, which is not negative, not infinite, and a number. Raises ValueError otherwise."""
    if not (isinstance(value, Tracer) or np.all((np.asarray(value) >= 0) & np.isfinite(value))):
        raise ValueError(f"must be finite and not negative, got {value}")
    return value


def decreasing(ts: Any) -> Any:
    """A grid of times, which decreases; a time may be repeated. Raises ValueError otherwise."""
    if not isinstance(ts, Tracer):
        times = np.asarray(ts)
        falls = np.diff(times) <= 0
        if not falls.all():
            i = int(np.argmin(falls))
            raise ValueError(f"must decrease, got {times[i]:g} and then {times[i + 1]:g} (place {i + 1})")
    return ts


def as_partial(fn: Callable) -> Callable:
    """A bare function, method or lambda as a Partial, which jit takes: the same function does not trace again."""
    return Partial(fn) if all_leaves((fn,)) else fn


SCHEDULE = ("log_alpha", "alpha", "sigma", "log_snr", "t_of_log_snr", "f", "beta")


def as_static(schedule: Any) -> Any:
    """A schedule, whose class JAX now knows as static: told apart by its hash, and part of the program.

    Raises ValueError for one that lacks methods of `theory.types.Schedule`, and for one without a hash.
    """
    if all_leaves((schedule,)):
        name = type(schedule).__name__
        if lacking := [method for method in SCHEDULE if not callable(getattr(schedule, method, None))]:
            raise ValueError(f"({name}) is not a theory.types.Schedule: it lacks {', '.join(lacking)}")
        if type(schedule).__hash__ is None:
            raise ValueError(f"({name}) has no hash, by which JAX tells schedules apart: make it a frozen dataclass")
        register_static(type(schedule))
    return schedule
