"""The UNet, its text, guidance and adapters as a noise prediction eps(x, t) of the theory.

The only place that knows integer timesteps: timestep k of N stands at t = (k + 1) / N, so k = N t - 1. Everything that
may change without a new compilation is an array inside the Partial: weights, text, guidance_scale, lora_scale, and
how these two change with time (`Ramp`).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import Partial
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from sd_port.models.layers import AdapterScale, Image
from sd_port.models.unet import UNet, UNetKV
from theory.predictions import eps_from_v, guide
from theory.schedules import DiscreteVP
from theory.types import NoiseFn

Context = Float[Array, "#texts _ _"]  # (1 or batch, tokens, features)
PredictionType = Literal["epsilon", "v_prediction"]


class Ramp(NamedTuple):
    """A scale that changes with time: `values` at increasing `times`, straight lines between, constant outside."""

    times: Float[Array | np.ndarray, " n"]
    values: Float[Array | np.ndarray, " n"]


Scale = ArrayLike | Ramp


@dataclass(frozen=True)
class _Network:
    """What is static about the network: hashable, so that two equal ones share a compiled program."""

    graph: nnx.GraphDef
    schedule: DiscreteVP
    prediction_type: PredictionType

    def __call__(
        self,
        weights: nnx.State,
        text_kv: tuple[UNetKV, UNetKV | None],
        guidance_scale: Float[Array, ""] | Ramp | None,
        lora_scale: Float[Array, ""] | Ramp,
        condition: Image | None,
        x: Image,
        t: Float[Array, ""],
    ) -> Image:
        strength = _at(lora_scale, t)
        unet = nnx.merge(self.graph, scale_adapters(weights, strength))
        kv, change = text_kv
        if change is not None:  # keys and values are linear in the text, and so in the scale of their adapters
            kv = jax.tree.map(lambda without, more: without + (strength * more).astype(without.dtype), kv, change)
        channels = x if condition is None else jnp.concatenate([x, condition], axis=-1)
        timestep = self.schedule.steps * t - 1
        # The two passes of guidance lie side by side, so that a batch that is split over devices stays so.
        doubled = channels if guidance_scale is None else jnp.repeat(channels, 2, axis=0)
        output = unet(doubled, timestep[None], kv).astype(x.dtype)
        if guidance_scale is not None:
            output = guide(output[0::2], output[1::2], _at(guidance_scale, t).astype(x.dtype))
        return output if self.prediction_type == "epsilon" else eps_from_v(self.schedule, x, output, t)


def _at(scale: Float[Array, ""] | Ramp, t: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.interp(t, scale.times, scale.values) if isinstance(scale, Ramp) else scale


def scale_adapters(weights: nnx.State, lora_scale: Float[Array, ""]) -> nnx.State:
    """The weights with every adapter's scale multiplied."""

    def scaled(variable: nnx.Variable) -> nnx.Variable:
        is_scale = isinstance(variable, AdapterScale)
        return variable.replace(variable[...] * lora_scale) if is_scale else variable

    return jax.tree.map(scaled, weights, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def unet_noise_fn(
    unet: UNet,
    schedule: DiscreteVP,
    prediction_type: PredictionType,
    batch: int,
    context: Context,
    null_context: Context | None = None,
    guidance_scale: Scale = 1.0,
    lora_scale: Scale = 1.0,
    condition: Image | None = None,
) -> NoiseFn:
    """eps(x, t) for latents x of shape (batch, height, width, channels) and one time t for all of them.

    context: what `CLIPTextModel` makes of the prompts, (1 or batch, tokens, features). Classifier-free guidance is
    `theory.predictions.guide` between null_context and context; without a null_context the network is asked once,
    not twice. Both scales may be a `Ramp` of t. condition: channels that are put after those of x, (batch, height,
    width, channels), for inpainting. A prediction of v becomes one of eps.
    """
    graph, weights = nnx.split(unet)
    texts = (context,) if null_context is None else (null_context, context)
    lora = as_float32(lora_scale)
    text_kv = _text_kv(graph, batch, weights, texts, lora)
    guidance = None if null_context is None else as_float32(guidance_scale)
    network = _Network(graph, schedule, prediction_type)
    return Partial(network, weights, text_kv, guidance, lora, condition)


@partial(jax.jit, static_argnums=(0, 1))
def _text_kv(graph, batch, weights, texts, lora_scale) -> tuple[UNetKV, UNetKV | None]:
    """Keys and values of the texts, once for all steps; with a ramp those without adapters, and what these add.

    The texts of one latent lie side by side.
    """
    pairs = jnp.stack([jnp.broadcast_to(text, (batch, *text.shape[1:])) for text in texts], axis=1)
    context = pairs.reshape(-1, *pairs.shape[2:])

    def at(strength: Float[Array, ""]) -> UNetKV:
        return nnx.merge(graph, scale_adapters(weights, strength)).text_kv(context)

    if not isinstance(lora_scale, Ramp):
        return at(lora_scale), None
    without = at(jnp.float32(0))
    return without, jax.tree.map(jnp.subtract, at(jnp.float32(1)), without)


def as_float32(scale: Any) -> Any:
    """The leaves as float32; numbers stay in NumPy, for which nothing is compiled."""
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if isinstance(leaf, jax.Array) else np.asarray(leaf, np.float32), scale
    )
