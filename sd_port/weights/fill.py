"""Puts the tensors of a checkpoint into a module that has shapes and no values yet."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from sd_port.models.layers import NoKeys
from sd_port.weights.checkpoint import LazyTensor
from sd_port.weights.names import ParameterPath, Shape, fits, from_torch, spellings, torch_key, torch_shape

Module = TypeVar("Module", bound=nnx.Module)

DROPPED = ("embeddings.position_ids",)  # buffers in files that are no parameters: 0, 1, 2, ... of the text encoder
THREADS = 4  # numpy copies without the GIL; more threads keep more tensors in memory at a time
_SHOWN = 8


class _Slot(NamedTuple):
    """A parameter, the key it has in the file, and the tensor there."""

    path: ParameterPath
    shape: Shape
    key: str
    tensor: LazyTensor


def abstract(
    model: Callable[..., Module],
    config: Any,
    *,
    dtype: DTypeLike = jax.numpy.float32,
    param_dtype: DTypeLike = jax.numpy.float32,
) -> Module:
    """The module `model(config, ...)` with the shapes of its parameters and no values, for `fill`."""
    return nnx.eval_shape(lambda: model(config, dtype=dtype, param_dtype=param_dtype, rngs=NoKeys()))


def fill(
    abstract_module: Module,
    tensors: Mapping[str, LazyTensor],
    *,
    param_dtype: DTypeLike,
    name: str,
    sharding: jax.sharding.Sharding | None = None,
) -> Module:
    """The module with its parameters read from `tensors`, cast to `param_dtype` and placed by `sharding`.

    `abstract_module` comes from `abstract` or nnx.eval_shape and has parameters only. `name` is for messages, say
    "unet". Keys may be spelled as in `names.spellings`.

    Raises ValueError, listing every fault in one line, where a parameter has no tensor or two, a tensor has no
    parameter, a shape differs, a tensor is not of floating numbers, overflows `param_dtype` or is not finite.
    """
    graph, state = nnx.split(abstract_module, nnx.Param)
    slots = _match([(path, leaf.shape) for path, leaf in nnx.to_flat_state(state)], tensors, name)
    dtype = np.dtype(param_dtype)

    def value(slot: _Slot) -> jax.Array:
        try:
            array = from_torch(slot.path, slot.shape, slot.tensor.load(), dtype)
        except FloatingPointError:
            raise ValueError(f"{name}: {slot.key} has numbers too large for {dtype}; use another param_dtype") from None
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: {slot.key} has numbers that are not finite: the file is damaged; get it anew")
        return jax.device_put(array, sharding)

    # The largest first: what a large one needs on its way is gone before the module is in memory.
    order = sorted(slots, key=lambda slot: -np.prod(slot.shape))
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        values = dict(zip([slot.path for slot in order], pool.map(value, order), strict=True))
    filled = [(path, leaf.replace(values[path])) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _match(
    parameters: Sequence[tuple[ParameterPath, Shape]], tensors: Mapping[str, LazyTensor], name: str
) -> list[_Slot]:
    slots, used = [], set()
    missing, doubled, misshapen, not_floating = [], [], [], []
    for path, shape in parameters:
        wanted = torch_key(path)
        held = [key for key in spellings(wanted) if key in tensors and key not in used]
        used |= set(held)
        if not held:
            missing.append(wanted)
            continue
        key = held[0]
        tensor = tensors[key]
        slots.append(_Slot(path, shape, key, tensor))
        if len(held) > 1:
            doubled.append(" = ".join(held))
        if not fits(path, shape, tensor.shape):
            misshapen.append(f"{key} {tensor.shape} where {torch_shape(path, shape)} is expected")
        if not jax.numpy.issubdtype(tensor.dtype, np.floating):
            not_floating.append(f"{key} ({tensor.dtype})")
    dropped = {key for key in tensors if any(key == d or key.endswith("." + d) for d in DROPPED)}
    faults = {
        "missing": missing,
        "not of this model": sorted(tensors.keys() - used - dropped),
        "of another shape": misshapen,
        "given twice": doubled,
        "not floating": not_floating,
    }
    if any(faults.values()):
        lines = [f"{len(names)} {what}: {_some(names)}" for what, names in faults.items() if names]
        raise ValueError(f"{name}: the checkpoint does not fit the model: " + "; ".join(lines))
    return slots


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
