"""Single files: one checkpoint with the names of the LDM repository (Rombach et al. 2022), to the names of diffusers.

A table holds pairs {diffusers name: LDM name} of layers, or of groups of layers that have the same names below them
on both sides. `rename(key, inverse(table))` reads a file and `rename(key, table)` would write one; a table is one to
one, so each undoes the other. The numbers in the names follow from the configs:

    input_blocks.0 is conv_in; then every layer and every downsampling of the way down has one number;
    output_blocks likewise on the way up, an upsampling being the last member of its block;
    the decoder of the VAE counts its levels from the image, so up.i is up_blocks[levels - 1 - i].
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from sd_port.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from sd_port.weights.checkpoint import LazyTensor
from sd_port.weights.configs import BUILT_IN
from theory.reading import Json

Table = dict[str, str]
Tensors = Mapping[str, LazyTensor]

UNET = "model.diffusion_model."
EMA = "model_ema."
VAES = ("first_stage_model.", "vae.")
CLIP = "cond_stage_model.transformer."
OPEN_CLIP = "cond_stage_model.model."

# In training checkpoints, and of no use: tables of the noise schedule, counters, CLIP's head.
IRRELEVANT = frozenset(
    {
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
        "lvlb_weights",
        "logvar",
        "scale_factor",
        "model_ema.decay",
        "model_ema.num_updates",
        "cond_stage_model.logit_scale",
        "cond_stage_model.text_projection",
        "cond_stage_model.model.attn_mask",
        "cond_stage_model.model.logit_scale",
        "cond_stage_model.model.text_projection",
    }
)
# What people's files have besides, and no edit needs: left out with a warning.
EXTRAS = ("embedding_manager.", "safety_checker.", "denoiser.", CLIP + "text_projection")
# Keys and metadata by which people's files say what their UNet was trained for; the tensors are empty.
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
PREDICT_KEY = "modelspec.predict_key"
PREDICTIONS = {"v": "v_prediction", "epsilon": "epsilon"}
# The loss of a VAE's training, and the moving average of an autoencoder's weights.
_VAE_IRRELEVANT = ("loss.", "model_ema.")


class Parts(NamedTuple):
    """The tensors of each model by their names in diffusers; empty where the file has none."""

    unet: Tensors
    vae: Tensors
    text_encoder: Tensors


def scheduler_of(tensors: Tensors, metadata: Mapping[str, str]) -> Json:
    """What a file itself says of its scheduler, and nothing where it does not."""
    prediction = "v_prediction" if V_PREDICTION in tensors else PREDICTIONS.get(metadata.get(PREDICT_KEY, ""))
    # Without a trailing grid the time at which there is no signal would never be seen (arXiv 2305.08891, Sec. 3.3).
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if ZERO_SNR in tensors else {}
    return zero | ({} if prediction is None else {"prediction_type": prediction})


def needed(tensors: Tensors, name: str) -> Tensors:
    """The tensors of the file of this name without marks, and without extras, of which it warns."""
    extras = {key for key in tensors if key.startswith(EXTRAS)}
    if extras:
        kinds = sorted(prefix + "*" for prefix in EXTRAS if any(key.startswith(prefix) for key in extras))
        said = f"{name}: {len(extras)} tensors that no edit needs are left out: {', '.join(kinds)}"
        warnings.warn(said, stacklevel=2)
    return {key: tensor for key, tensor in tensors.items() if key not in extras | {V_PREDICTION, ZERO_SNR}}


def detect(tensors: Tensors, prediction_type: str | None) -> dict[str, Json]:
    """The built-in configs of a single file, told by the shapes of its UNet.

    SD 2.1 base predicts the noise and SD 2.1 predicts v, and their shapes are the same: `prediction_type` must say
    "epsilon" or "v_prediction" there. Raises ValueError for what is no single file of SD 1.x or 2.x.
    """
    first, text = (UNET + key for key in ("input_blocks.0.0.weight", f"input_blocks.1.1.{_TO_K}.weight"))
    if first not in tensors or text not in tensors or len(tensors[first].shape) < 2 or len(tensors[text].shape) < 2:
        raise ValueError(f"not a single-file checkpoint of Stable Diffusion: {first} or {text} is missing")
    channels, width = tensors[first].shape[1], tensors[text].shape[1]
    if (channels, width) == (4, 1024) and prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            "SD 2.x: its file does not say what the UNet predicts; "
            "give prediction_type='epsilon' (2.1 base, 512 pixels) or 'v_prediction' (2.1, 768 pixels)"
        )
    names = {
        (4, 768): "SD 1.5",
        (9, 768): "SD 1.5 inpainting",
        (4, 1024): "SD 2.1" if prediction_type == "v_prediction" else "SD 2.1 base",
        (9, 1024): "SD 2 inpainting",
    }
    if (channels, width) not in names:
        raise ValueError(f"a UNet of {channels} input channels for texts of width {width} is neither SD 1.x nor 2.x")
    return BUILT_IN[names[channels, width]]


_TO_K = "transformer_blocks.0.attn2.to_k"


def split(tensors: Tensors, unet: UNetConfig, vae: VAEConfig, text: CLIPTextConfig, *, ema: bool = False) -> Parts:
    """The models of a single file. `ema` takes the moving average of the UNet's weights, kept in training files.

    Keys that no table knows keep their LDM names, so that `fill` refuses them. Raises ValueError where a key belongs
    to no model and is not in IRRELEVANT, where there is no UNet, and where `ema` is asked of a file without it.
    """
    prefixes = (UNET, EMA, *VAES, CLIP, OPEN_CLIP)
    if strange := sorted(k for k in tensors if not k.startswith(prefixes) and k not in IRRELEVANT):
        shown = ", ".join(strange[:8]) + (f" and {len(strange) - 8} more" if len(strange) > 8 else "")
        raise ValueError(f"{len(strange)} keys belong to no model of Stable Diffusion: {shown}")
    if not below(tensors, UNET):
        raise ValueError(f"there is no unet: no key begins with {UNET}")
    kept = {key: tensor for key, tensor in tensors.items() if key not in IRRELEVANT}
    vaes = {key: tensor for prefix in VAES for key, tensor in below(kept, prefix).items()}
    open_clip = below(kept, OPEN_CLIP)
    return Parts(
        _renamed(_averaged(tensors) if ema else below(kept, UNET), unet_table(unet)),
        vae_names(vaes, vae),
        open_clip_names(open_clip, text) if open_clip else below(kept, CLIP),
    )


def vae_names(tensors: Tensors, config: VAEConfig) -> Tensors:
    """An LDM autoencoder, with the prefix off, by the names of diffusers."""
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(_VAE_IRRELEVANT)}
    return _renamed(kept, vae_table(config))


def open_clip_names(tensors: Tensors, config: CLIPTextConfig) -> Tensors:
    """OpenCLIP's text encoder by the names of transformers: queries, keys and values are one tensor there.

    Stable Diffusion 2 reads the last layer but one: what stands in the file behind `num_hidden_layers` is dropped.
    """
    unused = f"transformer.resblocks.{config.num_hidden_layers}."
    names = {}
    for key, tensor in tensors.items():
        layer, fused, word = key.partition(".attn.in_proj_")
        if key.startswith(unused):
            continue
        if fused:
            target = rename(layer + ".attn", inverse(open_clip_table(config)))
            parts = zip(("q_proj", "k_proj", "v_proj"), _thirds(key, tensor), strict=True)
            names |= {f"{target}.{part}.{word}": third for part, third in parts}
        else:
            names[key] = tensor
    return _renamed(names, open_clip_table(config))


def unet_table(config: UNetConfig) -> Table:
    """{"down_blocks.0.resnets.0.norm1": "input_blocks.1.0.in_layers.0", ...}."""
    table = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        **_unet_resnet("mid_block.resnets.0", "middle_block.0"),
        "mid_block.attentions.0": "middle_block.1",
        **_unet_resnet("mid_block.resnets.1", "middle_block.2"),
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    last = len(config.block_out_channels) - 1
    number = 1
    for level, kind in enumerate(config.down_block_types):
        for layer in range(config.layers_per_block):
            table |= _unet_resnet(f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{number}.0")
            if kind.startswith("CrossAttn"):
                table[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        if level != last:
            table[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for level, kind in enumerate(config.up_block_types):
        cross = kind.startswith("CrossAttn")
        for layer in range(config.layers_per_block + 1):
            table |= _unet_resnet(f"up_blocks.{level}.resnets.{layer}", f"output_blocks.{number}.0")
            if cross:
                table[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{number}.1"
            number += 1
        if level != last:
            table[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{1 + cross}.conv"
    return table


def vae_table(config: VAEConfig) -> Table:
    """{"decoder.up_blocks.0.resnets.0": "decoder.up.3.block.0", ...}."""
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        table |= {
            f"{half}.conv_in": f"{half}.conv_in",
            f"{half}.mid_block.resnets.0": f"{half}.mid.block_1",
            f"{half}.mid_block.attentions.0": f"{half}.mid.attn_1",  # its layers: names.spellings
            f"{half}.mid_block.resnets.1": f"{half}.mid.block_2",
            f"{half}.conv_norm_out": f"{half}.norm_out",
            f"{half}.conv_out": f"{half}.conv_out",
        }
    last = len(config.block_out_channels) - 1
    for level in range(last + 1):
        for layer in range(config.layers_per_block):
            table |= _vae_resnet(f"encoder.down_blocks.{level}.resnets.{layer}", f"encoder.down.{level}.block.{layer}")
        for layer in range(config.layers_per_block + 1):
            table |= _vae_resnet(
                f"decoder.up_blocks.{last - level}.resnets.{layer}", f"decoder.up.{level}.block.{layer}"
            )
    for level in range(last):
        table[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = f"encoder.down.{level}.downsample.conv"
        table[f"decoder.up_blocks.{level}.upsamplers.0.conv"] = f"decoder.up.{last - level}.upsample.conv"
    return table


def open_clip_table(config: CLIPTextConfig) -> Table:
    """{"encoder.layers.0.mlp.fc1": "transformer.resblocks.0.mlp.c_fc", ...}."""
    table = {
        "embeddings.token_embedding": "token_embedding",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm": "ln_final",
    }
    names = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    for layer in range(config.num_hidden_layers):
        for ours, theirs in {**names, "self_attn": "attn"}.items():
            table[f"encoder.layers.{layer}.{ours}"] = f"transformer.resblocks.{layer}.{theirs}"
    return table


def inverse(table: Table) -> Table:
    return {theirs: ours for ours, theirs in table.items()}


def rename(key: str, table: Table) -> str:
    """The key with its longest known beginning exchanged; as it is where none is known."""
    known, rest = key, ""
    while known and known not in table:
        known, _, word = known.rpartition(".")
        rest = f".{word}{rest}"
    return table[known] + rest if known else key


def below(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors under a prefix, without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _renamed(tensors: Tensors, table: Table) -> Tensors:
    back = inverse(table)
    renamed = {rename(key, back): tensor for key, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        raise ValueError("the file gives a parameter twice, once by its name in LDM and once by its name in diffusers")
    return renamed


def _averaged(tensors: Tensors) -> Tensors:
    """The UNet's moving average: its names have lost their dots, so they are found from the names of the UNet."""
    averages = {key: EMA + key.removeprefix("model.").replace(".", "") for key in tensors if key.startswith(UNET)}
    if missing := [key for key, average in averages.items() if average not in tensors]:
        raise ValueError(f"no moving average (ema) of {len(missing)} of {len(averages)} keys, such as {missing[0]}")
    return {key.removeprefix(UNET): tensors[average] for key, average in averages.items()}


def _thirds(key: str, tensor: LazyTensor) -> Iterable[LazyTensor]:
    rows, *rest = tensor.shape
    if rows % 3:
        raise ValueError(f"{key} has {rows} rows, which are not queries, keys and values")
    size = rows // 3
    for i in range(3):
        part = slice(i * size, (i + 1) * size)
        yield LazyTensor((size, *rest), tensor.dtype, lambda part=part: tensor.load()[part])


def _unet_resnet(ours: str, theirs: str) -> Table:
    names = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    return {f"{ours}.{new}": f"{theirs}.{old}" for new, old in names.items()}


def _vae_resnet(ours: str, theirs: str) -> Table:
    return {ours: theirs, f"{ours}.conv_shortcut": f"{theirs}.nin_shortcut"}
