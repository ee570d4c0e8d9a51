"""The published configs of SD 1.5 and 2.1, for single files, which carry none.

Read from unet/, vae/, text_encoder/ and scheduler/ of stable-diffusion-v1-5/{stable-diffusion-v1-5,
stable-diffusion-inpainting} and sd2-community/{stable-diffusion-2-1-base, stable-diffusion-2-1}.
"""

from theory.reading import Json

COMPONENTS = ("unet", "vae", "text_encoder")

_SCHEDULER: Json = {
    "_class_name": "PNDMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "trained_betas": None,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
}

# What all of diffusers' schedulers give to a key that scheduler_config.json does not have (0.42). Of the others every
# class has its own: `sd_port.scheduler`.
SCHEDULER_DEFAULTS: Json = {
    "_class_name": "PNDMScheduler",
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}

_UNET: Json = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
_UNET_2: Json = {
    **_UNET,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}

_VAE: Json = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}

_TEXT: Json = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "vocab_size": 49408,
}
_TEXT_2: Json = {
    **_TEXT,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,  # of 24: the last layer is not used
}

_DDIM: Json = {**{k: v for k, v in _SCHEDULER.items() if k != "skip_prk_steps"}, "_class_name": "DDIMScheduler"}

BUILT_IN: dict[str, dict[str, Json]] = {
    "SD 1.5": {"unet": _UNET, "vae": _VAE, "text_encoder": _TEXT, "scheduler": _SCHEDULER},
    "SD 1.5 inpainting": {
        "unet": {**_UNET, "in_channels": 9},
        "vae": _VAE,
        "text_encoder": _TEXT,
        "scheduler": _DDIM,
    },
    "SD 2.1 base": {"unet": _UNET_2, "vae": _VAE, "text_encoder": _TEXT_2, "scheduler": _SCHEDULER},
    "SD 2.1": {
        "unet": {**_UNET_2, "sample_size": 96, "upcast_attention": True},
        "vae": {**_VAE, "sample_size": 768},
        "text_encoder": _TEXT_2,
        "scheduler": {**_DDIM, "prediction_type": "v_prediction"},
    },
    "SD 2 inpainting": {
        "unet": {**_UNET_2, "in_channels": 9},
        "vae": _VAE,
        "text_encoder": _TEXT_2,
        "scheduler": _SCHEDULER,
    },
}
