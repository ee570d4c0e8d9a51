"""A model of a few thousand random weights, in files as diffusers has them, for what does not depend on the network.

It is written without torch, takes pictures of any size that the bundled model takes, and reads the same tokens.
"""

import atexit
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sd_port.nano import known
from sd_port.weights import hub, read
from sd_port.weights.fill import abstract
from sd_port.weights.save import save

NANO = hub.BUNDLED["nano"]
ABSTRACT = cache(abstract)
UNET = {
    "sample_size": 16,
    "block_out_channels": [8],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 8,
    "norm_num_groups": 4,
}
VAE = {
    "block_out_channels": [8, 8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 1.0,
}
TEXT = {
    "vocab_size": 689,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
}
CONFIGS = {"unet": UNET, "vae": VAE, "text_encoder": TEXT}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": True,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}


def drawn(name: str, seed: int = 0) -> nnx.Module:
    """One of the networks: every kernel keeps the size of what it is given, biases and norms are not quite plain."""
    module = ABSTRACT(read.MODELS[name], read.CONFIGS[name].from_json(CONFIGS[name]))
    rng, state = np.random.default_rng(seed), nnx.to_flat_state(nnx.state(module, nnx.Param))
    for path, variable in state:
        size = 1 / np.sqrt(np.prod(variable.shape[:-1])) if path[-1] in ("kernel", "embedding") else 0.1
        value = (path[-1] == "scale") + size * rng.normal(size=variable.shape)
        # Cast by NumPy and told the dtype, JAX compiles nothing.
        variable.set_value(jnp.asarray(value.astype(variable.dtype), variable.dtype))
    nnx.update(module, nnx.from_flat_state(state))
    return module


@cache
def folder() -> Path:
    """The model on disk; it goes when the tests end."""
    holder = Path(mkdtemp())
    atexit.register(shutil.rmtree, holder)
    networks = [drawn(name) for name in CONFIGS]
    save(holder / "tiny", *networks, configs=CONFIGS, tokenizer_folder=NANO / "tokenizer", scheduler=SCHEDULER)
    return holder / "tiny"


def instead_of_nano(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands find this model under the name nano, and the shapes of every model are found once.

    No picture is unknown to it, as it knows none.
    """
    monkeypatch.setitem(hub.BUNDLED, "nano", folder())
    monkeypatch.setattr(known, "LARGEST_ERROR", np.inf)
    shapes_once(monkeypatch)


def shapes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing the models for their shapes takes most of the time of a read, and the models of the tests are few."""
    monkeypatch.setattr(read, "abstract", ABSTRACT)
