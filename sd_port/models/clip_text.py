"""The text encoder of Stable Diffusion (CLIPTextModel of transformers; Radford et al. 2021, arXiv 2103.00020)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Integer

from sd_port.models.attention import KeysValues, causal
from sd_port.models.build import Build
from sd_port.models.config import CLIPTextConfig
from sd_port.models.layers import Tokens


def quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x), the approximation that OpenAI's CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


def exact_gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": exact_gelu}


class Embeddings(nnx.Module):
    """A vector for every token plus one for its place."""

    def __init__(self, build: Build, config: CLIPTextConfig):
        self.token_embedding = build.embed(config.vocab_size, config.hidden_size)
        self.position_embedding = build.embed(config.max_position_embeddings, config.hidden_size)

    def __call__(self, tokens: Integer[Array, "batch tokens"]) -> Tokens:
        places = jnp.arange(tokens.shape[1])[None]
        return self.token_embedding(tokens) + self.position_embedding(places)


class SelfAttention(nnx.Module):
    """Causal multi-head attention with the names of CLIP."""

    def __init__(self, build: Build, dim: int, heads: int):
        self.q_proj = build.linear(dim, dim)
        self.k_proj = build.linear(dim, dim)
        self.v_proj = build.linear(dim, dim)
        self.out_proj = build.linear(dim, dim)
        self.heads = heads

    def __call__(self, x: Tokens) -> Tokens:
        q, k, v = (f(x).reshape(*x.shape[:2], self.heads, -1) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(causal(q, KeysValues(k, v)).reshape(x.shape))


class MLP(nnx.Module):
    """dim -> intermediate_size -> dim."""

    def __init__(self, build: Build, config: CLIPTextConfig):
        self.fc1 = build.linear(config.hidden_size, config.intermediate_size)
        self.fc2 = build.linear(config.intermediate_size, config.hidden_size)
        self.activation = config.hidden_act

    def __call__(self, x: Tokens) -> Tokens:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Layer(nnx.Module):
    """Pre-norm self-attention and MLP, each added to its input."""

    def __init__(self, build: Build, config: CLIPTextConfig):
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = build.layer_norm(dim, eps)
        self.self_attn = SelfAttention(build, dim, config.num_attention_heads)
        self.layer_norm2 = build.layer_norm(dim, eps)
        self.mlp = MLP(build, config)

    def __call__(self, x: Tokens) -> Tokens:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    """The stack of layers."""

    def __init__(self, build: Build, config: CLIPTextConfig):
        self.layers = nnx.List([Layer(build, config) for _ in range(config.num_hidden_layers)])

    def __call__(self, x: Tokens) -> Tokens:
        for layer in self.layers:
            x = layer(x)
        return x


class CLIPTextModel(nnx.Module):
    """Tokens (batch, 77) -> the last hidden state after its norm, (batch, 77, hidden_size), in `dtype`.

    The mask is causal and nothing is hidden but the future: padding is read like any token, as Stable Diffusion was
    trained.
    """

    def __init__(
        self,
        config: CLIPTextConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        build = Build(dtype, param_dtype, rngs)
        self.embeddings = Embeddings(build, config)
        self.encoder = Encoder(build, config)
        self.final_layer_norm = build.layer_norm(config.hidden_size, config.layer_norm_eps)
        self.config, self.dtype = config, dtype

    def __call__(self, tokens: Integer[Array, "batch tokens"]) -> Tokens:
        return self.final_layer_norm(self.encoder(self.embeddings(tokens)))
