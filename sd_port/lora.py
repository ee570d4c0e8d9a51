"""LoRA on one picture: small adapters learn to denoise it, so that an edit keeps what it shows.

As in SDE-Drag and DragDiffusion: the projections of all attention layers of the UNet (Hu et al. 2022, arXiv
2106.09685), the training loss of the model itself on this picture alone, the picture's own prompt.
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from sd_port.checks import check_picture, check_size
from sd_port.edit_configs import LoRAConfig
from sd_port.edits.canvas import padded
from sd_port.models.attention import Attention
from sd_port.models.layers import Adapter, Image, LoRA, Tokens
from sd_port.noise_fn import PredictionType
from sd_port.pipeline import StableDiffusion
from theory.predictions import v_from_eps
from theory.schedules import DiscreteVP
from theory.types import PRNGKey

PART = 10  # steps between two looks at the progress

Progress = Callable[[int, int, float], None]  # steps done, steps in all, the mean loss of the last ones


def train_lora(
    pipe: StableDiffusion,
    image: np.ndarray,
    prompt: str,
    config: LoRAConfig = LoRAConfig(),
    *,
    key: PRNGKey,
    progress: Progress | None = None,
) -> None:
    """Puts adapters on the UNet, in place of those it had, that are trained on a picture (height, width, 3) in [0, 1].

    `sd_port.weights.lora_files.write_lora` saves them. Interrupted, it leaves the UNet without adapters.

    Raises ValueError for a picture that cannot be used and for a model for inpainting, and FloatingPointError when the
    loss is no longer a number.
    """
    if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        raise ValueError("LoRA is trained on a model for text alone, and this one is for inpainting")
    image, factor = check_picture(image), pipe.vae.config.factor
    check_size(image.shape[:2], factor)
    devices = 1 if pipe.mesh is None else pipe.mesh.size  # over which the autoencoder splits its batch
    mean, std = (of_all[:1] for of_all in pipe.posterior(jnp.repeat(padded(image[None], factor), devices, axis=0)))
    context = pipe.embed([prompt])
    pipe.unload_lora()
    try:
        graph, adapters, rest = nnx.split(with_adapters(pipe.unet, config.rank, key), Adapter, ...)
        statics = graph, pipe.schedule, pipe.scheduler.prediction_type, config
        moments = config.optimizer().init(cast(optax.Params, adapters))
        for start in range(0, config.steps, PART):
            size = min(PART, config.steps - start)
            keys = jax.vmap(partial(jr.fold_in, key))(jnp.arange(start, start + size))
            adapters, moments, losses = _train(*statics, adapters, moments, rest, mean, std, context, keys)
            loss = float(losses.mean())
            if not np.isfinite(loss):
                raise FloatingPointError(
                    f"LoRA: the loss is {loss} after {start + size} steps; lower the learning rate"
                )
            if progress is not None:
                progress(start + size, config.steps, loss)
        nnx.update(pipe.unet, adapters)
    except BaseException:
        pipe.unload_lora()
        raise


def with_adapters(unet: nnx.Module, rank: int, key: PRNGKey) -> nnx.Module:
    """The same module, with fresh adapters on the projections of every attention: they change nothing yet."""
    rngs = nnx.Rngs(params=key)
    for _, module in nnx.iter_modules(unet):
        if isinstance(module, Attention):
            for layer in (module.to_q, module.to_k, module.to_v, module.to_out[0]):
                layer.lora = LoRA.fresh(layer.kernel.shape, rank, rngs=rngs)
    return unet


def _loss(
    graph: nnx.GraphDef,
    schedule: DiscreteVP,
    prediction_type: PredictionType,
    config: LoRAConfig,
    adapters: nnx.State,
    rest: nnx.State,
    mean: Image,
    std: Image,
    context: Tokens,
    key: PRNGKey,
) -> Float[Array, ""]:
    """Mean square error of the UNet's output at random timesteps, on draws of the picture's latent."""
    unet, batch = nnx.merge(graph, adapters, rest), config.batch
    latent_key, time_key, noise_key = jr.split(key, 3)
    shape = (batch, *mean.shape[1:])
    x0 = mean + std * jr.normal(latent_key, shape, mean.dtype)
    eps = jr.normal(noise_key, shape, mean.dtype)
    timestep = jr.randint(time_key, (batch,), 0, schedule.steps)
    t = ((timestep + 1) / schedule.steps).astype(mean.dtype)[:, None, None, None]
    x = schedule.alpha(t) * x0 + schedule.sigma(t) * eps
    wanted = eps if prediction_type == "epsilon" else v_from_eps(schedule, x, eps, t)
    text_kv = unet.text_kv(jnp.broadcast_to(context, (batch, *context.shape[1:])))
    output = unet(x, timestep.astype(mean.dtype), text_kv).astype(mean.dtype)
    return jnp.mean((output - wanted) ** 2)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _train(graph, schedule, prediction_type, config, adapters, moments, rest, mean, std, context, keys):
    loss_fn, optimizer = partial(_loss, graph, schedule, prediction_type, config), config.optimizer()

    def step(carry, key):
        adapters, moments = carry
        loss, gradient = jax.value_and_grad(loss_fn)(adapters, rest, mean, std, context, key)
        change, moments = optimizer.update(gradient, moments, adapters)
        return (optax.apply_updates(adapters, change), moments), loss

    (adapters, moments), losses = jax.lax.scan(step, (adapters, moments), keys)
    return adapters, moments, losses
