"""Stable Diffusion: text and images in, images out, by the solvers of `theory`."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool

from sd_port.models.clip_text import CLIPTextModel
from sd_port.models.layers import Image, Tokens
from sd_port.models.unet import UNet
from sd_port.models.vae import AutoencoderKL
from sd_port.noise_fn import Context, Scale, as_float32, scale_adapters, unet_noise_fn
from sd_port.scheduler import Scheduler
from sd_port.tokenizer import ClipTokenizer
from sd_port.weights.embeddings import Embedding, read_embedding
from sd_port.weights.lora_files import attach, detach, read_lora
from sd_port.weights.read import Components, digest, read
from sd_port.weights.save import save
from theory.compilations import keep_compilations
from theory.schedules import DiscreteVP
from theory.solve import Spacing, sample_parts
from theory.solvers import DPMSolverPP2M
from theory.types import NoiseFn, PRNGKey, Solver

PART = 4  # steps between two looks at the progress: long enough that starting them costs nothing

Progress = Callable[[int, int, Image], None]  # steps done, steps in all, the latents now


@dataclasses.dataclass
class StableDiffusion:
    """The four networks and files of a model, with the few operations that edits are made of.

    Images are float32 in [0, 1], (batch, height, width, 3); latents are float32, (batch, height / 8, width / 8, 4)
    and scaled to unit variance, as the UNet sees them. With a `mesh`, whose only axis is the batch, weights lie on
    every device and batches are split over them.
    """

    unet: UNet
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: ClipTokenizer
    scheduler: Scheduler
    components: Components
    mesh: Mesh | None = None

    @classmethod
    def load(
        cls,
        path_or_id: str | Path,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike | None = None,
        mesh: Mesh | None = None,
        **options: Any,
    ) -> "StableDiffusion":
        """Reads a diffusers folder, a Hub id or a single file; options are those of `sd_port.weights.read.read`.

        `dtype` is that of activations, `param_dtype` that of the weights (the same unless given). Compiled programs
        are kept under the user's cache folder. Raises what `read` raises.
        """
        keep_compilations()
        replicated = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        param_dtype = dtype if param_dtype is None else param_dtype
        components = read(path_or_id, dtype=dtype, param_dtype=param_dtype, sharding=replicated, **options)
        tokenizer = ClipTokenizer.from_folder(components.tokenizer_folder)
        tokens, embedded = tokenizer.backend.get_vocab_size(), components.text_encoder.config.vocab_size
        if tokens > embedded:
            raise ValueError(
                f"{components.tokenizer_folder}: has {tokens} tokens, and the text encoder embeds {embedded}: "
                "they are of two models"
            )
        scheduler = Scheduler.from_json(components.scheduler)
        return cls(components.unet, components.vae, components.text_encoder, tokenizer, scheduler, components, mesh)

    def save(self, folder: str | Path) -> None:
        """Writes a folder that diffusers and `load` open, without adapters.

        Raises FileExistsError if there is one, and ValueError for a model that has learned tokens since it was loaded.
        """
        if self.tokenizer.learned:
            raise ValueError("a model with learned tokens is not written: load it anew, without them")
        save(
            Path(folder),
            self.unet,
            self.vae,
            self.text_encoder,
            configs=self.components.configs,
            tokenizer_folder=self.components.tokenizer_folder,
            scheduler=self.components.scheduler,
        )

    def load_lora(self, path: str | Path) -> None:
        """Puts the adapters of a LoRA file on the UNet and the text encoder, in place of those they had.

        Learns the tokens that are bundled with them. Raises ValueError for what does not fit.
        """
        file = read_lora(path)
        attach(file, unet=self.unet, text_encoder=self.text_encoder)
        for embedding in file.embeddings:
            self._learn(embedding, path)

    def load_embedding(self, path: str | Path) -> str:
        """Learns a token from a file of textual inversion, and returns it: in prompts it stands for its vectors.

        Raises ValueError, naming the file, where it is of another model or its token is known already.
        """
        embedding = read_embedding(path)
        self._learn(embedding, path)
        return embedding.token

    def _learn(self, embedding: Embedding, path: str | Path) -> None:
        token, vectors = embedding
        config, table = self.text_encoder.config, self.text_encoder.embeddings.token_embedding.embedding
        if vectors.shape[1] != config.hidden_size:
            raise ValueError(
                f"{path}: its vectors have {vectors.shape[1]} features, this model's have {config.hidden_size}: "
                "it is for another model"
            )
        try:
            tokenizer = self.tokenizer.with_learned(token, len(vectors))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        known = table[...][: self.tokenizer.backend.get_vocab_size()]  # the rows after them have no token
        table.set_value(jnp.concatenate([known, jnp.asarray(vectors, known.dtype)]))
        self.text_encoder.config = dataclasses.replace(config, vocab_size=len(table[...]))
        self.tokenizer = tokenizer

    def unload_lora(self) -> None:
        """Takes all adapters off."""
        detach(self.unet)
        detach(self.text_encoder)

    @property
    def schedule(self) -> DiscreteVP:
        return self.scheduler.schedule

    def digest(self) -> str:
        """SHA-256 of the weights files: reads them once more."""
        return digest(self.components.files)

    def embed(self, prompts: Sequence[str], lora_scale: ArrayLike = 1.0) -> Tokens:
        """What the UNet attends to: (prompts, 77, features). Warns of text that is too long."""
        return _run(_embedded, self.text_encoder, self.tokenizer(prompts), lora_scale)

    def encode(self, image: Image, key: PRNGKey | None = None) -> Image:
        """Latents of images: the mean of the VAE's posterior, or with a key a draw from it."""
        mean, std = self.posterior(image)
        return mean if key is None else mean + std * jr.normal(key, std.shape, jnp.float32)

    def posterior(self, image: Image) -> tuple[Image, Image]:
        """Mean and standard deviation of the latents of images."""
        _check_size(image.shape[1], image.shape[2], self.vae.config.factor)
        return _run(_encoded, self.vae, self.split(image))

    def decode(self, latent: Image) -> Image:
        """Images of latents, clipped to [0, 1]. Raises FloatingPointError where they are not finite: all pass here."""
        image, finite = _run(_decoded, self.vae, self.split(latent))
        if not finite:
            raise FloatingPointError(
                "the picture came out in numbers that are not finite: lower the guidance, the scale of the LoRA, or "
                "alpha, or take another dtype"
            )
        return image

    def noise_fn(
        self,
        context: Context,
        null_context: Context | None = None,
        guidance_scale: Scale = 1.0,
        lora_scale: Scale = 1.0,
        *,
        batch: int = 1,
        condition: Image | None = None,
    ) -> NoiseFn:
        """The noise prediction for `batch` latents at once; see `sd_port.noise_fn.unet_noise_fn`."""
        return unet_noise_fn(
            self.unet,
            self.scheduler.schedule,
            self.scheduler.prediction_type,
            batch,
            context,
            null_context,
            guidance_scale,
            lora_scale,
            condition,
        )

    def generate(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str = "",
        *,
        key: PRNGKey,
        steps: int = 25,
        guidance_scale: ArrayLike | None = 7.5,
        height: int | None = None,
        width: int | None = None,
        batch: int = 1,
        solver: Solver | None = None,
        spacing: Spacing | None = None,
        lora_scale: ArrayLike = 1.0,
        latent: Image | None = None,
        progress: Progress | None = None,
    ) -> Image:
        """Images of a text: `batch` of them for every prompt, (prompts * batch, height, width, 3).

        height and width are in pixels, by default those of training. guidance_scale None asks the network once a
        step, without a negative prompt. The solver is DPM-Solver++(2M) for the ODE unless given, on the grid of the
        model's own scheduler config. latent: the noise to start from, instead of a draw. Only height, width and the
        number of images compile. progress is told of every few steps, while the next ones already run.

        Raises ValueError for a size that the VAE cannot have, a grid that the schedule does not have, and a model for
        inpainting; FloatingPointError where the images are not finite.
        """
        prompts = [prompt] * batch if isinstance(prompt, str) else [text for text in prompt for _ in range(batch)]
        if not prompts:
            raise ValueError("generate: there are no prompts")
        channels = self.unet.config.in_channels
        if channels != self.vae.config.latent_channels:
            raise ValueError(
                f"generate: the UNet takes {channels} channels: a model for inpainting, not for text alone"
            )
        factor, sides = self.vae.config.factor, self.unet.config.sides
        wanted = zip((height, width), sides, strict=True)
        height, width = (side * factor if given is None else given for given, side in wanted)
        _check_size(height, width, factor)
        shape = (len(prompts), height // factor, width // factor, self.vae.config.latent_channels)
        x, solver_key = _start(key, shape)
        x = x if latent is None else latent
        if x.shape != shape:
            raise ValueError(f"generate: latent has the shape {x.shape}, these prompts and sizes need {shape}")
        ts = self.scheduler.grid(steps, spacing).astype(jnp.float32)
        contexts = self.embed(prompts, lora_scale)
        null_context = None if guidance_scale is None else self.embed([negative_prompt], lora_scale)
        guidance_scale = 1.0 if guidance_scale is None else guidance_scale
        eps_fn = self.noise_fn(contexts, null_context, guidance_scale, lora_scale, batch=len(prompts))
        solver = DPMSolverPP2M(self.schedule) if solver is None else solver
        parts = sample_parts(solver, eps_fn, self.split(x), ts, solver_key, size=PART)
        for done, latent in enumerate(parts, start=1):
            x = latent
            if progress is not None:
                progress(min(done * PART, steps), steps, jax.block_until_ready(x))
        return self.decode(x)

    def split(self, batch: Image) -> Image:
        """The batch over the devices of the mesh."""
        if self.mesh is None:
            return batch
        if batch.shape[0] % self.mesh.size:
            raise ValueError(f"a batch of {batch.shape[0]} cannot be split evenly over {self.mesh.size} devices")
        return jax.device_put(batch, NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names[0])))


def _check_size(height: int, width: int, factor: int) -> None:
    for name, value in (("height", height), ("width", width)):
        if value < factor or value % factor:
            raise ValueError(f"{name} = {value} is not {factor} or a multiple of it, the size of a latent pixel")


@partial(jax.jit, static_argnames="shape")
def _start(key: PRNGKey, shape: tuple[int, ...]) -> tuple[Image, PRNGKey]:
    noise_key, solver_key = jr.split(key)
    return jr.normal(noise_key, shape, jnp.float32), solver_key


def _embedded(text_encoder: CLIPTextModel, tokens: Array) -> Tokens:
    return text_encoder(tokens)


def _encoded(vae: AutoencoderKL, image: Image) -> tuple[Image, Image]:
    posterior, factor = vae.encode(2 * image.astype(jnp.float32) - 1), vae.config.scaling_factor
    return posterior.mean * factor, posterior.std * factor


def _decoded(vae: AutoencoderKL, latent: Image) -> tuple[Image, Bool[Array, ""]]:
    """The images, and whether they and their latents are finite: a norm may make a picture of numbers that are not."""
    image = vae.decode(latent / vae.config.scaling_factor)
    finite = jnp.isfinite(latent).all() & jnp.isfinite(image).all()
    return jnp.clip((image.astype(jnp.float32) + 1) / 2, 0, 1), finite


def _run(function: Callable[..., Any], module: nnx.Module, batch: ArrayLike, lora_scale: ArrayLike = 1.0) -> Any:
    """function(module, batch) as one compiled program."""
    graph, weights = nnx.split(module)
    return _compiled(function, graph, weights, batch, as_float32(lora_scale))


@partial(jax.jit, static_argnums=(0, 1))
def _compiled(function, graph, weights, batch, lora_scale):
    return function(nnx.merge(graph, scale_adapters(weights, lora_scale)), batch)
