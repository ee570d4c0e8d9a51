"""A small random Stable Diffusion as diffusers writes it, and the same opened by both sides."""

import atexit
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import diffusers
from transformers import CLIPTokenizer

from sd_port.pipeline import StableDiffusion
from tests.sd_port.torch_models import SMALL_TEXT, SMALL_UNET, SMALL_VAE, torch_text, torch_unet, torch_vae
from tests.sd_port.weights_files import write_tokenizer

SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}


@cache
def theirs() -> diffusers.StableDiffusionPipeline:
    """diffusers' pipeline, with DDIM down to t = 0."""
    with TemporaryDirectory() as folder:
        tokenizer = CLIPTokenizer.from_pretrained(write_tokenizer(Path(folder) / "tokenizer"))
    pipe = diffusers.StableDiffusionPipeline(
        unet=torch_unet(SMALL_UNET, size=0.03),
        vae=torch_vae(SMALL_VAE, size=0.03),
        text_encoder=torch_text(SMALL_TEXT),
        tokenizer=tokenizer,
        scheduler=diffusers.DDIMScheduler(
            **SCHEDULER, clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=True
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def folder() -> Path:
    """diffusers' pipeline on disk; the folder goes when the tests end."""
    holder = mkdtemp()
    atexit.register(shutil.rmtree, holder)
    theirs().save_pretrained(Path(holder) / "small")
    return Path(holder) / "small"


@cache
def ours() -> StableDiffusion:
    """The same, read by us. Tests that attach adapters take them off again."""
    return StableDiffusion.load(folder())
