"""The packages that decide what a picture looks like."""

from importlib.metadata import version


def versions() -> dict[str, str]:
    """Of the packages that decide what a picture looks like."""
    return {name: version(name) for name in ("blessing", "jax", "flax", "numpy")}
