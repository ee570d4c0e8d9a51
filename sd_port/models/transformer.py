"""The spatial transformer of the UNet (Rombach et al. 2022, arXiv 2112.10752, Sec. 3.3 and App. E.2.1)."""

import jax
from flax import nnx
from jaxtyping import Array

from sd_port.models.attention import Attention, KeysValues
from sd_port.models.build import Build
from sd_port.models.layers import Image, Tokens

TextKV = tuple[KeysValues, ...]


class GEGLU(nnx.Module):
    """value gelu(gate), both halves of one projection (Shazeer 2020, arXiv 2002.05202). gelu is exact, not tanh."""

    def __init__(self, build: Build, dim: int, out: int):
        self.proj = build.linear(dim, 2 * out)

    def __call__(self, x: Tokens) -> Tokens:
        value, gate = jax.numpy.split(self.proj(x), 2, axis=-1)
        return value * jax.nn.gelu(gate, approximate=False)


class Identity(nnx.Module):
    """Stands where diffusers has its dropout, so that what follows keeps its number."""

    def __call__(self, x: Array) -> Array:
        return x


class FeedForward(nnx.Module):
    """dim -> 4 dim -> dim."""

    def __init__(self, build: Build, dim: int):
        self.net = nnx.List([GEGLU(build, dim, 4 * dim), Identity(), build.linear(4 * dim, dim)])

    def __call__(self, x: Tokens) -> Tokens:
        for layer in self.net:
            x = layer(x)
        return x


class TransformerBlock(nnx.Module):
    """Pre-norm self-attention, cross-attention to the text, feed-forward; each is added to its input."""

    def __init__(self, build: Build, dim: int, context_dim: int, heads: int):
        self.norm1 = build.layer_norm(dim)
        self.attn1 = Attention(build, dim, dim, heads)
        self.norm2 = build.layer_norm(dim)
        self.attn2 = Attention(build, dim, context_dim, heads)
        self.norm3 = build.layer_norm(dim)
        self.ff = FeedForward(build, dim)

    def __call__(self, x: Tokens, text_kv: KeysValues) -> Tokens:
        h = self.norm1(x)
        x = x + self.attn1(h, self.attn1.keys_values(h))
        x = x + self.attn2(self.norm2(x), text_kv)
        return x + self.ff(self.norm3(x))


class Transformer(nnx.Module):
    """Transformer blocks over the pixels of an image, added to the image (Transformer2DModel of diffusers).

    `linear` is SD 2.x's choice of Linear layers for the projections in and out; SD 1.x has 1x1 convolutions, which
    compute the same.
    """

    def __init__(self, build: Build, dim: int, context_dim: int, heads: int, layers: int, groups: int, *, linear: bool):
        self.norm = build.group_norm(groups, dim, 1e-6)
        self.proj_in = build.linear(dim, dim) if linear else build.conv(dim, dim, 1)
        self.transformer_blocks = nnx.List([TransformerBlock(build, dim, context_dim, heads) for _ in range(layers)])
        self.proj_out = build.linear(dim, dim) if linear else build.conv(dim, dim, 1)

    def text_kv(self, context: Tokens) -> TextKV:
        """Keys and values of the text for each block: they do not change while an image is sampled."""
        return tuple(block.attn2.keys_values(context) for block in self.transformer_blocks)

    def __call__(self, x: Image, text_kv: TextKV) -> Image:
        batch, height, width, channels = x.shape
        h = self.proj_in(self.norm(x)).reshape(batch, height * width, channels)
        for block, kv in zip(self.transformer_blocks, text_kv, strict=True):
            h = block(h, kv)
        return x + self.proj_out(h.reshape(x.shape))
