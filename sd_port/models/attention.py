"""Scaled dot-product attention, in the form that is fastest where it runs, and the layers made of it.

softmax(q k' / sqrt(d)) v (Vaswani et al. 2017, arXiv 1706.03762, Eq. 1); the softmax is float32 whatever the dtype.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sd_port.models.build import Build
from sd_port.models.layers import Tokens

Heads = Float[Array, "batch tokens heads dim"]


class KeysValues(NamedTuple):
    """What queries attend to."""

    keys: Heads
    values: Heads


def attend(q: Heads, kv: KeysValues, *, causal: bool = False) -> Heads:
    return jax.nn.dot_product_attention(q, kv.keys, kv.values, is_causal=causal)


class Attention(nnx.Module):
    """Multi-head attention with the names of diffusers: to_q, to_k, to_v, to_out.0.

    `context_dim` is the width of what is attended to; `qkv_bias` is for the VAE.
    """

    def __init__(self, build: Build, dim: int, context_dim: int, heads: int, *, qkv_bias: bool = False):
        self.to_q = build.linear(dim, dim, bias=qkv_bias)
        self.to_k = build.linear(context_dim, dim, bias=qkv_bias)
        self.to_v = build.linear(context_dim, dim, bias=qkv_bias)
        self.to_out = nnx.List([build.linear(dim, dim)])
        self.heads = heads

    def keys_values(self, context: Tokens) -> KeysValues:
        return KeysValues(self._split(self.to_k(context)), self._split(self.to_v(context)))

    def __call__(self, x: Tokens, kv: KeysValues) -> Tokens:
        return self.to_out[0](attend(self._split(self.to_q(x)), kv).reshape(x.shape))

    def _split(self, x: Tokens) -> Heads:
        return x.reshape(*x.shape[:2], self.heads, -1)
