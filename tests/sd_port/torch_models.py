"""Small models of diffusers and transformers with random weights, and the same weights in ours."""

import jax.numpy as jnp
import numpy as np
import torch
from diffusers import AutoencoderKL as TorchVAE
from diffusers import UNet2DConditionModel as TorchUNet
from flax import nnx
from transformers import CLIPTextConfig as TorchTextConfig
from transformers import CLIPTextModel as TorchText

from sd_port.models.clip_text import CLIPTextModel
from sd_port.models.config import CLIPTextConfig, UNetConfig, VAEConfig
from sd_port.models.unet import UNet
from sd_port.models.vae import AutoencoderKL
from sd_port.weights.fill import abstract

SMALL_UNET = {
    "sample_size": 16,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
}
UNETS = {
    "sd1": SMALL_UNET
    | {
        "block_out_channels": [32, 64, 64],
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 2,
    },
    "inpainting": SMALL_UNET | {"in_channels": 9},
    "sd2": SMALL_UNET | {"attention_head_dim": [2, 4], "use_linear_projection": True, "upcast_attention": True},
    "lists": SMALL_UNET | {"cross_attention_dim": [24, 24], "layers_per_block": [1, 1], "sample_size": [16, 8]},
    "other sinusoids": SMALL_UNET | {"flip_sin_to_cos": False, "freq_shift": 1},
}
SMALL_VAE = {
    "block_out_channels": [16, 32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "scaling_factor": 0.18215,
}
SMALL_TEXT = {
    "vocab_size": 600,
    "hidden_size": 24,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
TEXTS = {"sd1": SMALL_TEXT, "sd2": SMALL_TEXT | {"hidden_act": "gelu", "num_hidden_layers": 2}}


def shaken(model: torch.nn.Module, seed: int = 0, size: float = 0.1) -> torch.nn.Module:
    """Every parameter moved by noise: fresh biases are 0 and fresh norms 1, which would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def torch_unet(config: dict, seed: int = 0, size: float = 0.1) -> TorchUNet:
    torch.manual_seed(seed)
    return shaken(TorchUNet(**config), seed, size)


def torch_vae(config: dict, seed: int = 0, size: float = 0.1) -> TorchVAE:
    torch.manual_seed(seed)
    return shaken(TorchVAE(**config), seed, size)


def torch_text(config: dict, seed: int = 0, size: float = 0.1) -> TorchText:
    torch.manual_seed(seed)
    return shaken(TorchText(TorchTextConfig(**config)), seed, size)


def copied(model: nnx.Module, torch_model: torch.nn.Module) -> nnx.Module:
    """`model`, of shapes alone, with the weights of torch's, by the plainest rule: same path, transposed kernels."""
    theirs = {name: value.detach().numpy() for name, value in torch_model.state_dict().items()}
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    for path, variable in state:
        words = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
        name = ".".join(str(part) for part in (*path[:-1], words[path[-1]]))
        value = theirs.pop(name)
        if path[-1] == "kernel":
            value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        assert value.shape == variable.shape, (name, value.shape, variable.shape)
        # Cast by NumPy and told the dtype, JAX compiles nothing.
        variable.set_value(jnp.asarray(value.astype(variable.dtype), variable.dtype))
    assert not theirs, sorted(theirs)
    nnx.update(model, nnx.from_flat_state(state))
    return model


def unet_like(torch_model: TorchUNet, config: dict, **policy) -> UNet:
    return copied(abstract(UNet, UNetConfig.from_json(config), **policy), torch_model)


def vae_like(torch_model: TorchVAE, config: dict, **policy) -> AutoencoderKL:
    return copied(abstract(AutoencoderKL, VAEConfig.from_json(config), **policy), torch_model)


def text_like(torch_model: TorchText, config: dict, **policy) -> CLIPTextModel:
    return copied(abstract(CLIPTextModel, CLIPTextConfig.from_json(config), **policy), torch_model)


def to_nchw(x) -> torch.Tensor:
    return torch.from_numpy(np.array(x)).movedim(-1, 1).contiguous()


def to_nhwc(x: torch.Tensor) -> np.ndarray:
    return x.detach().movedim(1, -1).contiguous().float().numpy()


def distance(ours, theirs) -> float:
    """Relative L2."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
