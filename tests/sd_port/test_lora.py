"""Training adapters on one picture: against torch step by step, and what it is good for."""

from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from flax import nnx

from sd_port.lora import LoRAConfig, train_lora, with_adapters
from sd_port.models.layers import LoRA
from sd_port.nano.scenes import draw, render
from sd_port.pipeline import StableDiffusion
from sd_port.weights.lora_files import read_lora, write_lora
from tests import tolerances
from tests.cases import assert_close
from tests.sd_port import tiny
from theory.compilations import traces

STEPS = 4
CONFIG = LoRAConfig(rank=3, steps=STEPS, learning_rate=1e-2, batch=2)
PROMPT = "a red boat under a low sun"


@pytest.fixture
def pipe(monkeypatch) -> StableDiffusion:
    tiny.shapes_once(monkeypatch)
    return StableDiffusion.load(tiny.folder())


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.asarray(jax.jit(lambda key: render(draw(key, 2)))(jr.key(0)))


@partial(jax.jit, static_argnums=1)
def draws(key, shape: tuple[int, ...]):
    """What one step of the training draws: noise on the latents, timesteps, and noise to predict."""
    latent_key, time_key, noise_key = jr.split(key, 3)
    normals = (jr.normal(k, shape, "float32") for k in (latent_key, noise_key))
    return *normals, jr.randint(time_key, shape[:1], 0, 1000)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.hasty
def test_against_torch(pipe, pictures, tmp_path, monkeypatch):
    """Four steps of torch's AdamW on diffusers' UNet, from the same adapters, latents, timesteps and noise.

    In two parts, as more steps are taken. The losses agree, by which half a timestep shows, and the changes.
    """
    import torch
    from diffusers import StableDiffusionPipeline

    from tests.sd_port.torch_models import distance, to_nchw

    key = jr.key(1)
    with_adapters(pipe.unet, CONFIG.rank, key)
    write_lora(tmp_path / "before.safetensors", unet=pipe.unet)
    theirs = StableDiffusionPipeline.from_pretrained(tiny.folder())
    theirs.load_lora_weights(tmp_path / "before.safetensors")
    trained = {name: p for name, p in theirs.unet.named_parameters() if "lora" in name}
    optimizer = torch.optim.AdamW(trained.values(), lr=CONFIG.learning_rate, weight_decay=CONFIG.weight_decay)
    context = torch.from_numpy(np.array(pipe.embed([PROMPT]))).repeat(2, 1, 1)
    mean, std = map(np.asarray, pipe.posterior(jnp.asarray(pictures[:1])))
    losses, told = [], []
    for i in range(STEPS):
        latent, noise, timestep = draws(jr.fold_in(key, i), (2, *mean.shape[1:]))
        x0, eps = to_nchw(mean + std * np.asarray(latent)), to_nchw(noise)
        timestep = torch.from_numpy(np.array(timestep))
        x = theirs.scheduler.add_noise(x0, eps, timestep)
        loss = torch.mean((theirs.unet(x, timestep, encoder_hidden_states=context).sample - eps) ** 2)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    pipe.unload_lora()
    monkeypatch.setattr("sd_port.lora.PART", STEPS // 2)
    train_lora(pipe, pictures[0], PROMPT, CONFIG, key=key, progress=lambda *done: told.append(done[-1]))
    assert_close(told, np.reshape(losses, (2, -1)).mean(axis=1), tolerances.PARITY_32)
    write_lora(tmp_path / "after.safetensors", unet=pipe.unet)
    theirs_after = {name: p.detach().numpy() for name, p in trained.items()}
    before, after = read_lora(tmp_path / "before.safetensors"), read_lora(tmp_path / "after.safetensors")
    assert 2 * len(after.adapters) == len(theirs_after)
    for key, adapter in after.adapters.items():
        old = before.adapters[key]
        for matrix, start, part in ((adapter.down, old.down, "lora_A"), (adapter.up, old.up, "lora_B")):
            (expected,) = (p for name, p in theirs_after.items() if name.startswith(f"{key[1]}.{part}."))
            # Adam divides by the gradient's size, so that the change of an entry whose gradient is near zero is open.
            assert distance(matrix - start, expected - start) < 0.02


def test_it_learns_the_picture(pictures):
    """The bundled model denoises this picture better than before, on noise that was not trained on, and not another."""
    nano = StableDiffusion.load("nano")
    weights = nnx.to_pure_dict(nnx.state(nano.unet))
    latents, context = nano.encode(jnp.asarray(pictures)), nano.embed([PROMPT])
    noise = jr.normal(jr.key(9), (8, *latents.shape[1:]), "float32")
    told, config = [], LoRAConfig(rank=4, steps=20, learning_rate=1e-2, batch=2)

    @jax.jit
    def losses(eps_fn, x0, t):
        x = nano.schedule.alpha(t).astype(x0.dtype) * x0 + nano.schedule.sigma(t).astype(x0.dtype) * noise
        return jnp.mean((eps_fn(x, t.astype(x0.dtype)) - noise) ** 2)

    def loss(i: int) -> float:
        eps_fn = nano.noise_fn(context, batch=8)
        return np.mean([losses(eps_fn, latents[i : i + 1], t) for t in np.linspace(0.1, 0.9, 5)])

    with_adapters(nano.unet, config.rank, jr.key(1))  # fresh ones change nothing
    before = [loss(i) for i in range(2)]
    train_lora(nano, pictures[0], PROMPT, config, key=jr.key(0), progress=lambda *done: told.append(done))
    assert loss(0) < 0.9 * before[0] and loss(1) > 0.97 * before[1]
    assert [done[:2] for done in told] == [(10, 20), (20, 20)]
    nano.unload_lora()
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(nano.unet)), weights)


@pytest.mark.hasty
def test_nothing_compiles_for_another_picture(pipe, pictures):
    train_lora(pipe, pictures[0], PROMPT, CONFIG, key=jr.key(0))
    with traces() as count:
        train_lora(pipe, pictures[1], "a boat", CONFIG, key=jr.key(1))
    assert not count


@pytest.mark.hasty
@pytest.mark.parametrize("error", [KeyboardInterrupt, FloatingPointError])
def test_interrupted_it_leaves_no_adapters(pipe, pictures, error):
    def stop(*_):
        raise error

    with pytest.raises(error):
        train_lora(pipe, pictures[0], PROMPT, CONFIG, key=jr.key(0), progress=stop)
    assert not any(isinstance(module, LoRA) for _, module in nnx.iter_modules(pipe.unet))


def test_a_picture_that_is_too_large_is_not_encoded(pipe):
    with pytest.raises(ValueError, match="2000 x 2000 pixels, which is too large to edit at once"):
        train_lora(pipe, np.zeros((2000, 2000, 3), np.float32), PROMPT, CONFIG, key=jr.key(0))


@pytest.mark.hasty
def test_a_loss_that_is_no_number_is_an_error(pipe, pictures):
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        train_lora(pipe, pictures[0], PROMPT, LoRAConfig(2, 20, 1e30), key=jr.key(0))


@pytest.mark.parametrize("setting", ["rank", "steps", "batch", "learning_rate"])
def test_bad_settings_are_named(setting):
    with pytest.raises(ValueError, match=f"{setting} = 0"):
        LoRAConfig(**{setting: 0.0 if setting == "learning_rate" else 0})
