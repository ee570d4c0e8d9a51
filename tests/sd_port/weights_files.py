"""Small random checkpoints, written by torch, diffusers and transformers: what the loaders are held to."""

import json
import string
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline
from flax import nnx
from transformers import CLIPTokenizer

from sd_port.weights.checkpoint import LazyTensor
from sd_port.weights.save import torch_tensors
from tests.sd_port.torch_models import torch_text, torch_unet, torch_vae

COMPONENTS = ("unet", "vae", "text_encoder")

SMALL_UNET = {
    "sample_size": 16,
    "block_out_channels": [32, 64, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 2,
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
}
UNETS = {
    "sd1": SMALL_UNET,
    "inpainting": SMALL_UNET | {"in_channels": 9},
    "sd2": SMALL_UNET | {"attention_head_dim": [2, 4, 4], "use_linear_projection": True},
    "one layer": SMALL_UNET | {"layers_per_block": 1},
}
SMALL_VAE = {
    "block_out_channels": [16, 32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 2,
    "norm_num_groups": 8,
}
SMALL_TEXT = {
    "vocab_size": 600,
    "hidden_size": 24,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
}


def write_tokenizer(folder: Path) -> Path:
    """A vocabulary of single letters, in the files that the Hub has."""
    letters = list(string.ascii_lowercase)
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77}))
    return folder


@cache
def torch_models() -> dict[str, torch.nn.Module]:
    return {"unet": torch_unet(SMALL_UNET), "vae": torch_vae(SMALL_VAE), "text_encoder": torch_text(SMALL_TEXT)}


def pipeline(tokenizer: Path, models: Mapping[str, torch.nn.Module] | None = None) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        **(models or torch_models()),
        tokenizer=CLIPTokenizer.from_pretrained(write_tokenizer(tokenizer)),
        scheduler=PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def arrays(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {key: value.detach().numpy() for key, value in model.state_dict().items()}


def lazy(tensors: Mapping[str, np.ndarray]) -> dict[str, LazyTensor]:
    return {key: LazyTensor(value.shape, value.dtype, lambda value=value: value) for key, value in tensors.items()}


def assert_holds(module: nnx.Module, expected: Mapping[str, np.ndarray]) -> None:
    """The module's parameters, in torch's names and layout, equal these bit for bit."""
    held = torch_tensors(module)
    assert held.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(held[key], value, err_msg=key, strict=True)
