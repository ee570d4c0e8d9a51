"""The whole pipeline against diffusers' from the same noise, what compiles, and what is refused."""

import diffusers
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import torch
from flax import nnx

import theory.solve
from sd_port.models.config import UNetConfig
from sd_port.models.layers import LoRA
from sd_port.models.unet import UNet
from sd_port.pipeline import PART, StableDiffusion
from sd_port.weights.fill import abstract
from tests.sd_port.pipelines import SCHEDULER, folder, ours, theirs
from tests.sd_port.torch_models import UNETS, distance, to_nchw, to_nhwc
from tests.tolerances import PARITY_32, PIPELINE
from theory.compilations import traces
from theory.solve import replay, sample, unit_noise
from theory.solvers import DDIM, DPMSolverPP2M

pytestmark = pytest.mark.hasty

STEPS, GUIDANCE, SHAPE = 20, 7.5, (2, 16, 16, 4)
PROMPTS, NEGATIVE = ["a boat", "the sun over a hill"], "fog"


def start() -> np.ndarray:
    return np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


def eps_fn(pipe: StableDiffusion, guidance=GUIDANCE, **options):
    return pipe.noise_fn(pipe.embed(PROMPTS), pipe.embed([NEGATIVE]), guidance, batch=2, **options)


def request() -> dict:
    """What diffusers' pipeline is asked for."""
    return {
        "prompt": PROMPTS,
        "negative_prompt": [NEGATIVE] * 2,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "latents": to_nchw(start()),
        "height": 64,
        "width": 64,
    }


@jax.jit
def at(eps, x, t):
    """eps(x, t), compiled once for all weights, texts and scales."""
    return eps(x, t)


def diffusers_latents(scheduler, noise, monkeypatch, **options) -> np.ndarray:
    """The final latents of diffusers' pipeline, whose schedulers draw our noise."""
    pipe = theirs()
    drawn = iter([to_nchw(w) for w in noise])
    for module in (diffusers.schedulers.scheduling_ddim, diffusers.schedulers.scheduling_dpmsolver_multistep):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(drawn))
    monkeypatch.setattr(pipe, "scheduler", scheduler)
    result = pipe(
        **request(),
        output_type="latent",
        **options,
    )
    return to_nhwc(result.images)


DPM = {"algorithm_type": "dpmsolver++", "timestep_spacing": "trailing"}
CASES = {
    "DDIM(0)": (lambda s: DDIM(s, 0.0), None, {"eta": 0.0}),
    "DDIM(1)": (lambda s: DDIM(s, 1.0), None, {"eta": 1.0}),
    "DPM++ ODE": (lambda s: DPMSolverPP2M(s, 0.0), DPM, {}),
    "DPM++ SDE": (lambda s: DPMSolverPP2M(s, 1.0), DPM | {"algorithm_type": "sde-dpmsolver++"}, {}),
}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("case", CASES)
def test_latents_are_those_of_diffusers(case, monkeypatch):
    """Twenty steps with guidance 7.5, two prompts; a slightly different guidance is told apart."""
    make, dpm, options = CASES[case]
    pipe = ours()
    solver, ts = make(pipe.schedule), pipe.scheduler.grid(STEPS).astype(jnp.float32)
    x, key = jnp.asarray(start()), jr.key(1)
    scheduler = theirs().scheduler if dpm is None else diffusers.DPMSolverMultistepScheduler(**SCHEDULER, **dpm)
    expected = diffusers_latents(scheduler, unit_noise(key, x, ts), monkeypatch, **options)
    assert distance(sample(solver, eps_fn(pipe), x, ts, key), expected) < PIPELINE
    assert distance(sample(solver, eps_fn(pipe, GUIDANCE + 0.1), x, ts, key), expected) > PIPELINE


def test_generated_images_are_those_of_diffusers():
    """generate, from text to pixels: embed, sample, decode."""
    pipe = ours()
    expected = theirs()(
        **request(),
        output_type="np",
    ).images
    got = pipe.generate(
        PROMPTS,
        NEGATIVE,
        key=jr.key(0),
        steps=STEPS,
        guidance_scale=GUIDANCE,
        height=64,
        width=64,
        solver=DDIM(pipe.schedule, 0.0),
        latent=jnp.asarray(start()),
    )
    assert got.shape == (2, 64, 64, 3) and got.dtype == jnp.float32
    assert distance(got, expected) < PIPELINE


def test_encode_and_decode_are_those_of_diffusers():
    """Latents are scaled; a key draws from the posterior, whose mean the plain encoding is."""
    pipe, vae = ours(), theirs().vae
    image = np.random.default_rng(1).uniform(size=(2, 32, 40, 3)).astype(np.float32)
    with torch.no_grad():
        posterior = vae.encode(to_nchw(2 * image - 1)).latent_dist
        decoded = to_nhwc(vae.decode(posterior.mean).sample)
    scale = vae.config.scaling_factor
    latent = pipe.encode(jnp.asarray(image))
    assert distance(latent, scale * to_nhwc(posterior.mean)) < PARITY_32
    assert distance(pipe.decode(latent), np.clip((decoded + 1) / 2, 0, 1)) < PARITY_32
    noise = jr.normal(jr.key(3), latent.shape, jnp.float32)
    drawn = pipe.encode(jnp.asarray(image), jr.key(3))
    assert distance(drawn - latent, scale * to_nhwc(posterior.std) * noise) < PIPELINE


def test_same_seed_same_picture_and_more_images():
    pipe = ours()
    options = {"steps": 3, "height": 32, "width": 40}
    first = pipe.generate("a boat", key=jr.key(0), batch=2, **options)
    assert first.shape == (2, 32, 40, 3)
    np.testing.assert_array_equal(first, pipe.generate("a boat", key=jr.key(0), batch=2, **options))
    assert distance(pipe.generate("a boat", key=jr.key(1), batch=2, **options), first) > 0.01
    assert distance(pipe.generate("a hill", key=jr.key(0), batch=2, **options), first) > 1e-4


def test_only_sizes_compile():
    """Prompt, scale, seed and number of steps do not; height does."""
    pipe = ours()
    options = {"height": 32, "width": 40}
    pipe.generate("a boat", key=jr.key(0), steps=3, **options)
    with traces() as count:
        pipe.generate("a hill", "fog", key=jr.key(5), steps=9, guidance_scale=2.0, **options)
        pipe.generate("x", key=jr.key(6), steps=PART, guidance_scale=jnp.float32(3), lora_scale=0.3, **options)
    assert count["_advance"] == 0
    with traces() as count:
        pipe.generate("a boat", key=jr.key(0), steps=3, height=40, width=40)
    assert count["_advance"] == 1


def test_progress_counts_to_the_end():
    seen = []
    ours().generate(
        "a boat",
        key=jr.key(0),
        steps=9,
        height=32,
        width=40,
        progress=lambda done, steps, x: seen.append((done, steps)),
    )
    assert seen == [(4, 9), (8, 9), (9, 9)]


def test_no_guidance_asks_once():
    """guidance_scale None is scale 1, at half the work."""
    pipe = ours()
    x, t = jnp.asarray(start()), jnp.float32(0.5)
    alone = pipe.noise_fn(pipe.embed(PROMPTS), batch=2)
    np.testing.assert_allclose(at(alone, x, t), at(eps_fn(pipe, 1.0), x, t), atol=1e-5)
    assert distance(at(alone, x, t), at(eps_fn(pipe, 2.0), x, t)) > 1e-4


def test_lora_scale_is_traced():
    """Adapters at scale 0 are none; the scale is linear in what it adds to a kernel, and compiles nothing."""
    pipe = StableDiffusion.load(folder())
    x, t = jnp.asarray(start()), jnp.float32(0.5)
    plain = at(eps_fn(pipe), x, t)
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v
    layer.lora = LoRA.fresh(layer.kernel.shape, 2, alpha=1.0, rngs=nnx.Rngs(0))
    layer.lora.up[...] = jr.normal(jr.key(0), layer.lora.up.shape, jnp.float32)
    assert distance(at(eps_fn(pipe, lora_scale=0.0), x, t), plain) < PARITY_32
    with traces() as count:
        half = at(eps_fn(pipe, lora_scale=0.5), x, t)
    assert count["at"] == 0
    layer.kernel[...] = layer.kernel[...] + 0.5 * 0.5 * layer.lora.down[...] @ layer.lora.up[...]
    pipe.unload_lora()
    assert distance(half, at(eps_fn(pipe), x, t)) < PARITY_32
    assert distance(half, plain) > 1e-4


def test_v_prediction_becomes_noise():
    """A network that predicts v = alpha eps - sigma x0: at every t the two agree on x0."""
    pipe = ours()
    schedule = pipe.scheduler
    x, t = jnp.asarray(start()), jnp.float32(0.5)
    as_v = StableDiffusion(**{**vars(pipe), "scheduler": schedule._replace(prediction_type="v_prediction")})
    v, eps = at(eps_fn(pipe), x, t), at(eps_fn(as_v), x, t)
    alpha, sigma = pipe.schedule.alpha(t), pipe.schedule.sigma(t)
    np.testing.assert_allclose((x - sigma * eps) / alpha, alpha * x - sigma * v, rtol=1e-4, atol=1e-4)


def test_saved_and_loaded_again(tmp_path):
    """What we write, diffusers and we open, and it makes the same pictures."""
    pipe = ours()
    pipe.save(tmp_path / "copy")
    again = StableDiffusion.load(tmp_path / "copy")
    options = {"key": jr.key(0), "steps": 3, "height": 32, "width": 40}
    np.testing.assert_array_equal(again.generate("a boat", **options), pipe.generate("a boat", **options))
    opened = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "copy", safety_checker=None)
    assert opened.scheduler.config.timestep_spacing == "trailing"
    assert again.digest() != "" and again.digest() == again.digest()


def test_bad_requests_are_named():
    pipe = ours()
    with pytest.raises(ValueError, match="height = 30"):
        pipe.generate("x", key=jr.key(0), height=30, width=32)
    with pytest.raises(ValueError, match="latent has the shape"):
        pipe.generate("x", key=jr.key(0), height=32, width=32, latent=jnp.zeros((1, 4, 4, 4)))
    unet = abstract(UNet, UNetConfig.from_json(UNETS["inpainting"]))
    with pytest.raises(ValueError, match="9 channels"):
        StableDiffusion(**{**vars(pipe), "unet": unet}).generate("x", key=jr.key(0))
    with pytest.raises(ValueError, match="no prompts"):
        pipe.generate([], key=jr.key(0))
    with pytest.raises(ValueError, match="width = 31"):
        pipe.encode(jnp.zeros((1, 32, 31, 3), jnp.float32))


def test_parts_equal_the_whole():
    """sample_parts ends where sample does, whatever the part, and replay passes through the same latents."""
    pipe = ours()
    ts, key, x = pipe.scheduler.grid(6).astype(jnp.float32), jr.key(2), jnp.asarray(start())
    # More guidance makes the latents of random weights large, and rounding in float32 with them.
    solver, eps = DPMSolverPP2M(pipe.schedule, 1.0), eps_fn(pipe, guidance=1.5)
    whole = sample(solver, eps, x, ts, key)
    path = replay(solver, eps, x, ts, unit_noise(key, x, ts))
    parts = list(theory.solve.sample_parts(solver, eps, x, ts, key, size=4))
    assert len(parts) == 2
    np.testing.assert_allclose(parts[-1], whole, atol=1e-4)
    np.testing.assert_allclose(parts[0], path[4], atol=1e-4)
    assert jnp.abs(parts[0] - path[3]).max() > 1  # control: the step before


def test_the_images_of_one_prompt_follow_one_another(monkeypatch):
    """Of two prompts, two images each: the texts that are asked for, in the order of the images."""

    class AskedError(Exception):
        pass

    def embed(self, prompts, lora_scale):
        raise AskedError(*prompts)

    monkeypatch.setattr(StableDiffusion, "embed", embed)
    with pytest.raises(AskedError) as asked:
        ours().generate(["a boat", "a sun"], key=jr.key(0), batch=2)
    assert asked.value.args == ("a boat", "a boat", "a sun", "a sun")
