"""The networks of SD 1.5 at full size, with random weights, against diffusers and transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sd_port.weights.configs import BUILT_IN
from tests.sd_port.test_models import call
from tests.sd_port.torch_models import (
    distance,
    text_like,
    to_nchw,
    to_nhwc,
    torch_text,
    torch_unet,
    torch_vae,
    unet_like,
    vae_like,
)
from tests.tolerances import PARITY_32

pytestmark = pytest.mark.exhaustive  # the forms that these sizes choose: test_conv.py, test_attention.py

SD15 = BUILT_IN["SD 1.5"]
rng = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def test_unet():
    """860 million parameters on 64 x 64 latents, in the forms of convolution and attention that this size chooses."""
    theirs = torch_unet(SD15["unet"], size=0.003)
    ours = unet_like(theirs, SD15["unet"])
    x, context, t = normal(1, 64, 64, 4), normal(1, 77, 768), np.array([481])
    with torch.no_grad():
        expected = to_nhwc(theirs(to_nchw(x), torch.tensor(t), torch.tensor(context)).sample)
    del theirs
    kv = call(ours, jnp.asarray(context), method="text_kv")
    got = call(ours, jnp.asarray(x), jnp.asarray(t), kv)
    assert distance(got, expected) < PARITY_32
    assert sum(leaf.size for leaf in jax.tree.leaves(ours)) == 859_520_964  # the published count


def test_vae():
    """Encoder and decoder on a picture of 128 x 128."""
    theirs = torch_vae(SD15["vae"], size=0.003)
    ours = vae_like(theirs, SD15["vae"])
    image = normal(1, 128, 128, 3)
    with torch.no_grad():
        posterior = theirs.encode(to_nchw(image)).latent_dist
        decoded = to_nhwc(theirs.decode(posterior.mean).sample)
    mean, std = call(ours, jnp.asarray(image), method="encode")
    assert distance(mean, to_nhwc(posterior.mean)) < PARITY_32
    assert distance(std, to_nhwc(posterior.std)) < PARITY_32
    assert distance(call(ours, jnp.asarray(to_nhwc(posterior.mean)), method="decode"), decoded) < PARITY_32


def test_text_encoder():
    theirs = torch_text(SD15["text_encoder"], size=0.003)
    ours = text_like(theirs, SD15["text_encoder"])
    tokens = rng.integers(0, 49408, (2, 77))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).last_hidden_state.numpy()
    assert distance(call(ours, jnp.asarray(tokens)), expected) < PARITY_32
