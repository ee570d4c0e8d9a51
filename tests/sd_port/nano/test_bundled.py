"""The model in the package: small, opened by diffusers too, and as good as its card says on a few fresh scenes."""

import json
from functools import cache
from pathlib import Path

import jax.random as jr
import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from safetensors.numpy import load_file

from sd_port.nano import card, measure
from sd_port.nano.fresh import fresh, through_autoencoder
from sd_port.nano.measure import generated
from sd_port.nano.quality import COLOURS, PLACES, Sample, judged
from sd_port.nano.read_out import read_out
from sd_port.pipeline import StableDiffusion
from sd_port.weights.hub import BUNDLED, resolve
from tests.sd_port.torch_models import distance, to_nchw
from tests.tolerances import PIPELINE
from theory.solvers import DDIM

FOLDER = BUNDLED["nano"]
PROMPTS = ["a small red boat with white sails left of an island", "a tall island under an orange sun"]


@cache
def nano() -> StableDiffusion:
    return StableDiffusion.load("nano")


def test_what_ships():
    """At most 32 MiB in all, half precision, nothing but known kinds of files."""
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 32 * 2**20
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md", ".png"}
    for path in FOLDER.rglob("*.safetensors"):
        assert {array.dtype for array in load_file(path).values()} == {np.dtype(np.float16)}


def test_its_name_is_known(tmp_path, monkeypatch):
    """`nano` is the bundled folder, unless a folder of that name is here."""
    monkeypatch.chdir(tmp_path)
    assert resolve("nano") == FOLDER
    (tmp_path / "nano").mkdir()
    assert resolve("nano") == Path("nano")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_diffusers_makes_the_same_pictures():
    """Twenty guided steps of DDIM from the same noise, its own scheduler config on both sides."""
    theirs = StableDiffusionPipeline.from_pretrained(FOLDER)
    theirs.set_progress_bar_config(disable=True)
    start = jr.normal(jr.key(1), (2, 16, 16, 4), "float32")
    expected = theirs(
        PROMPTS, num_inference_steps=20, guidance_scale=3.0, latents=to_nchw(np.asarray(start)), output_type="np"
    ).images
    pipe = nano()
    found = pipe.generate(
        PROMPTS, key=jr.key(0), steps=20, guidance_scale=3.0, latent=start, solver=DDIM(pipe.schedule, 0.0)
    )
    assert distance(found, expected) < PIPELINE
    other = pipe.generate(
        PROMPTS[::-1], key=jr.key(0), steps=20, guidance_scale=3.0, latent=start, solver=DDIM(pipe.schedule, 0.0)
    )
    assert distance(other, expected) > 0.05


def test_the_autoencoder_keeps_small_things():
    """The gates of the card, on 32 fresh scenes: 38 dB in all, 30 dB in the boat's box; unit latents."""
    found = measure.autoencoder(nano(), 32)
    assert found["psnr"]["all"]["mean"] > 38 and found["psnr"]["boat"]["mean"] > 30
    np.testing.assert_allclose(found["latent_std"], 1, atol=0.25)  # 32 scenes: a few percent of chance, and drift


def test_samples_are_scenes_and_follow_their_captions():
    """Sixteen samples of the SDE: near the manifold, most facts right, the reflection under the sun.

    The control: the same pictures judged by other scenes' captions.
    """
    pipe, data = nano(), fresh(9, 16)
    real = read_out(through_autoencoder(pipe, data.images))
    sample = generated(pipe, data, solver=DDIM(pipe.schedule, 1.0), steps=25)
    found = judged(sample, float(np.median(real.residual)))
    assert found["residual_ratio"] < 2.5  # the card's figure is a median of 2,000
    assert found["claims_right"] > 0.8 and found["reflection_within_2_pixels"] > 0.7
    shuffled = Sample(sample.images, sample.captions[1:] + sample.captions[:1], sample.read)
    assert judged(shuffled, 1.0)["claims_right"] < found["claims_right"] - 0.1


def test_the_figures_are_good_enough():
    """The card's: a sharp autoencoder, a read-out that is right, and samples that are what was asked for."""
    figures = json.loads((FOLDER / "figures.json").read_text())
    autoencoder, samples = figures["autoencoder"], figures["samples"]
    assert autoencoder["psnr"]["all"]["mean"] >= 38 and autoencoder["psnr"]["boat"]["mean"] >= 30
    for pictures, far, share in (("original", "1/2", 0.99), ("reconstruction", "1", 0.97)):
        read = autoencoder["read_out"][pictures]
        assert min(read[place][f"within {far}"] for place in PLACES) >= share, pictures
        assert min(read[name] for name in COLOURS) >= share, pictures
    for method in ("ode", "sde"):
        found = samples[method]
        assert found["n"] >= 2000 and found["claims_right"] >= 0.9
        assert found["reflection_within_2_pixels"] >= 0.9
        assert min(found["one_boat_where_said"], found["one_island_where_said"]) >= 0.95
    assert figures["memory"]["samples"]["10%"] > 0.8 * figures["memory"]["fresh"]["10%"]


MISSED = pytest.mark.xfail(strict=True, reason="the ODE keeps the network's errors: the card has by how much it misses")


@pytest.mark.parametrize("method", [pytest.param("ode", marks=MISSED), "sde"])
def test_samples_are_near_the_manifold(method):
    """A residual at most twice that of real scenes through the autoencoder."""
    assert json.loads((FOLDER / "figures.json").read_text())["samples"][method]["residual_ratio"] <= 2


@pytest.mark.parametrize("method", [pytest.param("ode", marks=MISSED), "sde"])
def test_samples_are_as_varied_as_scenes(method):
    """Spreads within a fifth of those of real scenes."""
    spread = json.loads((FOLDER / "figures.json").read_text())["samples"][method]["spread"]
    assert all(0.8 <= ratio <= 1.2 for ratio in spread.values())


def test_the_card_says_what_was_measured():
    figures = json.loads((FOLDER / "figures.json").read_text())
    assert (FOLDER / "README.md").read_text() == card.card(figures)
    digests = {part["model_sha256"] for part in figures.values()}
    assert digests == {nano().digest()}
