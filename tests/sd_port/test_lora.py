"""Training adapters on one picture: against torch step by step, and what it is good for."""

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from flax import nnx

from sd_port import lora
from sd_port.lora import LoRAConfig, train_lora, with_adapters
from sd_port.models.layers import LoRA
from sd_port.nano.scenes import draw, render
from sd_port.pipeline import StableDiffusion
from sd_port.weights.hub import BUNDLED
from sd_port.weights.lora_files import read_lora, write_lora
from tests.sd_port.torch_models import distance, to_nchw

STEPS = 4
CONFIG = LoRAConfig(rank=3, steps=STEPS, learning_rate=1e-2, batch=2)
PROMPT = "a red boat under a low sun"


@pytest.fixture
def nano() -> StableDiffusion:
    return StableDiffusion.load("nano")


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.asarray(render(draw(jr.key(0), 2)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_against_torch(nano, pictures, tmp_path):
    """Four steps of torch's AdamW on diffusers' UNet, from the same adapters, latents, timesteps and noise."""
    key = jr.key(1)
    with_adapters(nano.unet, CONFIG.rank, key)
    write_lora(tmp_path / "before.safetensors", unet=nano.unet)
    theirs = StableDiffusionPipeline.from_pretrained(BUNDLED["nano"])
    theirs.load_lora_weights(tmp_path / "before.safetensors")
    trained = {name: p for name, p in theirs.unet.named_parameters() if "lora" in name}
    optimizer = torch.optim.AdamW(trained.values(), lr=CONFIG.learning_rate, weight_decay=CONFIG.weight_decay)
    context = torch.from_numpy(np.array(nano.embed([PROMPT]))).repeat(2, 1, 1)
    mean, std = nano.posterior(jnp.asarray(pictures[:1]))
    for i in range(STEPS):
        latent_key, time_key, noise_key = jr.split(jr.fold_in(key, i), 3)
        shape = (2, *mean.shape[1:])
        x0 = to_nchw(mean + std * jr.normal(latent_key, shape, "float32"))
        eps = to_nchw(jr.normal(noise_key, shape, "float32"))
        timestep = torch.from_numpy(np.array(jr.randint(time_key, (2,), 0, 1000)))
        x = theirs.scheduler.add_noise(x0, eps, timestep)
        loss = torch.mean((theirs.unet(x, timestep, encoder_hidden_states=context).sample - eps) ** 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    nano.unload_lora()
    train_lora(nano, pictures[0], PROMPT, CONFIG, key=key)
    write_lora(tmp_path / "after.safetensors", unet=nano.unet)
    theirs_after = {name: p.detach().numpy() for name, p in trained.items()}
    before, after = read_lora(tmp_path / "before.safetensors"), read_lora(tmp_path / "after.safetensors")
    assert 2 * len(after.adapters) == len(theirs_after)
    for key, adapter in after.adapters.items():
        old = before.adapters[key]
        for matrix, start, part in ((adapter.down, old.down, "lora_A"), (adapter.up, old.up, "lora_B")):
            (expected,) = (p for name, p in theirs_after.items() if name.startswith(f"{key[1]}.{part}."))
            # Adam divides by the gradient's size, so that the change of an entry whose gradient is near zero is open.
            assert distance(matrix - start, expected - start) < 0.02


def test_it_learns_the_picture(nano, pictures):
    """This picture is denoised better than before, on noise that was not trained on, and another is not."""
    told = []
    context = nano.embed([PROMPT])
    config = LoRAConfig(rank=4, steps=40, learning_rate=5e-3, batch=4)

    def loss(i: int) -> float:
        mean, std = nano.posterior(jnp.asarray(pictures[i : i + 1]))
        graph, adapters, rest = nnx.split(nano.unet, lora.Adapter, ...)
        many = LoRAConfig(batch=64)
        return float(lora._loss(graph, nano.schedule, "epsilon", many, adapters, rest, mean, std, context, jr.key(9)))

    before = [loss(i) for i in range(2)]
    train_lora(nano, pictures[0], PROMPT, config, key=jr.key(0), progress=lambda *done: told.append(done))
    assert loss(0) < 0.9 * before[0] and loss(1) > 0.97 * before[1]
    assert [done[:2] for done in told] == [(10, 40), (20, 40), (30, 40), (40, 40)]
    nano.unload_lora()
    assert loss(0) == pytest.approx(before[0], rel=1e-5)


def test_nothing_compiles_for_another_picture(nano, pictures):
    train_lora(nano, pictures[0], PROMPT, CONFIG, key=jr.key(0))
    compiled = lora._train._cache_size()
    train_lora(nano, pictures[1], "a boat", CONFIG, key=jr.key(1))
    assert lora._train._cache_size() == compiled


@pytest.mark.parametrize("error", [KeyboardInterrupt, FloatingPointError])
def test_interrupted_it_leaves_no_adapters(nano, pictures, error):
    def stop(*_):
        raise error

    with pytest.raises(error):
        train_lora(nano, pictures[0], PROMPT, CONFIG, key=jr.key(0), progress=stop)
    assert not any(isinstance(module, LoRA) for _, module in nnx.iter_modules(nano.unet))


def test_a_picture_that_is_too_large_is_not_encoded(nano):
    with pytest.raises(ValueError, match="2000 x 2000 pixels, which is too large to edit at once"):
        train_lora(nano, np.zeros((2000, 2000, 3), np.float32), PROMPT, CONFIG, key=jr.key(0))


def test_a_loss_that_is_no_number_is_an_error(nano, pictures):
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        train_lora(nano, pictures[0], PROMPT, LoRAConfig(steps=20, learning_rate=1e30), key=jr.key(0))


@pytest.mark.parametrize("setting", ["rank", "steps", "batch", "learning_rate"])
def test_bad_settings_are_named(setting):
    with pytest.raises(ValueError, match=f"{setting} = 0"):
        LoRAConfig(**{setting: 0.0 if setting == "learning_rate" else 0})
