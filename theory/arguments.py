"""What callers pass, checked where it is known. Traced values pass: inside jit there is nothing to know or to pay."""

from typing import Any

import numpy as np
from jax.core import Tracer


def check_level(where: str, value: Any, name: str = "lam") -> None:
    """Raises ValueError for a noise level that is negative, infinite or not a number."""
    if not (isinstance(value, Tracer) or np.all((np.asarray(value) >= 0) & np.isfinite(value))):
        raise ValueError(f"{where} needs a noise level {name} that is finite and not negative, got {value}")
