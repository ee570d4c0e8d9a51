"""The JSON configs of diffusers folders as frozen dataclasses.

Keys that nothing here needs are ignored; a value that changes what the network computes, and that these models do not
compute, is refused with its name. Defaults are those that diffusers and transformers give to an absent key.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from msgspec import Meta

from theory.reading import converted, shown

# What there can be of each: beyond all that was ever published, and little enough to be made and refused by its shapes.
Layers = Annotated[int, Meta(ge=1, le=64)]
Channels = Annotated[int, Meta(ge=1, le=2**15)]
Heads = Annotated[int, Meta(ge=1, le=2**10)]
Groups = Annotated[int, Meta(ge=1, le=2**10)]
Side = Annotated[int, Meta(ge=1, le=2**14)]  # of images and latents
Size = Side | Annotated[tuple[Side, ...], Meta(min_length=2, max_length=2)]  # one side, or height and width
Epsilon = Annotated[float, Meta(ge=0, le=1)]
Levels = Meta(min_length=1, max_length=8)

ACTIVATIONS = ("silu", "swish")

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
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
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
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
_VAE_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ACTIVATIONS,
    "down_block_types": ("DownEncoderBlock2D",),
    "mid_block_add_attention": (True,),
    "latents_mean": (None,),
    "latents_std": (None,),
    "shift_factor": (None, 0.0),
    "up_block_types": ("UpDecoderBlock2D",),
}
_TEXT_FIXED: dict[str, tuple[Any, ...]] = {"attention_dropout": (0.0,)}


@dataclass(frozen=True)
class UNetConfig:
    """unet/config.json of SD 1.x, SD 2.x and anything smaller (UNet2DConditionModel).

    `attention_head_dim` is the number of heads, for every level or one by level: the name is a mistake that
    diffusers keeps (its issue 2011). `sample_size` is the side of the latents in training, or height and width.
    A list that says the same of every level is one number.
    """

    sample_size: Size | None = 64
    in_channels: Channels = 4
    out_channels: Channels = 4
    down_block_types: Annotated[tuple[str, ...], Levels] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: Annotated[tuple[str, ...], Levels] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: Annotated[tuple[Channels, ...], Levels] = (320, 640, 1280, 1280)
    layers_per_block: Layers = 2
    transformer_layers_per_block: Layers = 1
    attention_head_dim: Heads | Annotated[tuple[Heads, ...], Levels] = 8
    cross_attention_dim: Channels = 1280
    norm_num_groups: Groups = 32
    norm_eps: Epsilon = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: Annotated[float, Meta(ge=-1e4, le=1e4)] = 0.0
    use_linear_projection: bool = False
    upcast_attention: bool = False

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of the latents in training, 64 where nothing is said of it."""
        size = self.sample_size or 64
        return (size[0], size[1]) if isinstance(size, tuple) else (size, size)

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads by level."""
        heads = self.attention_head_dim
        return heads if isinstance(heads, tuple) else (heads,) * len(self.block_out_channels)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], name: str = "UNet config") -> "UNetConfig":
        """Raises ValueError, with the name and the keys at fault, for what these networks do not compute."""
        raw = {**raw, **_agreed(raw, "layers_per_block", "transformer_layers_per_block", "cross_attention_dim")}
        config: UNetConfig = _read(cls, name, raw, _UNET_FIXED)
        levels, half = len(config.block_out_channels), config.block_out_channels[0] // 2
        lengths = {
            "down_block_types": len(config.down_block_types),
            "up_block_types": len(config.up_block_types),
            "attention_head_dim": len(config.heads),
        }
        _refuse(
            name,
            [f"{key} has {n} entries for {levels} block_out_channels" for key, n in lengths.items() if n != levels]
            + _indivisible(config.block_out_channels, "norm_num_groups", [config.norm_num_groups] * levels)
            + _indivisible(config.block_out_channels, "attention heads", config.heads)
            + [f"freq_shift must be below half of the first block_out_channels, {half}"] * (config.freq_shift >= half),
        )
        return config


@dataclass(frozen=True)
class VAEConfig:
    """vae/config.json (AutoencoderKL): latents = scaling_factor * encoder(image), 2^(levels - 1) times smaller."""

    in_channels: Channels = 3
    out_channels: Channels = 3
    latent_channels: Channels = 4
    down_block_types: Annotated[tuple[str, ...], Levels] = ("DownEncoderBlock2D",)
    up_block_types: Annotated[tuple[str, ...], Levels] = ("UpDecoderBlock2D",)
    block_out_channels: Annotated[tuple[Channels, ...], Levels] = (64,)
    layers_per_block: Layers = 1
    norm_num_groups: Groups = 32
    sample_size: Size = 32
    scaling_factor: Annotated[float, Meta(gt=0, le=1e4)] = 0.18215
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel, on each axis."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], name: str = "VAE config") -> "VAEConfig":
        """Raises ValueError, with the name and the keys at fault, for what these networks do not compute."""
        config: VAEConfig = _read(cls, name, raw, _VAE_FIXED)
        levels = len(config.block_out_channels)
        _refuse(
            name,
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

    vocab_size: Annotated[int, Meta(ge=1, le=2**20)] = 49408
    hidden_size: Channels = 512
    intermediate_size: Annotated[int, Meta(ge=1, le=2**17)] = 2048
    num_hidden_layers: Layers = 12
    num_attention_heads: Heads = 8
    max_position_embeddings: Annotated[int, Meta(ge=1, le=2**14)] = 77
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], name: str = "text encoder config") -> "CLIPTextConfig":
        """Raises ValueError, with the name and the keys at fault, for what this network does not compute."""
        config: CLIPTextConfig = _read(cls, name, raw, _TEXT_FIXED)
        _refuse(name, _indivisible((config.hidden_size,), "heads", (config.num_attention_heads,)))
        return config


def _read(cls: type, name: str, raw: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]]) -> Any:
    faults = []
    for key, values in fixed.items():
        given = raw.get(key, values[0])
        for value in given if isinstance(given, list) and given else [given]:
            if value not in values:
                choices = " or ".join(map(shown, values))
                faults.append(f"{key} = {shown(value)} is not supported, only {choices}")
    _refuse(name, faults)
    return converted(raw, cls, name)


def _agreed(raw: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Of these keys those that have an entry for every level, and the same one: it stands for all."""
    lists = {key: raw[key] for key in keys if isinstance(raw.get(key), list) and raw[key]}
    return {key: entries[0] for key, entries in lists.items() if all(entry == entries[0] for entry in entries)}


def _indivisible(channels: Sequence[int], what: str, parts: Sequence[int]) -> list[str]:
    pairs = zip(channels, parts, strict=False)
    return [f"{count} channels cannot be divided into {part} {what}" for count, part in pairs if count % part]


def _refuse(name: str, faults: Sequence[str]) -> None:
    if faults:
        raise ValueError(f"{name}: " + "; ".join(faults))
