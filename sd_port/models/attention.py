"""Scaled dot-product attention, in the form that is fastest where it runs, and the layer made of it.

softmax(q k' / sqrt(d)) v (Vaswani et al. 2017, arXiv 1706.03762, Eq. 1); the softmax is float32 whatever the dtype.
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sd_port.models.build import Build
from sd_port.models.layers import Tokens

Heads = Float[Array, "batch _ heads dim"]  # (batch, tokens, heads, dim)
Method = Literal["plain", "cudnn", "mapped", "chunked"]

MAPPED_LOGITS = 2**16  # logits of one head from which on the CPU gains by going through heads and chunks one by one
MAPPED_QUERIES = 512  # queries of a chunk on the CPU: 512 x 4096 logits stay near the processor
CHUNKED_LOGITS = 2**28  # float32 logits of all heads, 1 GiB, from which on a GPU or a TPU takes the queries in chunks


class KeysValues(NamedTuple):
    """What queries attend to."""

    keys: Heads
    values: Heads


def choose(backend: str, dtype: DTypeLike, q: tuple[int, ...], tokens: int, largest_head: int = 0) -> Method:
    """The method for queries of shape q = (batch, queries, heads, dim) and that many keys.

    `largest_head` is what cuDNN's flash attention takes: 256 from Hopper on, 128 before. It has no
    float32. benchmarks/layers.py and benchmarks/unet_gpu.py --attention measure the choice.
    """
    batch, queries, heads, dim = q
    if backend == "cpu":
        return "mapped" if queries * tokens >= MAPPED_LOGITS else "plain"
    if backend == "gpu" and jnp.dtype(dtype).itemsize == 2 and dim % 8 == 0 and dim <= largest_head:
        return "cudnn"
    return "chunked" if batch * heads * queries * tokens > CHUNKED_LOGITS else "plain"


def attend(q: Heads, kv: KeysValues) -> Heads:
    """Every query attends to all keys."""
    backend = jax.default_backend()
    match choose(backend, q.dtype, q.shape, kv.keys.shape[1], cudnn_dim() if backend == "gpu" else 0):
        case "mapped":
            return mapped(q, kv)
        case "chunked":
            return chunked(q, kv)
        case "cudnn":
            return jax.nn.dot_product_attention(q, *kv, implementation="cudnn")
        case _:
            return plain(q, kv)


def causal(q: Heads, kv: KeysValues) -> Heads:
    """Every token attends to itself and those before it: 77 of them, so nothing is worth choosing."""
    queries, keys = q.shape[1], kv.keys.shape[1]
    return plain(q, kv, jnp.tril(jnp.ones((queries, keys), bool)))


def plain(q: Heads, kv: KeysValues, mask: Bool[Array, "queries keys"] | None = None) -> Heads:
    """The formula, with all logits in memory at once; where `mask` is False a query does not look."""
    scale = jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q * scale, kv.keys, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(jnp.broadcast_to(mask, logits.shape), logits, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits).astype(q.dtype), kv.values)


def cudnn_dim() -> int:
    """The largest head that cuDNN's flash attention takes on this GPU; 0 where there is none."""
    capability = float(getattr(jax.devices()[0], "compute_capability", 0))
    return 256 if capability >= 9 else 128 if capability >= 8 else 0


def mapped(q: Heads, kv: KeysValues) -> Heads:
    """Two plain matrix products for each head and each chunk of queries in turn.

    The logits of one chunk fit in a cache, and a sum of each row is divided out after the second product, not before.
    """
    batch, queries, heads, dim = q.shape
    chunks = math.ceil(queries / MAPPED_QUERIES)
    size = math.ceil(queries / chunks)
    q = jnp.pad(q, ((0, 0), (0, chunks * size - queries), (0, 0), (0, 0)))
    q, k, v = (
        x.transpose(0, 2, 1, 3).reshape(batch * heads, -1, dim) for x in (q * jnp.asarray(dim**-0.5, q.dtype), *kv)
    )
    q = q.reshape(batch * heads * chunks, size, dim)

    def chunk(place: Array) -> Array:
        logits = (q[place] @ k[place // chunks].T).astype(jnp.float32)
        weights = jnp.exp(logits - logits.max(-1, keepdims=True))
        return (weights.astype(v.dtype) @ v[place // chunks] / weights.sum(-1, keepdims=True)).astype(v.dtype)

    y = jax.lax.map(chunk, jnp.arange(q.shape[0])).reshape(batch, heads, chunks * size, dim)
    return y[:, :, :queries].transpose(0, 2, 1, 3)


def chunked(q: Heads, kv: KeysValues) -> Heads:
    """The plain form for as many queries at a time as keep the logits below CHUNKED_LOGITS."""
    batch, queries, heads, dim = q.shape
    chunks = math.ceil(batch * heads * queries * kv.keys.shape[1] / CHUNKED_LOGITS)
    size = math.ceil(queries / chunks)
    q = jnp.pad(q, ((0, 0), (0, chunks * size - queries), (0, 0), (0, 0)))
    q = q.reshape(batch, chunks, size, heads, dim).swapaxes(0, 1)
    y = jax.lax.map(lambda chunk: plain(chunk, kv), q)
    return y.swapaxes(0, 1).reshape(batch, chunks * size, heads, dim)[:, :queries]


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
