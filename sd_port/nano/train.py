"""Trains a small Stable Diffusion from nothing: tokenizer, autoencoder, text encoder and UNet, one after another.

    python -m sd_port.nano.train --out model            one like the bundled model, on drawn scenes (nano.toml)
    python -m sd_port.nano.train --config mine.toml --pictures folder --out model
    python -m sd_port.nano.train --config longer.toml --start nano --keep-text --out model    its UNet, trained on

All of a run lies in its folder: checkpoints, losses, latents. Cut off and called again, it goes on where it was.
"""

import dataclasses
import json
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from msgspec import Meta
from rich.console import Console
from rich.progress import track

from sd_port.checks import SEEDS, check_seed
from sd_port.models.clip_text import CLIPTextModel
from sd_port.models.unet import UNet
from sd_port.models.vae import AutoencoderKL
from sd_port.nano.autoencoder import Autoencoder, whitened
from sd_port.nano.contrast import Contrast
from sd_port.nano.data import Pictures, drawn, from_folder
from sd_port.nano.denoiser import Denoiser, Latents, Lessons
from sd_port.nano.devices import all_devices, split_cpu
from sd_port.nano.fit import fit
from sd_port.nano.vocabulary import train_tokenizer
from sd_port.scheduler import Scheduler
from sd_port.tokenizer import ClipTokenizer
from sd_port.weights.configs import SCHEDULER_DEFAULTS
from sd_port.weights.read import Components, digest, read
from sd_port.weights.save import save
from theory.command_line import one_line, parsed
from theory.compilations import keep_compilations
from theory.files import folder_held, held, write_new, write_whole
from theory.reading import Json, entries, read_toml
from theory.types import PRNGKey

Model = TypeVar("Model", bound=nnx.Module)

CONFIG, LONGER = (Path(__file__).parent / name for name in ("nano.toml", "longer.toml"))
CHUNK = 64  # images encoded at once
WHITENING = 4096  # images by which the latents are brought to unit variance
KEYED = SEEDS // 4 - 1  # seeds: every one has four keys of its own, those of 4 seed + 1, ..., 4 seed + 4

SCHEDULER: Json = SCHEDULER_DEFAULTS | {  # Stable Diffusion's, ending at alpha = 1 as this project's grids do
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,  # without effect on trailing grids, but diffusers asks for it
    "timestep_spacing": "trailing",
}


@dataclass(frozen=True)
class Config:
    """Everything that decides what a training gives, beside the pictures. A TOML file has the same names."""

    seed: Annotated[int, Meta(ge=0, le=2**30 - 2)] = 0
    size: Annotated[int, Meta(ge=1, le=2**12)] = 64  # of the pictures, in pixels
    scenes: Annotated[int, Meta(ge=1, le=2**24)] = 65536  # how many the UNet is trained on, where no folder is given
    vocabulary: Annotated[int, Meta(ge=1, le=2**20)] = 1024  # tokens at most
    length: Annotated[int, Meta(ge=3, le=2**10)] = 40  # tokens of a text at most, with begin and end
    cpu_devices: Annotated[int, Meta(ge=1, le=2**10)] = 2  # a batch is split over them; see `split_cpu`
    autoencoder: Autoencoder = field(default_factory=Autoencoder)
    contrast: Contrast = field(default_factory=Contrast)
    denoiser: Denoiser = field(default_factory=Denoiser)

    def __post_init__(self):
        """Raises ValueError for a seed that shares keys with another."""
        check_seed(self.seed, "seed", KEYED)


@dataclass(frozen=True)
class Train:
    """Trains a small Stable Diffusion from nothing, and goes on where an earlier call was cut off."""

    out: Path
    """The folder to write in Stable Diffusion's layout. Must not exist."""
    run: Path = Path("runs/nano")
    """Where checkpoints and losses lie."""
    config: Path = CONFIG
    """A TOML file like nano.toml."""
    pictures: Path | None = None
    """A folder with metadata.jsonl ({"file_name": ..., "text": ...}); without it, drawn scenes."""
    start: str | None = None
    """A model to go on from (a folder, or nano): its autoencoder is kept, its UNet trained on."""
    keep_text: bool = False
    """Keeps the tokenizer and the text encoder of --start too; without it they are trained anew, on these captions."""
    so_far: bool = False
    """Writes the model as the last checkpoints have it, and trains no further: to look at while it trains."""


def read_config(path: str | Path) -> Config:
    """Raises FileNotFoundError, and ValueError with the file and the entry for what no config has."""
    given = entries(read_toml(path), Config, str(path))
    try:
        return _over(Config(), given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def train(
    config: Config,
    run: Path,
    out: Path,
    folder: Path | None = None,
    *,
    start: str | None = None,
    keep_text: bool = False,
    so_far: bool = False,
) -> None:
    """Writes the model to `out`; so_far: as the last checkpoints in `run` have it, which are only read.

    With `start`, the autoencoder is that model's and the UNet begins as that model's; the text encoder is new, or with
    keep_text that model's. Raises FileExistsError if there is something, ValueError for unreadable pictures, for a run
    of another config, where the model to start from is not of this config, for keep_text without it, and for so_far
    before there is a checkpoint of the UNet; BlockingIOError while another process trains in `run` or writes `out`.
    """
    if keep_text and start is None:
        raise ValueError("--keep-text goes with --start: there is no text encoder to keep")
    if out.exists():
        raise FileExistsError(f"{out}: exists already; give another folder")
    if so_far and not (run / "latents.npz").exists():
        raise ValueError(f"{run}: holds no latents yet, and nothing can be made of it")
    first = None if start is None else _of_config(config, read(start, dtype=jnp.float32), keep_text)
    with ExitStack() as places:
        out.parent.mkdir(parents=True, exist_ok=True)
        places.enter_context(held(out))
        if not so_far:  # which may be asked for while another process trains
            places.enter_context(folder_held(run))
        _train(config, run, out, folder, first, keep_text, so_far)


def _train(
    config: Config, run: Path, out: Path, folder: Path | None, first: Components | None, keep_text: bool, so_far: bool
) -> None:
    choices = {"pictures": folder and str(folder), "start": first and digest(first.files), "keep_text": keep_text}
    _same_config(run / "config.json", dataclasses.asdict(config) | choices)
    mesh = all_devices()
    vae_key, picture_key, denoiser_key, contrast_key = (jr.key(4 * config.seed + i) for i in (1, 2, 3, 4))

    stop_at = 0 if so_far else None
    pictures = None if folder is None else from_folder(folder, config.size)
    kept = first if keep_text else None  # whose tokenizer and text encoder stay as they are
    words = run / "tokenizer" if kept is None else kept.tokenizer_folder
    if first is None:
        vae = _autoencoder(config, pictures, vae_key, run / "vae", mesh, stop_at)
        few = drawn(picture_key, min(WHITENING, config.scenes), config.size) if pictures is None else pictures
        vae = whitened(vae, jnp.asarray(few.images[:WHITENING], jnp.float32) / 255)
    else:
        vae = first.vae
    if not (run / "latents.npz").exists():
        pictures = drawn(picture_key, config.scenes, config.size) if pictures is None else pictures
        if kept is None:
            texts = (text for texts in pictures.captions for text in texts)
            train_tokenizer(texts, words, size=config.vocabulary, length=config.length)
        _write(run / "latents.npz", encoded(vae, ClipTokenizer.from_folder(words), pictures, mesh))
    tokenizer, data = ClipTokenizer.from_folder(words), _read(run / "latents.npz")
    if kept is None:
        text_encoder = _text_encoder(config, data, tokenizer, contrast_key, run / "contrast", mesh, stop_at)
    else:
        text_encoder = kept.text_encoder
    unet_config = config.denoiser.unet_config(data.mean.shape[1], data.mean.shape[-1])
    unet = UNet(unet_config, rngs=nnx.Rngs(config.seed)) if first is None else first.unet
    unet = _denoiser(config, data, unet, text_encoder, denoiser_key, run / "denoiser", mesh, stop_at)

    end = tokenizer.backend.get_vocab_size() - 1
    marks = {"bos_token_id": end - 1, "eos_token_id": end}
    save(
        out,
        _halved(unet),
        _halved(vae),
        _halved(text_encoder),
        configs={
            "unet": dataclasses.asdict(unet.config),
            "vae": dataclasses.asdict(vae.config),
            "text_encoder": dataclasses.asdict(text_encoder.config) | marks,
        },
        tokenizer_folder=words,
        scheduler=SCHEDULER,
    )


def _autoencoder(
    config: Config, pictures: Pictures | None, key: PRNGKey, run: Path, mesh: Mesh, stop_at: int | None
) -> AutoencoderKL:
    settings = config.autoencoder
    vae = AutoencoderKL(settings.config(config.size), rngs=nnx.Rngs(config.seed))
    graph, weights = nnx.split(vae)
    images = None if pictures is None else jnp.asarray(pictures.images)
    loss_fn = settings.loss_fn(graph, config.size, mesh)
    weights = fit(loss_fn, weights, images, settings.fit, key, run, mesh=mesh, label="Autoencoder", stop_at=stop_at)
    return nnx.merge(graph, weights)


def _text_encoder(
    config: Config,
    data: Latents,
    tokenizer: ClipTokenizer,
    key: PRNGKey,
    run: Path,
    mesh: Mesh,
    stop_at: int | None,
) -> CLIPTextModel:
    settings = config.contrast
    text_config = config.denoiser.text_config(tokenizer.backend.get_vocab_size(), config.length)
    text, text_weights = nnx.split(CLIPTextModel(text_config, rngs=nnx.Rngs(config.seed)))
    size, channels = data.mean.shape[1], data.mean.shape[-1]
    towers, tower_weights = nnx.split(
        settings.towers(text_config.hidden_size, size, channels, rngs=nnx.Rngs(config.seed))
    )
    weights = {"towers": tower_weights, "text_encoder": text_weights}
    loss_fn = settings.loss_fn(towers, text, mesh)
    weights = fit(loss_fn, weights, data, settings.fit, key, run, mesh=mesh, label="Text encoder", stop_at=stop_at)
    return nnx.merge(text, weights["text_encoder"])


def _denoiser(
    config: Config,
    data: Latents,
    unet: UNet,
    text_encoder: CLIPTextModel,
    key: PRNGKey,
    run: Path,
    mesh: Mesh,
    stop_at: int | None,
) -> UNet:
    settings, schedule = config.denoiser, Scheduler.from_json(SCHEDULER).schedule
    graph, weights = nnx.split(unet)
    text, text_weights = nnx.split(text_encoder)
    lessons = Lessons(data, text_weights)
    loss_fn = settings.loss_fn(graph, text, schedule, mesh)
    weights = fit(loss_fn, weights, lessons, settings.fit, key, run, mesh=mesh, label="UNet", stop_at=stop_at)
    return nnx.merge(graph, weights)


def _of_config(config: Config, model: Components, keep_text: bool) -> Components:
    """The model, if a training with this config would give networks like its own."""
    latent, channels = config.size // model.vae.config.factor, model.vae.config.latent_channels
    expected = {
        "autoencoder": (config.autoencoder.config(config.size), model.vae.config),
        "UNet": (config.denoiser.unet_config(latent, channels), model.unet.config),
    }
    if keep_text:
        found = model.text_encoder.config
        expected["text encoder"] = config.denoiser.text_config(found.vocab_size, config.length), found
    for name, (asked, found) in expected.items():
        if asked != found:
            raise ValueError(f"the {name} to start from is not of this config: {found}, and asked is {asked}")
    return model


def encoded(vae: AutoencoderKL, tokenizer: ClipTokenizer, pictures: Pictures, mesh: Mesh) -> Latents:
    """The latents and tokens of all pictures; captions are repeated where a picture has fewer than others."""
    graph, weights = nnx.split(vae)
    count, size = len(pictures.images), pictures.images.shape[1]
    latent = size // vae.config.factor
    shape = (count, latent, latent, vae.config.latent_channels)
    mean, std = np.empty(shape, np.float16), np.empty(shape, np.float16)
    for start in track(range(0, count, CHUNK), description="Encoding", console=Console(stderr=True)):
        chunk = np.zeros((CHUNK, size, size, 3), np.uint8)  # the last one too: one shape, one compilation
        here = slice(start, min(start + CHUNK, count))
        rows = here.stop - start
        chunk[:rows] = pictures.images[here]
        posterior = _encode(graph, weights, jax.device_put(chunk, NamedSharding(mesh, PartitionSpec("batch"))))
        mean[here], std[here] = posterior.mean[:rows], posterior.std[:rows]
    each = max(map(len, pictures.captions))
    texts = [texts[i % len(texts)] for texts in pictures.captions for i in range(each)]
    tokens = tokenizer(texts).astype(np.uint16).reshape(count, each, -1)
    return Latents(mean, std, tokens, tokenizer([""])[0].astype(np.uint16))


def _write(path: Path, latents: Latents) -> None:
    write_whole(path, lambda file: np.savez(file, **latents._asdict()))


def _read(path: Path) -> Latents:
    with np.load(path) as file:
        return Latents(**{name: jnp.asarray(file[name]) for name in Latents._fields})


@partial(jax.jit, static_argnums=0)
def _encode(graph, weights, images):
    return nnx.merge(graph, weights).encode(2 * images.astype(jnp.float32) / 255 - 1)


def _halved(module: Model) -> Model:
    """The network with float16 parameters, on the host."""
    graph, weights = nnx.split(module)
    return nnx.merge(graph, jax.tree.map(lambda leaf: jax.device_get(leaf).astype(np.float16), weights))


def _over(default: Any, given: Json) -> Any:
    """The dataclass with these entries, and dataclasses in it with theirs; its own elsewhere."""
    values = {name: _over(getattr(default, name), v) if isinstance(v, dict) else v for name, v in given.items()}
    return dataclasses.replace(default, **values)


def _same_config(path: Path, settings: dict[str, Any]) -> None:
    """A run's folder belongs to one config: its checkpoints mean nothing under another."""
    text = json.dumps(settings, indent=2) + "\n"
    if not path.exists():
        write_new({path: lambda file: file.write(text.encode())})
    elif path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{path.parent} holds a run with another config; give another --run, or delete it")


def main(argv: list[str] | None = None) -> None:
    """Exit code 2, with one line, for input that cannot be used."""
    with one_line("train"):
        args = parsed(Train, argv, "train")
        config = read_config(args.config)
        split_cpu(config.cpu_devices)
        keep_compilations()
        train(config, args.run, args.out, args.pictures, start=args.start, keep_text=args.keep_text, so_far=args.so_far)


if __name__ == "__main__":
    main()
