"""What the benchmarks share: networks with the same random weights in both libraries, and a record of what was found.

JAX and torch are imported where they are used: a process that measures the memory of one must not load the other.
"""

import json
import math
import os
import platform
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from sd_port.hardware import processor
from theory.files import write_whole

# A tenth of the temporary memory at the same speed: operations run one by one, each on all threads. As sd-edit sets it.
CPU_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
TOLERANCE_32 = 1e-5  # relative L2 of float32 outputs; torch itself is some 1e-6 from float64
PAUSE = 0.02  # seconds before each call: the threads of the one before wait actively for a while


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Options:
    """What the benchmarks on a CPU take."""

    repeats: int = 5
    threads: int = field(default_factory=cores)
    tiny: bool = False
    """Sizes at which the figures mean nothing and everything is done in seconds, for a test."""
    json: Path | None = None
    """Where to write the results."""

    def title(self, section: str) -> str:
        """Of a table."""
        return f"{section}, float32, {self.threads} threads; {processor()}{'; tiny' if self.tiny else ''}"


def keep_to(threads: int) -> None:
    """Leaves this process as many cores, where the system can: XLA starts a thread for each that it may use."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def keep_compilations(folder: str) -> None:
    """All that JAX compiles, however small."""
    import jax

    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def random_weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor of that name in torch's layout, spread as torch's fresh layers are; the same in every process."""
    values = np.random.default_rng(zlib.crc32(key.encode())).random(shape, dtype=np.float32)
    values -= 0.5
    if len(shape) > 1:
        values *= 2 / math.sqrt(math.prod(shape[1:]))
    else:  # no bias is 0 and no norm's scale 1, which would hide mistakes
        values *= 0.2
        values += key.endswith("weight")
    return values


def with_random_weights(module: Any, dtype: Any) -> Any:
    """An abstract module of ours, filled."""
    from flax import nnx

    from sd_port.weights.checkpoint import LazyTensor
    from sd_port.weights.fill import fill
    from sd_port.weights.names import torch_key, torch_shape

    shapes = {torch_key(path): torch_shape(path, leaf.shape) for path, leaf in nnx.to_flat_state(nnx.state(module))}
    tensors = {
        key: LazyTensor(shape, np.dtype(np.float32), partial(random_weight, key, shape))
        for key, shape in shapes.items()
    }
    return fill(module, tensors, param_dtype=dtype, name=type(module).__name__)


def diffusers_unet(raw: Mapping[str, Any], device: str = "cpu") -> Any:
    """The UNet of a config.json in diffusers, in float32 with the same weights."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**{key: value for key, value in raw.items() if not key.startswith("_")})
    unet = unet.to_empty(device=device).eval()
    with torch.no_grad():
        for key, parameter in unet.named_parameters():
            parameter.copy_(torch.from_numpy(random_weight(key, tuple(parameter.shape))))
    return unet


def seconds(run: Callable[[], Any]) -> float:
    """What one call takes."""
    time.sleep(PAUSE)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Relative L2."""
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def checked(distance: float | None, agrees: bool | None) -> str:
    """A distance in a table; nothing for what the others are compared with."""
    return "" if distance is None else f"{distance:.1e}{'' if agrees else ' DISAGREES'}"


def number(value: float | None) -> str:
    """Three digits."""
    return "" if not value else f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def about(*packages: str) -> dict[str, Any]:
    """Where figures come from: the processor, Python and these packages, None for one that is not installed."""
    versions = {name: _installed(name) for name in packages}
    return {"cpu": processor(), "python": platform.python_version(), "versions": versions}


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write(path: Path, record: Any) -> None:
    """As JSON."""
    write_whole(path, lambda file: file.write(json.dumps(record, indent=1, default=str).encode()))
