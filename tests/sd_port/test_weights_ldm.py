"""The names of single files, against diffusers' own converters, at full size and small."""

from collections.abc import Iterable
from functools import cache

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from flax import nnx

from sd_port.models.clip_text import CLIPTextModel
from sd_port.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from sd_port.models.unet import UNet
from sd_port.models.vae import AutoencoderKL
from sd_port.weights import ldm
from sd_port.weights.checkpoint import LazyTensor
from sd_port.weights.configs import BUILT_IN
from sd_port.weights.fill import abstract
from sd_port.weights.names import torch_key
from tests.sd_port.weights_files import SMALL_TEXT, SMALL_UNET, SMALL_VAE, UNETS, arrays, lazy, torch_models

ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
FULL = {name: BUILT_IN[name]["unet"] for name in ("SD 1.5", "SD 2.1")}


@cache
def shapes_of(model, config) -> dict[str, tuple[int, ...]]:
    """All keys of a model, and the shapes of its parameters here, without their values."""
    return {torch_key(path): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(abstract(model, config)))}


def keys_of(model, config) -> list[str]:
    return list(shapes_of(model, config))


def to_ldm_vae(keys: Iterable[str], config: VAEConfig) -> list[str]:
    """The keys in a file of the LDM repository, whose attention has names of its own."""
    table, theirs = ldm.vae_table(config), []
    for key in keys:
        for name, old in ATTENTION.items():
            key = key.replace(f"attentions.0.{name}.", f"attentions.0.{old}.")
        theirs.append(ldm.rename(key, table))
    return theirs


def numbered(keys) -> dict[str, torch.Tensor]:
    """A different number for every key, so that an exchange is seen."""
    return {key: torch.tensor([[float(i)]]) for i, key in enumerate(keys)}


def same_numbers(a, b) -> bool:
    return a.keys() == b.keys() and all(a[key].reshape(()) == b[key].reshape(()) for key in a)


@pytest.mark.parametrize("raw", [*FULL.values(), *UNETS.values()], ids=[*FULL, *UNETS])
def test_unet_names_against_diffusers(raw):
    config = UNetConfig.from_json(raw)
    table, values = ldm.unet_table(config), numbered(keys_of(UNet, config))
    file = {ldm.UNET + ldm.rename(key, table): value for key, value in values.items()}
    assert len(file) == len(values)
    assert same_numbers(convert_ldm_unet_checkpoint(file, raw), values)

    exchanged = {**table, "down_blocks.0.resnets.0.norm1": table["down_blocks.0.resnets.0.norm2"],
                 "down_blocks.0.resnets.0.norm2": table["down_blocks.0.resnets.0.norm1"]}  # fmt: skip
    wrong = {ldm.UNET + ldm.rename(key, exchanged): value for key, value in values.items()}
    assert not same_numbers(convert_ldm_unet_checkpoint(wrong, raw), values)  # negative control


@pytest.mark.parametrize("raw", [BUILT_IN["SD 1.5"]["vae"], SMALL_VAE], ids=["full", "small"])
def test_vae_names_against_diffusers(raw):
    config = VAEConfig.from_json(raw)
    values = numbered(keys_of(AutoencoderKL, config))
    theirs = to_ldm_vae(values, config)
    file = {"first_stage_model." + key: value for key, value in zip(theirs, values.values(), strict=True)}
    assert len(file) == len(values)
    assert same_numbers(convert_ldm_vae_checkpoint(file, raw), values)

    not_reversed = {key.replace("up.0.", "up.9.").replace("up.1.", "up.0.").replace("up.9.", "up.1."): value
                    for key, value in file.items()}  # fmt: skip
    assert not same_numbers(convert_ldm_vae_checkpoint(not_reversed, raw), values)  # negative control


def test_names_that_everybody_knows():
    """Keys read in published files of SD 1.x."""
    config = UNetConfig.from_json(BUILT_IN["SD 1.5"]["unet"])
    table = ldm.unet_table(config)
    file = {ldm.rename(key, table) for key in keys_of(UNet, config)}
    assert file >= {
        "time_embed.0.weight",
        "input_blocks.0.0.weight",
        "input_blocks.3.0.op.weight",
        "input_blocks.4.0.skip_connection.weight",
        "input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight",
        "input_blocks.11.0.emb_layers.1.bias",
        "middle_block.1.proj_in.weight",
        "output_blocks.2.1.conv.weight",
        "output_blocks.5.2.conv.weight",
        "output_blocks.11.1.norm.weight",
        "out.2.bias",
    }
    assert len(file) == 686  # tensors of the UNet
    vae = VAEConfig.from_json(BUILT_IN["SD 1.5"]["vae"])
    held = set(to_ldm_vae(keys_of(AutoencoderKL, vae), vae))
    assert held >= {
        "encoder.down.0.downsample.conv.weight",
        "encoder.down.1.block.0.nin_shortcut.weight",
        "decoder.up.3.upsample.conv.weight",
        "decoder.up.0.block.0.nin_shortcut.weight",
        "decoder.mid.attn_1.proj_out.bias",
        "quant_conv.weight",
    }
    assert len(held) == 248


@pytest.mark.parametrize("raw", [*FULL.values(), *UNETS.values()], ids=[*FULL, *UNETS])
def test_unet_tables_are_one_to_one(raw):
    config = UNetConfig.from_json(raw)
    table = ldm.unet_table(config)
    assert len(ldm.inverse(table)) == len(table)
    for key in keys_of(UNet, config):
        assert ldm.rename(ldm.rename(key, table), ldm.inverse(table)) == key


def test_unknown_keys_keep_their_names():
    table = ldm.unet_table(UNetConfig.from_json(SMALL_UNET))
    assert ldm.rename("input_blocks.77.0.in_layers.0.weight", ldm.inverse(table)).startswith("input_blocks.77")
    assert ldm.rename("label_emb.0.weight", ldm.inverse(table)) == "label_emb.0.weight"


PUBLISHED = {  # parameters, as the model cards and papers count them
    ("SD 1.5", "unet"): 859_520_964,
    ("SD 1.5 inpainting", "unet"): 859_535_364,
    ("SD 2.1 base", "unet"): 865_910_724,
    ("SD 1.5", "vae"): 83_653_863,
    ("SD 1.5", "text_encoder"): 123_060_480,
    ("SD 2.1 base", "text_encoder"): 340_387_840,
}


@pytest.mark.parametrize(("name", "component"), PUBLISHED)
def test_built_in_configs_have_the_published_sizes(name, component):
    model, config = {
        "unet": (UNet, UNetConfig),
        "vae": (AutoencoderKL, VAEConfig),
        "text_encoder": (CLIPTextModel, CLIPTextConfig),
    }[component]
    parsed = config.from_json(BUILT_IN[name][component])
    assert sum(map(np.prod, shapes_of(model, parsed).values())) == PUBLISHED[name, component]


def a_unet(channels: int, width: int) -> dict[str, LazyTensor]:
    shapes = {"0.0.weight": (320, channels, 3, 3), "1.1.transformer_blocks.0.attn2.to_k.weight": (320, width)}
    return {
        f"{ldm.UNET}input_blocks.{key}": LazyTensor(shape, np.dtype(np.float32), lambda: pytest.fail("not to be read"))
        for key, shape in shapes.items()
    }


@pytest.mark.parametrize(
    ("channels", "width", "prediction", "name"),
    [
        (4, 768, None, "SD 1.5"),
        (9, 768, None, "SD 1.5 inpainting"),
        (4, 1024, "epsilon", "SD 2.1 base"),
        (4, 1024, "v_prediction", "SD 2.1"),
        (9, 1024, None, "SD 2 inpainting"),
    ],
)
def test_the_variant_is_told_by_shapes(channels, width, prediction, name):
    assert ldm.detect(a_unet(channels, width), prediction) is BUILT_IN[name]


def test_what_cannot_be_told_is_asked_for():
    with pytest.raises(ValueError, match="prediction_type='epsilon'"):
        ldm.detect(a_unet(4, 1024), None)
    with pytest.raises(ValueError, match="4 input channels for texts of width 2048"):
        ldm.detect(a_unet(4, 2048), None)
    with pytest.raises(ValueError, match="not a single-file checkpoint"):
        ldm.detect({}, None)


CONFIGS = UNetConfig.from_json(SMALL_UNET), VAEConfig.from_json(SMALL_VAE), CLIPTextConfig.from_json(SMALL_TEXT)


def single_file() -> dict[str, np.ndarray]:
    """The small pipeline in the layout of SD 1.x."""
    unet, vae, text = (arrays(model) for model in torch_models().values())
    table = ldm.unet_table(CONFIGS[0])
    file = {ldm.UNET + ldm.rename(key, table): value for key, value in unet.items()}
    for key, theirs, value in zip(vae, to_ldm_vae(vae, CONFIGS[1]), vae.values(), strict=True):
        square = "attentions" in key and value.ndim == 2
        file["first_stage_model." + theirs] = value[..., None, None] if square else value
    file |= {f"{ldm.CLIP}text_model.{key}": value for key, value in text.items()}
    return file


def single_unet() -> dict[str, np.ndarray]:
    return {key: value for key, value in single_file().items() if key.startswith(ldm.UNET)}


def test_parts_of_a_file():
    file = single_file() | {"betas": np.ones(1000), "model_ema.decay": np.ones(()), "posterior_variance": np.ones(9)}
    parts = ldm.split(lazy(file), *CONFIGS)
    unet, _, text = (arrays(model) for model in torch_models().values())
    assert parts.unet.keys() == unet.keys()
    assert {key.removeprefix("text_model.") for key in parts.text_encoder} == text.keys()
    assert all(np.array_equal(parts.unet[key].load(), value) for key, value in unet.items())


def test_a_file_without_vae_and_text_encoder():
    parts = ldm.split(lazy(single_unet()), *CONFIGS)
    assert parts.unet and not parts.vae and not parts.text_encoder
    with pytest.raises(ValueError, match="there is no unet"):
        ldm.split(lazy({k: v for k, v in single_file().items() if not k.startswith(ldm.UNET)}), *CONFIGS)


def test_strange_keys_are_named():
    with pytest.raises(ValueError, match=r"2 keys belong to no model.*: alphas, conditioner\.embedders\.0"):
        ldm.split(lazy(single_file() | {"alphas": np.ones(2), "conditioner.embedders.0": np.ones(2)}), *CONFIGS)


def test_a_parameter_given_under_both_names_is_refused():
    with pytest.raises(ValueError, match="twice"):
        ldm.split(lazy(single_file() | {ldm.UNET + "conv_in.bias": np.ones(2)}), *CONFIGS)


def with_averages(file):
    averages = {ldm.EMA + key.removeprefix("model.").replace(".", ""): value + 1
                for key, value in file.items() if key.startswith(ldm.UNET)}  # fmt: skip
    return file | averages


def test_moving_averages():
    file = with_averages(single_file())
    assert "model_ema.diffusion_modelinput_blocks00weight" in file
    plain, averaged = (ldm.split(lazy(file), *CONFIGS, ema=ema).unet for ema in (False, True))
    assert plain.keys() == averaged.keys()
    assert all(np.array_equal(averaged[key].load(), plain[key].load() + 1) for key in plain)


def test_moving_averages_that_are_not_there():
    with pytest.raises(ValueError, match="no moving average"):
        ldm.split(lazy(single_file()), *CONFIGS, ema=True)
    file = with_averages(single_file())
    del file["model_ema.diffusion_modelout2bias"]
    with pytest.raises(ValueError, match=r"1 of \d+ keys, such as model\.diffusion_model\.out\.2\.bias"):
        ldm.split(lazy(file), *CONFIGS, ema=True)


def open_clip(text: dict[str, np.ndarray], layers: int) -> dict[str, np.ndarray]:
    """The text encoder in OpenCLIP's layout, with one more layer than is used, written from its source."""
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn.out_proj": "attn.out_proj"}  # fmt: skip
    file = {
        "positional_embedding": text["embeddings.position_embedding.weight"],
        "token_embedding.weight": text["embeddings.token_embedding.weight"],
        "ln_final.weight": text["final_layer_norm.weight"],
        "ln_final.bias": text["final_layer_norm.bias"],
        "text_projection": np.eye(24, dtype=np.float32),
        "logit_scale": np.ones((), np.float32),
        "attn_mask": np.zeros((77, 77), np.float32),
    }
    for layer in range(layers + 1):
        ours, theirs = f"encoder.layers.{min(layer, layers - 1)}", f"transformer.resblocks.{layer}"
        for word in ("weight", "bias"):
            file |= {f"{theirs}.{b}.{word}": text[f"{ours}.{a}.{word}"] for a, b in names.items()}
            parts = [text[f"{ours}.self_attn.{part}_proj.{word}"] for part in "qkv"]
            file[f"{theirs}.attn.in_proj_{word}"] = np.concatenate(parts)
    return {f"cond_stage_model.model.{key}": value for key, value in file.items()}


def test_open_clip():
    """Ours from the file, and diffusers' from the file without the layer it knows by its number, 23."""
    text, layers = arrays(torch_models()["text_encoder"]), SMALL_TEXT["num_hidden_layers"]
    file = single_unet() | open_clip(text, layers)
    held = ldm.split(lazy(file), *CONFIGS).text_encoder
    assert held.keys() == text.keys()
    for key, value in text.items():
        assert held[key].shape == value.shape
        np.testing.assert_array_equal(held[key].load(), value, err_msg=key)

    used = {key: torch.tensor(value) for key, value in open_clip(text, layers).items()}
    used = {key: value for key, value in used.items() if f"resblocks.{layers}." not in key}
    theirs = convert_open_clip_checkpoint(torch_models()["text_encoder"], used)
    theirs = {key.removeprefix("text_model."): value.numpy() for key, value in theirs.items()}
    assert {key: value for key, value in theirs.items() if key in text}.keys() == text.keys()
    assert all(np.array_equal(held[key].load(), theirs[key]) for key in text)


def test_open_clip_with_more_layers_is_not_cut_silently():
    """Only the one layer that Stable Diffusion 2 does not use is dropped."""
    text, layers = arrays(torch_models()["text_encoder"]), SMALL_TEXT["num_hidden_layers"]
    file = single_unet() | open_clip(text, layers)
    file["cond_stage_model.model.transformer.resblocks.4.ln_1.weight"] = np.ones(24, np.float32)
    held = ldm.split(lazy(file), *CONFIGS).text_encoder
    assert held.keys() - text.keys() == {"transformer.resblocks.4.ln_1.weight"}


def test_a_fused_tensor_of_a_wrong_size_is_refused():
    file = single_unet() | {"cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight": np.ones((7, 24))}
    with pytest.raises(ValueError, match="7 rows"):
        ldm.split(lazy(file), *CONFIGS)
