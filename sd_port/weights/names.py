"""From the path of a parameter to its key in a checkpoint, and from torch's layout to ours.

The names are the same but for the last word, and a kernel has its axes in another order:

    Linear.kernel      (in, out)                 weight (out, in)
    Conv.kernel        (height, width, in, out)  weight (out, in, height, width)
    Norm.scale, Embed.embedding, bias            weight, weight, bias: as they are
"""

import re
from typing import Any

import numpy as np

from sd_port.weights.checkpoint import empty

ParameterPath = tuple[Any, ...]  # names and places in lists
Shape = tuple[int, ...]

_WORDS = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}

# The layers of the VAE's attention: of diffusers now, of diffusers before 0.12, and of the LDM repository.
_VAE_ATTENTION = {
    "group_norm": ("norm",),
    "to_q": ("query", "q"),
    "to_k": ("key", "k"),
    "to_v": ("value", "v"),
    "to_out.0": ("proj_attn", "proj_out"),
}
_VAE_LAYER = re.compile(r"(.*attentions\.\d+\.)(group_norm|to_q|to_k|to_v|to_out\.0)\.(weight|bias)")

BLOCK = 16  # columns a copy: a cache line of float32 is written whole. Twice as fast as one strided copy


def torch_key(path: ParameterPath) -> str:
    """('encoder', 'layers', 0, 'mlp', 'fc1', 'kernel') -> 'encoder.layers.0.mlp.fc1.weight'."""
    return ".".join(map(str, (*path[:-1], _WORDS[str(path[-1])])))


def spellings(key: str) -> tuple[str, ...]:
    """All keys under which files hold this one: with transformers' old prefix, and the old names of VAE attention."""
    names = [key]
    if match := _VAE_LAYER.fullmatch(key):
        block, layer, word = match.groups()
        names += [f"{block}{old}.{word}" for old in _VAE_ATTENTION[layer]]
    return (*names, f"text_model.{key}")


def torch_shape(path: ParameterPath, shape: Shape) -> Shape:
    """The shape in a checkpoint of the parameter at `path`, of shape `shape` here."""
    return (shape[-1], shape[-2], *shape[:-2]) if path[-1] == "kernel" else shape


def fits(path: ParameterPath, shape: Shape, held: Shape) -> bool:
    """Whether a tensor of shape `held` can fill the parameter; a 1x1 convolution and a Linear are the same."""
    wanted = torch_shape(path, shape)
    if path[-1] == "kernel":
        wanted, held = (shape[:2] if shape[2:] == (1, 1) else shape for shape in (wanted, held))
    return wanted == held


def from_torch(path: ParameterPath, shape: Shape, tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The value of a parameter, in its layout and dtype. Raises FloatingPointError where it overflows the dtype."""
    if path[-1] != "kernel" and tensor.dtype == dtype:
        return tensor.reshape(shape)
    value = empty(shape, dtype)
    with np.errstate(over="raise"):
        if path[-1] == "kernel":
            turned = tensor.reshape(torch_shape(path, shape)).transpose(*range(2, len(shape)), 1, 0)
            for i in range(0, shape[-1], BLOCK):
                value[..., i : i + BLOCK] = turned[..., i : i + BLOCK]
        else:
            value[...] = tensor.reshape(shape)
    return value


def to_torch(path: ParameterPath, value: np.ndarray) -> np.ndarray:
    """The inverse of from_torch, in the dtype it has."""
    if path[-1] != "kernel":
        return np.ascontiguousarray(value)
    return np.ascontiguousarray(value.transpose(-1, -2, *range(value.ndim - 2)))
