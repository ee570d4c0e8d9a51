"""The JSON configs of diffusers folders as frozen dataclasses.

Keys that nothing here needs are ignored; a value that changes what the network computes, and that these models do not
compute, is refused with its name. Defaults are those that diffusers and transformers give to an absent key.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

Config = TypeVar("Config")

ACTIVATIONS = ("silu", "swish")
TEXT_ACTIVATIONS = ("quick_gelu", "gelu")

# What each config may say where only one thing (or none) is computed here.
_UNET_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ACTIVATIONS,
    "addition_embed_type": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dropout": (0.0,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
_VAE_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ACTIVATIONS,
    "mid_block_add_attention": (True,),
    "latents_mean": (None,),
    "latents_std": (None,),
    "shift_factor": (None, 0.0),
}
_TEXT_FIXED: dict[str, tuple[Any, ...]] = {"attention_dropout": (0.0,), "hidden_act": TEXT_ACTIVATIONS}


@dataclass(frozen=True)
class UNetConfig:
    """unet/config.json of SD 1.x, SD 2.x and anything smaller (UNet2DConditionModel).

    `attention_head_dim` is the number of heads, for every level or one by level: the name is a mistake that
    diffusers keeps (its issue 2011). `sample_size` is the side of the latents in training.
    """

    sample_size: int | None = 64
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    transformer_layers_per_block: int = 1
    attention_head_dim: int | tuple[int, ...] = 8
    cross_attention_dim: int = 1280
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0
    use_linear_projection: bool = False
    upcast_attention: bool = False

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads by level."""
        heads = self.attention_head_dim
        return heads if isinstance(heads, tuple) else (heads,) * len(self.block_out_channels)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "UNetConfig":
        """Raises ValueError, naming every key at fault, for what these networks do not compute."""
        allowed = {
            **_UNET_FIXED,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        }
        config = _read(cls, "UNet config", raw, allowed)
        levels = len(config.block_out_channels)
        lengths = {
            "down_block_types": len(config.down_block_types),
            "up_block_types": len(config.up_block_types),
            "attention_head_dim": len(config.heads),
        }
        _refuse(
            "UNet config",
            [f"{key} has {n} entries for {levels} block_out_channels" for key, n in lengths.items() if n != levels]
            + _indivisible(config.block_out_channels, "norm_num_groups", [config.norm_num_groups] * levels)
            + _indivisible(config.block_out_channels, "attention heads", config.heads),
        )
        return config


@dataclass(frozen=True)
class VAEConfig:
    """vae/config.json (AutoencoderKL): latents = scaling_factor * encoder(image), 2^(levels - 1) times smaller."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, on each axis."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "VAEConfig":
        """Raises ValueError, naming every key at fault, for what these networks do not compute."""
        allowed = {
            **_VAE_FIXED,
            "down_block_types": ("DownEncoderBlock2D",),
            "up_block_types": ("UpDecoderBlock2D",),
        }
        config = _read(cls, "VAE config", raw, allowed)
        levels = len(config.block_out_channels)
        _refuse(
            "VAE config",
            [
                f"{key} has {len(getattr(config, key))} entries for {levels} block_out_channels"
                for key in ("down_block_types", "up_block_types")
                if len(getattr(config, key)) != levels
            ]
            + _indivisible(config.block_out_channels, "norm_num_groups", [config.norm_num_groups] * levels),
        )
        return config


@dataclass(frozen=True)
class CLIPTextConfig:
    """text_encoder/config.json (CLIPTextModel): the text half of CLIP (Radford et al. 2021, arXiv 2103.00020)."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "CLIPTextConfig":
        """Raises ValueError, naming every key at fault, for what this network does not compute."""
        config = _read(cls, "text encoder config", raw, _TEXT_FIXED)
        _refuse("text encoder config", _indivisible((config.hidden_size,), "heads", (config.num_attention_heads,)))
        return config


def _read(cls: type[Config], what: str, raw: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]) -> Config:
    faults = []
    for key, values in allowed.items():
        given = raw.get(key, values[0])
        for value in given if isinstance(given, list) else [given]:
            if value not in values:
                choices = " or ".join(repr(v) for v in values)
                faults.append(f"{key} = {value!r} is not supported, only {choices}")
    known = {}
    for field in fields(cls):  # type: ignore[arg-type]
        if field.name in raw:
            value = _value(field.name, raw[field.name], field.default)
            if not _fits(field.name, value, field.default):
                faults.append(f"{field.name} = {raw[field.name]!r}, expected something like {field.default!r}")
            known[field.name] = value
    _refuse(what, faults)
    return cls(**known)


def _value(name: str, value: Any, default: Any) -> Any:
    """Lists become tuples, or one number of layers if all levels have the same; 0 becomes 0.0 where one is due."""
    if isinstance(default, float) and isinstance(value, int):
        return float(value)
    if not isinstance(value, list):
        return value
    if name.endswith("layers_per_block") and len(set(map(str, value))) == 1:
        return value[0]
    return tuple(value)


def _fits(name: str, value: Any, default: Any) -> bool:
    """Whether a JSON value can stand where the default stands."""
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, tuple):
        return isinstance(value, tuple) and len(value) > 0 and all(_fits(name, v, default[0]) for v in value)
    if isinstance(default, str):
        return isinstance(value, str)
    if isinstance(value, tuple):
        return name == "attention_head_dim" and all(_fits(name, v, default) for v in value)
    if name == "sample_size":
        return value is None or isinstance(value, int)
    return isinstance(value, type(default)) and not isinstance(value, bool) and value >= 0


def _indivisible(channels: Sequence[int], what: str, parts: Sequence[int]) -> list[str]:
    pairs = zip(channels, parts, strict=False)
    return [f"{count} channels cannot be divided into {part} {what}" for count, part in pairs if count % part]


def _refuse(what: str, faults: Sequence[str]) -> None:
    if faults:
        raise ValueError(f"{what}: " + "; ".join(faults))
