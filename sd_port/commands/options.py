"""What the commands of sd-edit share: checks of their options, progress, and what goes into every record."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from sd_port import nano

Dtype = Literal["float32", "bfloat16", "float16"]


def at_least(args: Any, **least: int) -> None:
    """Raises ValueError, naming the option, for one that is too small."""
    for name, value in least.items():
        if getattr(args, name) < value:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {value}")


def new_file(option: str, path: Path, suffixes: Sequence[str] = (".png",)) -> Path:
    """The path, if a file may be written there. Raises ValueError, naming the option."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{option} {path}: the name must end in {' or '.join(suffixes)}")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"{option} {path}: the folder {path.resolve().parent} does not exist")
    if path.exists():
        raise ValueError(f"{option} {path}: exists already; give another name")
    return path


def guidance_of(model: str, given: float | None) -> float:
    """How much the prompt counts where it is not said: as Stable Diffusion is used, and as nano was measured."""
    return given if given is not None else nano.GUIDANCE if model == "nano" else 7.5
