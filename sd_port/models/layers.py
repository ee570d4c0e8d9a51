"""Layers with the names and layouts of diffusers, a dtype policy, and a low-rank adapter on every kernel.

Parameters are kept in `param_dtype` and cast to `dtype` where they are used; statistics of normalisation are float32
whatever these are. Images are NHWC. Attribute names are those of diffusers, so that the path of a parameter here is
its key in a checkpoint but for the last word (weights/names.py).
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

from sd_port.models.conv import conv, conv_upsampled

Features = Float[Array, "*batch _"]
Image = Float[Array, "batch _ _ _"]  # (batch, height, width, channels)
Tokens = Float[Array, "batch _ _"]  # (batch, tokens, features)


class Adapter(nnx.Variable):
    """A trainable matrix of a low-rank adapter; its own type, so that it can be told from the model's parameters."""


class AdapterScale(nnx.Variable):
    """The factor alpha / rank of an adapter. Multiplied by lora_scale it may be traced: no new compilation."""


class NoKeys(nnx.Rngs):
    """In place of random keys: parameters that get their values from a file need none, and are 0 until then."""

    def __init__(self):
        pass

    def params(self) -> None:
        return None


UNIFORM = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch's default


def drawn(init: nnx.Initializer, rngs: nnx.Rngs, shape: Sequence[int], dtype: DTypeLike) -> Array:
    """The first value of a parameter."""
    key = rngs.params()
    return jnp.zeros(shape, dtype) if key is None else init(key, shape, dtype)


class LoRA(nnx.Module):
    """The low-rank change of a kernel, W + (alpha / rank) down up (Hu et al. 2022, arXiv 2106.09685, Sec. 4.1).

    `down` has the shape of the kernel but `rank` outputs: (in, rank), or (height, width, in, rank) for a convolution
    (LoCon), whose stride and padding it shares. `up` is (rank, out). Both float32.
    """

    def __init__(self, down: ArrayLike, up: ArrayLike, alpha: float):
        self.down = Adapter(jnp.asarray(down, jnp.float32))
        self.up = Adapter(jnp.asarray(up, jnp.float32))
        self.scale = AdapterScale(jnp.asarray(alpha / self.rank, jnp.float32))

    @classmethod
    def fresh(cls, kernel_shape: Sequence[int], rank: int, *, alpha: float | None = None, rngs: nnx.Rngs) -> "LoRA":
        """An adapter to train: `up` is 0, so it changes nothing yet. alpha is the rank unless given."""
        down = nnx.initializers.he_uniform()(rngs.params(), (*kernel_shape[:-1], rank), jnp.float32)
        return cls(down, jnp.zeros((rank, kernel_shape[-1]), jnp.float32), float(rank) if alpha is None else alpha)

    @property
    def rank(self) -> int:
        return self.up.shape[0]


class Linear(nnx.Module):
    """x kernel + bias: (*batch, in) -> (*batch, out)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(drawn(UNIFORM, rngs, (in_features, out_features), param_dtype))
        self.bias = nnx.Param(jnp.zeros(out_features, param_dtype)) if bias else None
        self.lora: LoRA | None = nnx.data(None)
        self.dtype = dtype

    def __call__(self, x: Features) -> Features:
        x = x.astype(self.dtype)
        y = x @ self.kernel[...].astype(self.dtype)
        if self.bias is not None:
            y = y + jnp.broadcast_to(self.bias[...].astype(self.dtype), y.shape)
        if self.lora is not None:
            y = y + _scaled(x @ self.lora.down[...].astype(self.dtype), self.lora, self.dtype)
        return y


class Conv(nnx.Module):
    """A square convolution: (batch, height, width, in) -> (batch, height', width', out); kernel (k, k, in, out).

    `padding` is that of torch, on both sides, or a pair (before, after).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int = 3,
        *,
        stride: int = 1,
        padding: int | tuple[int, int] | None = None,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(drawn(UNIFORM, rngs, (size, size, in_channels, out_channels), param_dtype))
        self.bias = nnx.Param(jnp.zeros(out_channels, param_dtype))
        self.lora: LoRA | None = nnx.data(None)
        self.stride = stride
        padding = size // 2 if padding is None else padding
        self.padding = padding if isinstance(padding, tuple) else (padding, padding)
        self.dtype = dtype

    def __call__(self, x: Image) -> Image:
        return self._apply(x, lambda x, kernel: conv(x, kernel, self.stride, self.padding))

    def upsampled(self, x: Image, height: int, width: int) -> Image:
        """The convolution of x after doubling its size (nearest), cropped to height x width."""
        return self._apply(x, lambda x, kernel: conv_upsampled(x, kernel, height, width))

    def _apply(self, x: Image, convolve: Callable[[Array, Array], Array]) -> Image:
        x = x.astype(self.dtype)
        y = convolve(x, self.kernel[...].astype(self.dtype))
        y = y + jnp.broadcast_to(self.bias[...].astype(self.dtype), y.shape)
        if self.lora is not None:
            y = y + _scaled(convolve(x, self.lora.down[...].astype(self.dtype)), self.lora, self.dtype)
        return y


def _scaled(low: Array, lora: LoRA, dtype: DTypeLike) -> Array:
    return (low @ lora.up[...].astype(dtype)) * lora.scale[...].astype(dtype)


class GroupNorm(nnx.Module):
    """Normalises groups of channels over all pixels (Wu & He 2018, arXiv 1803.08494): any (batch, ..., channels)."""

    def __init__(
        self,
        groups: int,
        channels: int,
        *,
        eps: float,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.scale = nnx.Param(jnp.ones(channels, param_dtype))
        self.bias = nnx.Param(jnp.zeros(channels, param_dtype))
        self.groups, self.eps, self.dtype = groups, eps, dtype

    def __call__(self, x: Array) -> Array:
        """One pass over x: per-channel sums, then everything is a multiply-add by channel."""
        batch, channels = x.shape[0], x.shape[-1]
        width = channels // self.groups
        pixels = x.astype(jnp.float32).reshape(batch, -1, channels)
        mean, square = (
            sums.reshape(batch, self.groups, width).sum(-1) / (pixels.shape[1] * width)
            for sums in (pixels.sum(1), (pixels * pixels).sum(1))
        )
        inverse = jax.lax.rsqrt(jnp.maximum(square - mean**2, 0) + self.eps)
        mean, inverse = (jnp.repeat(of_groups, width, axis=1) for of_groups in (mean, inverse))
        slope = inverse * self.scale[...].astype(jnp.float32)[None]
        offset = self.bias[...].astype(jnp.float32)[None] - mean * slope
        return (pixels * slope[:, None] + offset[:, None]).reshape(x.shape).astype(self.dtype)


class LayerNorm(nnx.Module):
    """Normalises the last axis (Ba et al. 2016, arXiv 1607.06450)."""

    def __init__(
        self, features: int, *, eps: float = 1e-5, dtype: DTypeLike = jnp.float32, param_dtype: DTypeLike = jnp.float32
    ):
        self.scale = nnx.Param(jnp.ones(features, param_dtype))
        self.bias = nnx.Param(jnp.zeros(features, param_dtype))
        self.eps, self.dtype = eps, dtype

    def __call__(self, x: Features) -> Features:
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + self.eps)
        scale, bias = (jnp.broadcast_to(p[...].astype(jnp.float32), y.shape) for p in (self.scale, self.bias))
        return (y * scale + bias).astype(self.dtype)


class Embed(nnx.Module):
    """A table of vectors: integers (*batch) -> (*batch, features)."""

    def __init__(
        self,
        count: int,
        features: int,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.embedding = nnx.Param(drawn(nnx.initializers.normal(0.02), rngs, (count, features), param_dtype))
        self.dtype = dtype

    def __call__(self, indices: Array) -> Array:
        return self.embedding[...].astype(self.dtype)[indices]
