"""LPIPS: how different two pictures look, by the activations of AlexNet (Zhang et al. 2018, arXiv 1801.03924).

The weights are not part of this project: AlexNet's are torchvision's `alexnet-owt-*.pth`, the heads are
`lpips/weights/v0.1/alex.pth` of the package lpips.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sd_port.models.layers import Image
from sd_port.weights.checkpoint import LazyTensor
from sd_port.weights.legacy import open_any

SIZE = 224  # pixels to which pictures are brought, as in DragDiffusion's evaluator
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of ImageNet's colours in [-1, 1]
NO_LENGTH = 1e-10  # what is added to the length of a vector, so that one of zeros can be divided


class Layer(NamedTuple):
    """A convolution of AlexNet: its number in torchvision, kernel size, channels, and what comes before it."""

    number: int
    size: int
    inputs: int
    outputs: int
    stride: int
    pooled: bool


# Krizhevsky 2014 (arXiv 1404.5997), the variant of one GPU; a ReLU follows each.
LAYERS = (
    Layer(0, 11, 3, 64, 4, False),
    Layer(3, 5, 64, 192, 1, True),
    Layer(6, 3, 192, 384, 1, True),
    Layer(8, 3, 384, 256, 1, False),
    Layer(10, 3, 256, 256, 1, False),
)


class LPIPS(NamedTuple):
    """The weights, a leaf for each layer: kernels (size, size, in, out), biases (out,), heads (out,)."""

    kernels: tuple[Float[Array, "_ _ _ _"], ...]
    biases: tuple[Float[Array, "_"], ...]
    heads: tuple[Float[Array, "_"], ...]


def read_lpips(alexnet: str | Path, heads: str | Path) -> LPIPS:
    """Reads torchvision's state dict of AlexNet and the heads of the package lpips, .pth or .safetensors.

    Raises ValueError, in one line with the file, for files that cannot be read and for tensors that are missing, of
    another shape, or not known, and FileNotFoundError where there is none.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for number, size, inputs, outputs, *_ in LAYERS:
        shapes |= {
            f"features.{number}.weight": (outputs, inputs, size, size),
            f"features.{number}.bias": (outputs,),
        }
    body = _tensors(alexnet, shapes, unused="classifier.")  # what tells classes apart is not asked
    top = _tensors(heads, {f"lin{i}.model.1.weight": (1, layer.outputs, 1, 1) for i, layer in enumerate(LAYERS)})
    return LPIPS(
        kernels=tuple(body[f"features.{layer.number}.weight"].transpose(2, 3, 1, 0) for layer in LAYERS),
        biases=tuple(body[f"features.{layer.number}.bias"] for layer in LAYERS),
        heads=tuple(head.reshape(-1) for head in top.values()),
    )


def _tensors(path: str | Path, shapes: Mapping[str, tuple[int, ...]], unused: str | None = None) -> dict[str, Array]:
    """The tensors of these names and shapes, float32."""
    held: Mapping[str, LazyTensor] = open_any(Path(path))
    for name, shape in shapes.items():
        if name not in held:
            raise ValueError(f"{path}: there is no {name}")
        if held[name].shape != shape:
            raise ValueError(f"{path}: {name} has the shape {held[name].shape}, and {shape} is expected")
    for name in sorted(held.keys() - shapes.keys()):
        if unused is None or not name.startswith(unused):
            raise ValueError(f"{path}: has {name}, which is not known here")
    return {name: jnp.asarray(held[name].load(), jnp.float32) for name in shapes}


def image_fidelity(weights: LPIPS, a: np.ndarray, b: np.ndarray) -> float:
    """IF = 1 - LPIPS of two pictures (height, width, 3) in [0, 1], each brought to 224 x 224; 1 for the same.

    Shi et al. 2024 (arXiv 2306.14435), as in `run_eval_similarity.py` of its code.
    """
    pair = [jnp.asarray(image, jnp.float32)[None] for image in (a, b)]
    return 1 - float(lpips(weights, *map(_resized, pair))[0])


@jax.jit
def _resized(images: Image) -> Image:
    """Bilinear without a filter, as torch's interpolate: between the four nearest pixels however large the step."""
    return jax.image.resize(images, (len(images), SIZE, SIZE, 3), "linear", antialias=False)


@jax.jit
def lpips(weights: LPIPS, a: Image, b: Image) -> Float[Array, "batch"]:
    """LPIPS, version 0.1 with AlexNet, of pictures (batch, height, width, 3) in [0, 1] at their own size. Eq. (1).

    After every layer: activations of unit length over channels, their squared difference weighed by channel and
    averaged over places; the sum of all layers. At least 31 pixels high and wide.
    """
    distance = jnp.zeros(len(a), jnp.float32)
    for x, y, head in zip(*(_activations(weights, images) for images in (a, b)), weights.heads, strict=True):
        squared = (_unit(x) - _unit(y)) ** 2
        distance += (squared * head[None, None, None]).sum(axis=-1).mean(axis=(1, 2))
    return distance


def _activations(weights: LPIPS, images: Image) -> list[Image]:
    """After each ReLU of AlexNet."""
    shift, scale = (jnp.array(values, jnp.float32)[None, None, None] for values in (SHIFT, SCALE))
    x, found = (2 * images - 1 - shift) / scale, []
    for layer, kernel, bias in zip(LAYERS, weights.kernels, weights.biases, strict=True):
        if layer.pooled:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
        x = jax.nn.relu(_convolved(x, kernel, layer) + bias[None, None, None])
        found.append(x)
    return found


def _convolved(x: Image, kernel: Float[Array, "_ _ _ _"], layer: Layer) -> Image:
    padding = (2, 2) if layer.size == 11 else (layer.size // 2, layer.size // 2)
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (layer.stride, layer.stride),
        (padding, padding),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,  # on a GPU the default keeps ten bits
    )


def _unit(x: Image) -> Image:
    return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + NO_LENGTH)
