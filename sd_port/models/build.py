"""The layers of one network: all share a dtype policy and a stream of random keys."""

from typing import NamedTuple

from flax import nnx
from jax.typing import DTypeLike

from sd_port.models.layers import Conv, Embed, GroupNorm, LayerNorm, Linear


class Build(NamedTuple):
    """Makes layers that keep parameters in `param_dtype` and compute in `dtype`."""

    dtype: DTypeLike
    param_dtype: DTypeLike
    rngs: nnx.Rngs

    def linear(self, in_features: int, out_features: int, *, bias: bool = True) -> Linear:
        return Linear(
            in_features, out_features, bias=bias, dtype=self.dtype, param_dtype=self.param_dtype, rngs=self.rngs
        )

    def conv(
        self,
        in_channels: int,
        out_channels: int,
        size: int = 3,
        *,
        stride: int = 1,
        padding: int | tuple[int, int] | None = None,
    ) -> Conv:
        return Conv(
            in_channels,
            out_channels,
            size,
            stride=stride,
            padding=padding,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )

    def group_norm(self, groups: int, channels: int, eps: float) -> GroupNorm:
        return GroupNorm(groups, channels, eps=eps, dtype=self.dtype, param_dtype=self.param_dtype)

    def layer_norm(self, features: int, eps: float = 1e-5) -> LayerNorm:
        return LayerNorm(features, eps=eps, dtype=self.dtype, param_dtype=self.param_dtype)

    def embed(self, count: int, features: int) -> Embed:
        return Embed(count, features, dtype=self.dtype, param_dtype=self.param_dtype, rngs=self.rngs)
