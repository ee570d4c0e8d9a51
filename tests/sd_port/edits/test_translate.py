"""Image to image: against loops written out in torch, and the laws that the paper states."""

import warnings
from dataclasses import replace
from importlib import import_module

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from sd_port.checks import latent_mask
from sd_port.edits.canvas import encode
from sd_port.edits.translate import LATENTS, TranslateConfig, difference_mask, reconstruct, translate
from sd_port.nano.scenes import objects
from sd_port.pipeline import StableDiffusion
from tests.sd_port import tiny
from tests.sd_port.edits.torch_translate import predictor, translated
from tests.sd_port.seascapes import N, noise, painted, seascapes
from tests.sd_port.torch_models import distance, to_nchw
from tests.tolerances import PIPELINE, RECONSTRUCTION_32
from theory.solve import unit_noise

pytestmark = pytest.mark.hasty

QUICK = TranslateConfig(t0=0.601, steps=6, guidance=3.0)  # on timesteps 600, 500, ..., 0
BEFORE, AFTER = "a red boat with white sails", "a blue boat with yellow sails"
KEY = jr.key(1)
MASKS = np.ones((2, 64, 64), np.float32)  # all of the first picture may change, and the lower half of the second
MASKS[1, :32] = 0


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion:
    """Of random weights: the laws hold whatever the network."""
    return StableDiffusion.load(tiny.folder())


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return noise(2, 64, 64)


@pytest.fixture(scope="module")
def found(pipe, pictures) -> dict[str, np.ndarray]:
    """The latents of both pictures by every kind of edit, six steps up without guidance and back with it."""
    return {
        kind: np.stack(
            [
                result.latents
                for result in translate(
                    pipe, pictures, [BEFORE] * 2, [AFTER] * 2, replace(QUICK, kind=kind), key=KEY, masks=MASKS
                )
            ]
        )
        for kind in LATENTS
    }


@pytest.fixture(scope="module")
def theirs() -> StableDiffusionPipeline:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return StableDiffusionPipeline.from_pretrained(tiny.folder())


@pytest.mark.parametrize("kind", LATENTS)
def test_against_torch(pipe, pictures, found, theirs, kind):
    """Of the picture that may change everywhere: same weights, same noise, same latent, and no other kind's."""
    path_key, back_key = jr.split(KEY)
    x0 = np.asarray(encode(pipe, pictures))
    up = jr.normal(path_key, (6, *x0.shape), "float32")
    down = unit_noise(back_key, jnp.asarray(x0), QUICK.grid(pipe.schedule))
    null, before, after = (torch.from_numpy(np.array(pipe.embed([text]))) for text in ("", BEFORE, AFTER))
    expected = translated(
        kind,
        theirs.scheduler.alphas_cumprod,
        predictor(theirs.unet, null, before, 1.0),
        predictor(theirs.unet, null, after, 3.0),
        to_nchw(x0[:1]),
        [100 * i for i in range(7)],
        [to_nchw(w[:1]) for w in np.asarray(up)],
        [to_nchw(w[:1]) for w in np.asarray(down)],
    )
    expected = expected.movedim(1, -1).numpy()[0]
    assert distance(found[kind][0], expected) < PIPELINE
    for other in LATENTS:
        assert other == kind or distance(found[other][0], expected) > 10 * PIPELINE


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_only_cycle_sde_gives_the_picture_back(pipe, pictures, guidance):
    """To rounding, with six steps; DDIM inversion loses several percent."""
    x0 = np.asarray(encode(pipe, pictures))

    def lost(kind):
        results = reconstruct(
            pipe, pictures, ["a boat"] * 2, replace(QUICK, kind=kind, guidance=guidance), key=jr.key(0)
        )
        return distance(np.stack([result.latents for result in results]), x0)

    assert lost("cycle") < RECONSTRUCTION_32 and lost("ddib") > 0.02


@pytest.mark.parametrize(("count", "times"), [(1, 4), (2, 2)])
def test_all_pictures_count_in_what_is_asked_for_at_once(monkeypatch, pipe, pictures, count, times):
    asked = []

    def still(solver, source_eps, target_eps, x0, *rest, latent, batch_size):
        asked.append(batch_size)
        return x0

    monkeypatch.setattr(import_module("sd_port.edits.translate"), "_edit", still)
    translate(pipe, pictures[:count], [BEFORE] * count, [AFTER] * count, QUICK, key=jr.key(0), batch_size=4)
    assert asked == [times]


@pytest.mark.parametrize("kind", LATENTS)
def test_outside_the_mask_nothing_changes(pipe, pictures, found, kind):
    x, x0 = found[kind][1], np.asarray(encode(pipe, pictures))[1]
    assert distance(x[:8], x0[:8]) < RECONSTRUCTION_32 and distance(x[8:], x0[8:]) > 0.05
    np.testing.assert_array_equal(latent_mask(MASKS[1], 4)[..., 0], np.repeat([[0.0], [1.0]], 8, axis=0).repeat(16, 1))


def test_the_mask_finds_what_is_to_change():
    """Two prompts that differ in the boat's colours: the boat's pixels differ more than the rest, to the real model."""
    nano = StableDiffusion.load("nano")
    scene = seascapes()
    pictures = painted(scene)
    found = difference_mask(nano, pictures, [BEFORE] * N, [AFTER] * N, key=jr.key(0))
    boat = np.asarray(jax.jit(objects)(scene)["boat"])
    heat = found.heat.repeat(4, axis=1).repeat(4, axis=2)
    assert heat[boat].mean() > 2 * heat[~boat].mean()
    assert set(np.unique(found.mask)) == {0.0, 1.0} and found.mask.shape == pictures.shape[:3]
    with pytest.raises(ValueError, match="ask for the same"):
        difference_mask(nano, pictures, [BEFORE] * N, [BEFORE] * N, key=jr.key(0))


def test_differences_against_torch(pipe, pictures, theirs):
    """Where the two prompts differ, over four draws of noise, all other ones: DiffEdit's Sec. 3.2 in torch."""
    draws = 4
    null, before, after = (torch.from_numpy(np.array(pipe.embed([text]))) for text in ("", BEFORE, AFTER))
    eps = [predictor(theirs.unet, null, text, 1.0) for text in (before, after)]
    x0, signal = np.asarray(encode(pipe, pictures)), theirs.scheduler.alphas_cumprod[499]  # t = 1/2
    heat = 0
    with torch.no_grad():
        for key in jr.split(KEY, draws):
            noise = to_nchw(jr.normal(key, x0.shape, "float32"))[:1]
            x = signal**0.5 * to_nchw(x0[:1]) + (1 - signal) ** 0.5 * noise
            heat = heat + (eps[0](x, 499) - eps[1](x, 499)).abs().mean(1).numpy()[0] / draws
    expected = np.minimum(heat / (3 * heat.mean()), 1)
    given = pipe, pictures, [BEFORE] * 2, [AFTER] * 2
    found = difference_mask(*given, key=KEY, draws=draws)
    assert distance(found.heat[0], expected) < PIPELINE
    np.testing.assert_array_equal(found.mask[0], (found.heat[0] > 0.5).repeat(4, 0).repeat(4, 1))
    other = difference_mask(*given, key=jr.key(2), draws=draws)
    assert distance(other.heat[0], expected) > 10 * PIPELINE


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"t0": 0.0}, "t0 = 0.0"),
        ({"t0": 1.1}, "t0 = 1.1"),
        ({"steps": 0}, "steps = 0"),
        ({"kind": "ddib", "order": 2}, "DDIB takes order 1"),
    ],
)
def test_bad_settings_are_named(settings, said):
    with pytest.raises(ValueError, match=said):
        TranslateConfig(**settings)


def test_order_2_gives_the_picture_back_too(pipe, pictures, found):
    """Cycle-SDE on the second-order solver records its noise with that solver's memory; it is another edit."""
    x0, config = np.asarray(encode(pipe, pictures)), replace(QUICK, order=2)
    few = replace(config, steps=4, guidance=1.0)
    back = reconstruct(pipe, pictures, ["a boat"] * 2, few, key=jr.key(0))
    assert distance(np.stack([result.latents for result in back]), x0) < RECONSTRUCTION_32
    (second, _) = translate(pipe, pictures, [BEFORE] * 2, [AFTER] * 2, config, key=KEY, masks=MASKS)
    assert distance(found["cycle"][0], second.latents) > 0.01 and distance(second.latents, x0[0]) > 0.05


def test_prompts_that_do_not_fit_are_counted(pipe, pictures):
    with pytest.raises(ValueError, match="2 pictures need as many prompts, got 1 and 2"):
        translate(pipe, pictures, [BEFORE], [AFTER] * 2, QUICK, key=jr.key(0))
