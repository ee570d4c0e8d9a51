"""The networks against diffusers and transformers with the same random weights: blocks, whole, odd sizes, dtypes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from sd_port.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from sd_port.models.layers import LoRA
from sd_port.models.unet import UNet
from sd_port.models.vae import AutoencoderKL
from sd_port.weights.fill import abstract
from tests.sd_port.torch_models import (
    SMALL_TEXT,
    SMALL_UNET,
    SMALL_VAE,
    TEXTS,
    UNETS,
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
from tests.tolerances import PARITY_16, PARITY_32

pytestmark = pytest.mark.hasty

rng = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def call(module: nnx.Module, *args, method: str = "__call__"):
    """A compiled call of a module's method, the same for modules that differ in numbers only."""
    graph, state = nnx.split(module)
    return compiled(graph, method, state, *args)


@partial(jax.jit, static_argnums=(0, 1))
def compiled(graph, method, state, *args):
    return getattr(nnx.merge(graph, state), method)(*args)


def predict(model: UNet, x, timesteps, context):
    kv = call(model, jnp.asarray(context), method="text_kv")
    return call(model, jnp.asarray(x), jnp.asarray(timesteps), kv)


@pytest.mark.parametrize(
    ("name", "size"), [*((name, (8, 8)) for name in UNETS), ("sd1", (13, 18))], ids=lambda v: str(v).replace(" ", "")
)
def test_unet(name, size):
    """Whole UNets of SD 1.x, inpainting and SD 2.x, on a batch of three with three timesteps."""
    config = UNETS[name]
    theirs = torch_unet(config)
    ours = unet_like(theirs, config)
    x, context, t = normal(3, *size, config.get("in_channels", 4)), normal(3, 77, 24), np.array([981, 500, 3])
    with torch.no_grad():
        expected = theirs(to_nchw(x), torch.tensor(t), torch.tensor(context)).sample
    assert distance(predict(ours, x, t, context), to_nhwc(expected)) < PARITY_32
    # Negative control: another timestep is seen.
    assert distance(predict(ours, x, t - 2, context), to_nhwc(expected)) > 10 * PARITY_32


@pytest.mark.parametrize("block", ["down_blocks.0", "mid_block", "up_blocks.1"])
def test_unet_blocks(block):
    """One block at a time, on its own inputs."""
    theirs = torch_unet(UNETS["sd1"])
    ours = unet_like(theirs, UNETS["sd1"])
    time, context = normal(2, 128), normal(2, 77, 24)
    torch_time, torch_context = torch.tensor(time), torch.tensor(context)
    kv = call(ours, jnp.asarray(context), method="text_kv")
    shared = jax.nn.silu(jnp.asarray(time))  # ours applies the silu once, theirs in every residual block
    with torch.no_grad():
        if block == "down_blocks.0":
            x = normal(2, 8, 8, 32)
            expected, _ = theirs.down_blocks[0](to_nchw(x), torch_time, torch_context)
            got, _ = call(ours.down_blocks[0], jnp.asarray(x), shared, kv.down[0])
        elif block == "mid_block":
            x = normal(2, 4, 4, 64)
            expected = theirs.mid_block(to_nchw(x), torch_time, torch_context)
            got = call(ours.mid_block, jnp.asarray(x), shared, kv.mid)
        else:
            x, skips = normal(2, 4, 4, 64), [normal(2, 8, 8, 32)] + [normal(2, 4, 4, c) for c in (32, 64, 64)]
            theirs_skips = tuple(to_nchw(s) for s in skips[1:])
            expected = theirs.up_blocks[1](to_nchw(x), theirs_skips, torch_time, torch_context)
            got = call(ours.up_blocks[1], jnp.asarray(x), [jnp.asarray(s) for s in skips], shared, kv.up[1])
    assert distance(got, to_nhwc(expected)) < PARITY_32


@pytest.mark.parametrize("size", [(32, 40), (24, 8)])
def test_vae(size):
    """Encoder (mean and std) and decoder."""
    theirs = torch_vae(SMALL_VAE)
    ours = vae_like(theirs, SMALL_VAE)
    image = normal(3, *size, 3)
    with torch.no_grad():
        posterior = theirs.encode(to_nchw(image)).latent_dist
        decoded = theirs.decode(posterior.mean).sample
    mean, std = call(ours, jnp.asarray(image), method="encode")
    assert distance(mean, to_nhwc(posterior.mean)) < PARITY_32
    assert distance(std, to_nhwc(posterior.std)) < PARITY_32
    assert distance(call(ours, mean, method="decode"), to_nhwc(decoded)) < PARITY_32
    assert distance(call(ours, mean * 1.001, method="decode"), to_nhwc(decoded)) > PARITY_32


@pytest.mark.parametrize("config", TEXTS.values(), ids=TEXTS)
def test_text_encoder(config):
    """Hidden states after the last norm, for both activations; a token moves only what comes after it."""
    theirs = torch_text(config)
    ours = text_like(theirs, config)
    tokens = rng.integers(0, 600, (3, 77))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).last_hidden_state.numpy()
    got = call(ours, jnp.asarray(tokens))
    assert distance(got, expected) < PARITY_32
    tokens[:, 40] = (tokens[:, 40] + 1) % 600
    other = call(ours, jnp.asarray(tokens))
    np.testing.assert_array_equal(other[:, :40], got[:, :40])
    assert distance(other, expected) > PARITY_32


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_half_precision(dtype):
    """Parameters and activations of 16 bits: the output has their dtype, and is as near to float32 as torch's is."""
    half = {jnp.bfloat16: torch.bfloat16, jnp.float16: torch.float16}[dtype]
    policy = {"dtype": dtype, "param_dtype": dtype}
    unet, vae, text = torch_unet(SMALL_UNET, size=0.02), torch_vae(SMALL_VAE, size=0.02), torch_text(SMALL_TEXT)
    x, context, t = normal(2, 8, 8, 4), normal(2, 77, 24), np.array([981, 7])
    latent, tokens = normal(2, 8, 8, 4), rng.integers(0, 600, (2, 77))
    our_vae = vae_like(vae, SMALL_VAE, **policy)
    assert jax.eval_shape(our_vae.encode, jnp.zeros((1, 16, 16, 3))).mean.dtype == jnp.float32
    got = (
        predict(unet_like(unet, SMALL_UNET, **policy), x, t, context),
        call(our_vae, jnp.asarray(latent), method="decode"),
        call(text_like(text, SMALL_TEXT, **policy), jnp.asarray(tokens)),
    )

    def theirs(kind: torch.dtype) -> list[np.ndarray]:
        with torch.no_grad():
            noise = unet.to(kind)(to_nchw(x).to(kind), torch.tensor(t), torch.tensor(context).to(kind)).sample
            image = vae.to(kind).decode(to_nchw(latent).to(kind)).sample
            return [to_nhwc(noise), to_nhwc(image), text.to(kind)(torch.tensor(tokens))[0].float().numpy()]

    for ours, wide, narrow in zip(got, theirs(torch.float32), theirs(half), strict=True):
        assert ours.dtype == dtype
        # A decoder of small random weights is badly conditioned: torch's own bfloat16 is 2% off there.
        assert PARITY_32 < distance(ours, wide) < max(PARITY_16, 1.5 * distance(narrow, wide))


def test_parameters_and_activations_apart():
    """float32 parameters, bfloat16 activations: all parameters stay what they were, no float64 comes in."""
    model = unet_like(torch_unet(SMALL_UNET), SMALL_UNET, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {np.dtype("float32")}
    out = predict(model, normal(1, 8, 8, 4), np.array([5]), normal(1, 77, 24))
    assert out.dtype == jnp.bfloat16


def test_a_fresh_adapter_changes_nothing_and_a_trained_one_does():
    """W + (alpha / rank) down up, for a Linear and a convolution, as one kernel with the change added."""
    model = unet_like(torch_unet(SMALL_UNET, size=0.02), SMALL_UNET)
    inputs = normal(1, 8, 8, 4), np.array([5]), normal(1, 77, 24)
    before = predict(model, *inputs)
    linear = model.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    conv = model.up_blocks[0].upsamplers[0].conv
    for layer in (linear, conv):
        layer.lora = LoRA.fresh(layer.kernel.shape, 3, alpha=1.5, rngs=nnx.Rngs(1))
        assert layer.lora.rank == 3
    np.testing.assert_array_equal(predict(model, *inputs), before)
    for layer in (linear, conv):
        layer.lora.up[...] = jnp.asarray(normal(*layer.lora.up.shape))
    adapted = predict(model, *inputs)
    for layer in (linear, conv):
        layer.kernel[...] = layer.kernel[...] + 0.5 * layer.lora.down[...] @ layer.lora.up[...]
        layer.lora = None
    assert distance(adapted, predict(model, *inputs)) < PARITY_32
    assert distance(adapted, before) > 1e-3


@pytest.mark.parametrize(
    ("kind", "change", "named"),
    [
        (UNetConfig, {"act_fn": "gelu"}, "act_fn"),
        (UNetConfig, {"addition_embed_type": "text_time"}, "addition_embed_type"),
        (UNetConfig, {"down_block_types": ["AttnDownBlock2D"] * 4}, "AttnDownBlock2D"),
        (UNetConfig, {"only_cross_attention": [True, False, False, False]}, "only_cross_attention"),
        (UNetConfig, {"block_out_channels": [32, 64]}, "down_block_types"),
        (UNetConfig, {"norm_num_groups": 7}, "norm_num_groups"),
        (UNetConfig, {"cross_attention_dim": [768, 1024]}, "cross_attention_dim"),
        (UNetConfig, {"layers_per_block": [2, 2, 2, 3]}, "layers_per_block"),
        (UNetConfig, {"in_channels": "4"}, "in_channels"),
        (VAEConfig, {"up_block_types": ["AttnUpDecoderBlock2D"]}, "up_block_types"),
        (VAEConfig, {"shift_factor": 0.1}, "shift_factor"),
        (CLIPTextConfig, {"hidden_act": "relu"}, "hidden_act"),
        (CLIPTextConfig, {"num_attention_heads": 7}, "heads"),
    ],
)
def test_unsupported_values_are_named(kind, change, named):
    with pytest.raises(ValueError, match=named):
        kind.from_json(change)


def test_unknown_keys_are_ignored_and_lists_that_agree_are_read():
    config = UNetConfig.from_json(
        {"_class_name": "x", "future": 1, "layers_per_block": [2, 2, 2, 2], "act_fn": "swish"}
    )
    assert config == UNetConfig(cross_attention_dim=1280)
    assert UNetConfig.from_json({"attention_head_dim": [5, 10, 20, 20]}).heads == (5, 10, 20, 20)
    assert VAEConfig.from_json({}).scaling_factor == 0.18215


def test_optional_parts_of_the_vae():
    """Without quant_conv the VAE has no such parameters."""
    model = abstract(AutoencoderKL, VAEConfig.from_json(SMALL_VAE | {"use_quant_conv": False}))
    names = {path[0] for path, _ in nnx.to_flat_state(nnx.state(model))}
    assert names == {"encoder", "decoder", "post_quant_conv"}
