"""Convolution, in the form that is fastest where it runs.

On a GPU or a TPU that is the library's. On a CPU, where XLA's own is up to four times slower than a matrix product of
the same size, 3x3 kernels are brought to matrix products: by Winograd's minimal filtering, which multiplies 16 times
for 4 pixels instead of 36 (Lavin & Gray 2016, arXiv 1509.09308, Sec. 4.1), or, where the image is so small that
transforming the kernel would cost more than it saves, by gathering the nine neighbours of every pixel.
benchmarks/layers.py measures the choice.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Image = Float[Array, "batch _ _ _"]  # (batch, height, width, channels)
Kernel = Float[Array, "k k in_channels out_channels"]

WORK = 2**24  # pixels * inputs * outputs from which on the CPU's own forms pay for the longer compilation
WINOGRAD_PIXELS = 512  # pixels of the whole batch from which on transforming the kernel pays
STRIP = 2**22  # numbers that a strip of a large image may have: its sixteen transforms stay near the processor


def conv(x: Image, kernel: Kernel, stride: int = 1, padding: tuple[int, int] = (1, 1)) -> Image:
    """Cross-correlation with padding (before, after) on both axes, as torch's conv2d."""
    if kernel.shape[:2] == (1, 1) and stride == 1 and padding == (0, 0):
        return x @ kernel[0, 0]
    if _worth_it(x, kernel):
        if stride == 1 and padding == (1, 1) and _pixels(x) >= WINOGRAD_PIXELS:
            return winograd(x, kernel)
        if _pixels(x) / stride**2 < WINOGRAD_PIXELS:
            return gathered(x, kernel, stride, padding)
    return library(x, kernel, stride, padding)


def conv_upsampled(x: Image, kernel: Kernel, height: int, width: int) -> Image:
    """The 3x3 convolution of x after doubling its size (nearest) and cropping it to height x width."""
    if _worth_it(x, kernel) and (height, width) == (2 * x.shape[1], 2 * x.shape[2]):
        return winograd_upsampled(x, kernel)
    return conv(doubled(x)[:, :height, :width], kernel)


def doubled(x: Image) -> Image:
    """Twice the size: every pixel becomes four."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def _worth_it(x: Image, kernel: Kernel) -> bool:
    size, _, inputs, outputs = kernel.shape
    narrow = min(inputs, outputs) < 32
    return jax.default_backend() == "cpu" and size == 3 and not narrow and _pixels(x) * inputs * outputs >= WORK


def _pixels(x: Image) -> int:
    return x.shape[0] * x.shape[1] * x.shape[2]


def library(x: Image, kernel: Kernel, stride: int, padding: tuple[int, int]) -> Image:
    """XLA's convolution."""
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), (padding, padding), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def gathered(x: Image, kernel: Kernel, stride: int, padding: tuple[int, int]) -> Image:
    """One matrix product of every pixel's neighbours, (pixels, 9 in), with the kernel, (9 in, out)."""
    size, outputs = kernel.shape[0], kernel.shape[-1]
    batch, height, width = (x.shape[0], *((n + sum(padding) - size) // stride + 1 for n in x.shape[1:3]))
    padded = jnp.pad(x, ((0, 0), padding, padding, (0, 0)))
    neighbours = [
        padded[:, i : i + stride * (height - 1) + 1 : stride, j : j + stride * (width - 1) + 1 : stride]
        for i in range(size)
        for j in range(size)
    ]
    rows = jnp.concatenate(neighbours, axis=-1).reshape(batch * height * width, -1)
    return (rows @ kernel.reshape(-1, outputs)).reshape(batch, height, width, outputs)


@jax.custom_jvp
def winograd(x: Image, kernel: Kernel) -> Image:
    """F(2x2, 3x3): 2x2 pixels of the output are A' [(G k G') * (B' d B)] A, where d is the 4x4 of x around them."""
    _, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1 + height % 2), (1, 1 + width % 2), (0, 0)))
    transformed = _along_both(_kernel_transform, _grid(kernel, 3))

    def tiles(strip: Image) -> Image:
        rows, columns = (n - 2 for n in strip.shape[1:3])
        d = [[strip[:, i : i + rows - 1 : 2, j : j + columns - 1 : 2] for j in range(4)] for i in range(4)]
        return _interleaved(_along_both(_output_transform, _products(_along_both(_input_transform, d), transformed)))

    return _by_strips(tiles, padded, rows=2, halo=2, scale=1)[:, :height, :width]


@jax.custom_jvp
def winograd_upsampled(x: Image, kernel: Kernel) -> Image:
    """The same for a doubled x, whose 4x4 are made of 3x3 numbers: a row of B' d vanishes, 9 products are left."""
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    transformed = _along_both(_upsampled_kernel_transform, _grid(kernel, 3))

    def tiles(strip: Image) -> Image:
        rows, columns = (n - 2 for n in strip.shape[1:3])
        d = [[strip[:, i : i + rows, j : j + columns] for j in range(3)] for i in range(3)]
        products = _products(_along_both(_upsampled_input_transform, d), transformed)
        return _interleaved(_along_both(_upsampled_output_transform, products))

    return _by_strips(tiles, padded, rows=1, halo=2, scale=2)


# The derivatives are convolutions too. The library's have fast transposes; those of tiles and strips are slow.
@winograd.defjvp
def _(primals, tangents):
    (x, kernel), (dx, dkernel) = primals, tangents
    plain = partial(library, stride=1, padding=(1, 1))
    return winograd(x, kernel), plain(dx, kernel) + plain(x, dkernel)


@winograd_upsampled.defjvp
def _(primals, tangents):
    (x, kernel), (dx, dkernel) = primals, tangents
    plain = partial(library, stride=1, padding=(1, 1))
    return winograd_upsampled(x, kernel), plain(doubled(dx), kernel) + plain(doubled(x), dkernel)


Line = Sequence[Array]
Grid = Sequence[Line]


def _input_transform(d: Line) -> Line:  # B' of Lavin & Gray
    return d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]


def _kernel_transform(k: Line) -> Line:  # G
    return k[0], (k[0] + k[1] + k[2]) / 2, (k[0] - k[1] + k[2]) / 2, k[2]


def _output_transform(m: Line) -> Line:  # A'
    return m[0] + m[1] + m[2], m[1] - m[2] - m[3]


# With d = (a, b, b, c) the third difference is 0 and the second is 2 b, whose 2 cancels the half of G.
def _upsampled_input_transform(d: Line) -> Line:
    return d[0] - d[1], d[1], d[1] - d[2]


def _upsampled_kernel_transform(k: Line) -> Line:
    return k[0], k[0] + k[1] + k[2], k[2]


def _upsampled_output_transform(m: Line) -> Line:
    return m[0] + m[1], m[1] - m[2]


def _grid(kernel: Kernel, size: int) -> Grid:
    return [[kernel[i, j] for j in range(size)] for i in range(size)]


def _along_both(transform: Callable[[Line], Line], grid: Grid) -> Grid:
    """T grid T' for a transform T."""
    columns = list(zip(*[transform(row) for row in grid], strict=True))
    return list(zip(*[transform(column) for column in columns], strict=True))


def _products(d: Grid, kernel: Grid) -> Grid:
    """One matrix product over the channels for every place in the grid."""
    return [[a @ k for a, k in zip(*rows, strict=True)] for rows in zip(d, kernel, strict=True)]


def _interleaved(y: Grid) -> Image:
    """An image from its four interleaved quarters."""
    rows = [jnp.stack(row, axis=3) for row in y]
    batch, height, width, _, channels = rows[0].shape
    return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, channels)


def _by_strips(f: Callable[[Image], Image], x: Image, *, rows: int, halo: int, scale: int) -> Image:
    """f(x) for an f that makes scale * n rows of n + halo; strips of a multiple of `rows` rows if x is large."""
    batch, height, width, channels = x.shape
    if x.size <= STRIP:
        return f(x)
    height -= halo
    strips = math.ceil(height / max(rows, STRIP // (width * channels)))
    step = math.ceil(height / strips / rows) * rows
    x = jnp.pad(x, ((0, 0), (0, strips * step - height), (0, 0), (0, 0)))

    def strip(place: Array) -> Array:
        start = (place // strips, place % strips * step, 0, 0)
        return f(jax.lax.dynamic_slice(x, start, (1, step + halo, width, channels)))[0]

    y = jax.lax.map(strip, jnp.arange(batch * strips))
    return y.reshape(batch, -1, *y.shape[2:])[:, : scale * height]
