"""Reads Stable Diffusion from a diffusers folder, a Hub id or a single file."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sd_port.models.clip_text import CLIPTextModel
from sd_port.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from sd_port.models.unet import UNet
from sd_port.models.vae import AutoencoderKL
from sd_port.weights import ldm
from sd_port.weights.checkpoint import open_weights, read_index, read_metadata, shard_paths
from sd_port.weights.configs import COMPONENTS, SCHEDULER_DEFAULTS
from sd_port.weights.fill import abstract, fill
from sd_port.weights.folder import choose
from sd_port.weights.hub import resolve
from sd_port.weights.ldm import Tensors
from theory.reading import Json, read_json

MODELS = {"unet": UNet, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
CONFIGS = {"unet": UNetConfig, "vae": VAEConfig, "text_encoder": CLIPTextConfig}

# What a pipeline has if it is more, or other, than Stable Diffusion 1.x or 2.x.
_UNSUPPORTED = ("text_encoder_2", "text_encoder_3", "transformer", "prior", "controlnet", "motion_adapter")
_TOKENIZERS = ("vocab.json", "tokenizer.json")


class Components(NamedTuple):
    """Everything that Stable Diffusion is made of."""

    unet: UNet
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer_folder: Path
    scheduler: Json  # scheduler_config.json over diffusers' defaults
    files: tuple[Path, ...]  # the weights, for digest()
    configs: dict[str, Json]  # config.json of "unet", "vae", "text_encoder", for save()


@dataclass(frozen=True)
class _Source:
    """Where the components come from; tensors still in their files."""

    configs: dict[str, Json]
    scheduler: Json
    tokenizer_folder: Path | None = None
    tensors: dict[str, Tensors] = field(default_factory=dict)
    files: dict[str, tuple[Path, ...]] = field(default_factory=dict)


def read(
    path_or_id: str | Path,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    variant: str | None = None,
    vae: str | Path | None = None,
    config: str | Path | None = None,
    ema: bool = False,
    prediction_type: str | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> Components:
    """The models of a folder, a Hub id or a single file, with parameters in `param_dtype`, computing in `dtype`.

    `variant`: "fp16" and the like; the plain weights are taken where there are none.
    `vae`: a folder, id or file to take the VAE from instead.
    `config`: for a single file, a diffusers folder or id with the tokenizer, and with the VAE and the text encoder
    where the file lacks them. Its configs go before the built-in ones.
    `ema`: for a single file, the moving average of the UNet's weights.
    `prediction_type`: for a single file of SD 2.x that does not say it, "epsilon" or "v_prediction".

    Raises ValueError, FileNotFoundError or OSError, in one line that names the file or the option to give.
    """
    place = resolve(path_or_id, variant=variant)
    if place.is_dir():
        if ema or config is not None or prediction_type is not None:
            raise ValueError(f"{place}: ema, config and prediction_type are for single files; this is a folder")
        source = _from_folder(place, variant)
    else:
        beside = None if config is None else resolve(config, variant=variant)
        source = _from_file(place, beside, variant, ema, prediction_type)
    if vae is not None:
        source = _with_vae(source, resolve(vae, variant=variant), variant)
    for component in COMPONENTS:
        if component not in source.tensors:
            option = "vae=... or config=..." if component == "vae" else "config=..."
            raise ValueError(f"{place}: holds no {component}; give {option}, a diffusers folder that has one")
    if source.tokenizer_folder is None:
        raise ValueError(f"{place}: a single file has no tokenizer; give config=..., a diffusers folder that has one")

    models = {}
    for component, model in MODELS.items():
        parsed = CONFIGS[component].from_json(source.configs[component])
        models[component] = fill(
            abstract(model, parsed, dtype=dtype, param_dtype=param_dtype),
            source.tensors[component],
            param_dtype=param_dtype,
            name=f"{component} of {source.files[component][0]}",
            sharding=sharding,
        )
    files = tuple(dict.fromkeys(file for component in COMPONENTS for file in source.files[component]))
    scheduler = {**SCHEDULER_DEFAULTS, **source.scheduler}
    return Components(
        **models,
        tokenizer_folder=source.tokenizer_folder,
        scheduler=scheduler,
        files=files,
        configs={component: source.configs[component] for component in COMPONENTS},
    )


def digest(files: Iterable[Path]) -> str:
    """SHA-256, in hexadecimal, of the contents of the files one after another."""
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                total.update(block)
    return total.hexdigest()


def _from_folder(folder: Path, variant: str | None) -> _Source:
    if not (folder / "model_index.json").exists():
        raise ValueError(f"{folder}: not a diffusers folder: there is no model_index.json")
    index = read_json(folder / "model_index.json")
    if more := [name for name in _UNSUPPORTED if _present(index.get(name))]:
        raise ValueError(f"{folder}: {index.get('_class_name')} is not supported: it has {', '.join(more)}")
    if missing := [name for name in (*COMPONENTS, "tokenizer", "scheduler") if not (folder / name).is_dir()]:
        raise ValueError(f"{folder}: incomplete: there is no {', '.join(missing)}")
    source = _Source(
        configs={component: _config(component, folder / component) for component in COMPONENTS},
        scheduler=read_json(folder / "scheduler" / "scheduler_config.json"),
        tokenizer_folder=_tokenizer(folder),
    )
    for component in COMPONENTS:
        source = _with_model(source, component, folder / component, variant)
    return source


def _config(component: str, folder: Path) -> Json:
    """The config of a component. Raises ValueError, with the file, for what its network does not compute."""
    path = folder / "config.json"
    raw = read_json(path)
    CONFIGS[component].from_json(raw, str(path))
    return raw


def _present(entry: Any) -> bool:
    """model_index.json writes [null, null] for a component that the pipeline could have and does not."""
    return entry is not None and entry != [None, None]


def _tokenizer(folder: Path) -> Path:
    tokenizer = folder / "tokenizer"
    if not any((tokenizer / name).is_file() for name in _TOKENIZERS):
        raise ValueError(f"{tokenizer}: no tokenizer: there is no {' nor '.join(_TOKENIZERS)}")
    return tokenizer


def _with_model(source: _Source, component: str, folder: Path, variant: str | None) -> _Source:
    """The source with the weights of one component from a folder."""
    names = [path.name for path in folder.iterdir()]
    try:
        weights = folder / choose(names, component, variant)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return replace(
        source,
        tensors={**source.tensors, component: open_weights(weights)},
        files={**source.files, component: _files(weights)},
    )


def _files(weights: Path) -> tuple[Path, ...]:
    """The file itself, or the shards of an index."""
    if weights.suffix != ".json":
        return (weights,)
    return tuple(shard_paths(weights, read_index(weights).values()))


def _from_file(path: Path, beside: Path | None, variant: str | None, ema: bool, prediction: str | None) -> _Source:
    tensors = open_weights(path)
    said = ldm.scheduler_of(tensors, read_metadata(path)) | ({"prediction_type": prediction} if prediction else {})
    try:
        tensors = ldm.needed(tensors, str(path))
        source = _beside(beside, said) if beside else _alone(tensors, said)
        parsed = [CONFIGS[component].from_json(source.configs[component]) for component in COMPONENTS]
        parts = ldm.split(tensors, *parsed, ema=ema)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    held = {component: part for component, part in zip(COMPONENTS, parts, strict=True) if part}
    source = replace(source, tensors=held, files=dict.fromkeys(held, (path,)))
    for component in COMPONENTS:
        if component not in held and beside and (beside / component).is_dir():
            source = _with_model(source, component, beside / component, variant)
    return source


def _alone(tensors: Tensors, said: Json) -> _Source:
    """What the shapes of a single file tell of it, over which goes what is said of its scheduler."""
    configs = ldm.detect(tensors, said.get("prediction_type"))
    return _Source({component: configs[component] for component in COMPONENTS}, configs["scheduler"] | said)


def _beside(folder: Path, said: Json) -> _Source:
    """What the folder that is given with a single file tells of it, over which goes what is said of its scheduler."""
    configs = {component: _config(component, folder / component) for component in COMPONENTS}
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json") | said
    return _Source(configs, scheduler, _tokenizer(folder))


def _with_vae(source: _Source, place: Path, variant: str | None) -> _Source:
    """The source with its VAE from elsewhere: a pipeline's folder, a VAE's folder, or a file of either layout."""
    if place.is_dir():
        folder = place / "vae" if (place / "vae").is_dir() else place
        configs = {**source.configs, "vae": _config("vae", folder)}
        return _with_model(replace(source, configs=configs), "vae", folder, variant)
    tensors = open_weights(place)
    for prefix in ldm.VAES:
        tensors = ldm.below(tensors, prefix) or tensors
    if any(key.startswith("encoder.down.") for key in tensors):
        tensors = ldm.vae_names(tensors, VAEConfig.from_json(source.configs["vae"]))
    return replace(source, tensors={**source.tensors, "vae": tensors}, files={**source.files, "vae": _files(place)})
