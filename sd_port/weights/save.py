"""Writes Stable Diffusion as a diffusers folder."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import save_file

from sd_port.models.clip_text import CLIPTextModel
from sd_port.models.unet import UNet
from sd_port.models.vae import AutoencoderKL
from sd_port.weights.names import to_torch, torch_key
from theory.reading import Json

_WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
_CLASSES: dict[str, Json] = {
    "unet": {"_class_name": "UNet2DConditionModel"},
    "vae": {"_class_name": "AutoencoderKL"},
    # Without torch_dtype, transformers from 5 on computes in the dtype of the file, and diffusers beside it in float32.
    "text_encoder": {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "torch_dtype": "float32",
    },
}


def save(
    folder: Path,
    unet: UNet,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    *,
    configs: Mapping[str, Json],
    tokenizer_folder: Path,
    scheduler: Json,
) -> None:
    """Writes what `diffusers.StableDiffusionPipeline.from_pretrained(folder)` and `read(folder)` open.

    `configs` are the config.json of "unet", "vae" and "text_encoder", as `Components` has them. Parameters are
    written in the dtype they have; adapters are not written. The folder appears when it is complete, or not at all.
    Raises FileExistsError where there is something already.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder}: exists already; it is not overwritten")
    unfinished = folder.with_name(f".{folder.name}.part")  # one name: what a killed process left goes
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        for name, module in (("unet", unet), ("vae", vae), ("text_encoder", text_encoder)):
            (unfinished / name).mkdir()
            _write_json(unfinished / name / "config.json", {**configs[name], **_CLASSES[name]})
            # transformers before 5.6 wants the prefix, later ones take it.
            prefix = "text_model." if name == "text_encoder" else ""
            tensors = {prefix + key: value for key, value in torch_tensors(module).items()}
            save_file(tensors, unfinished / name / _WEIGHTS[name], metadata={"format": "pt"})
        shutil.copytree(tokenizer_folder, unfinished / "tokenizer")
        (unfinished / "scheduler").mkdir()
        _write_json(unfinished / "scheduler" / "scheduler_config.json", scheduler)
        _write_json(unfinished / "model_index.json", _model_index(configs, scheduler))
        unfinished.rename(folder)
    except SafetensorError as error:  # its name for what the system says, such as a full disk
        raise OSError(f"{folder}: {error}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def torch_tensors(module: nnx.Module) -> dict[str, np.ndarray]:
    """The parameters of a module by their keys and in the layout of torch."""
    leaves = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {torch_key(path): to_torch(path, np.asarray(leaf[...])) for path, leaf in leaves}


def _model_index(configs: Mapping[str, Json], scheduler: Json) -> Json:
    inpainting = configs["unet"].get("in_channels", 4) == 9
    return {
        "_class_name": "StableDiffusionInpaintPipeline" if inpainting else "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _write_json(path: Path, value: Json) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
