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
from sd_port.nano.quality import PLACES, Sample, judged
from sd_port.nano.read_out import ReadOut, read_out
from sd_port.pipeline import StableDiffusion
from sd_port.weights.hub import BUNDLED, resolve
from tests.sd_port.torch_models import distance, to_nchw
from tests.tolerances import PIPELINE
from theory.solvers import DDIM

FOLDER = BUNDLED["nano"]
FEW = 8
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


def keeps_small_things(found: dict) -> bool:
    """The gates of the card: 38 dB in all, 30 dB in the boat's box."""
    return found["psnr"]["all"]["mean"] > 38 and found["psnr"]["boat"]["mean"] > 30


def test_the_autoencoder_keeps_small_things(monkeypatch):
    """On a few fresh scenes, with latents of unit variance; half as bright, the pictures are not those."""

    def truth(images):
        return ReadOut(fresh(0, FEW).scene, np.zeros(len(images), np.float32))

    monkeypatch.setattr(measure, "read_out", truth)  # what is read out is in the exhaustive tests
    found = measure.autoencoder(nano(), FEW)
    assert keeps_small_things(found)
    np.testing.assert_allclose(found["latent_std"], 1, atol=0.25)  # a few scenes: some percent of chance, and drift
    assert min(found["read_out"]["original"][place]["within 1/2"] for place in PLACES) == 1
    monkeypatch.setattr(measure, "through_autoencoder", lambda pipe, images: images / 2)
    assert not keeps_small_things(measure.autoencoder(nano(), FEW))


@pytest.mark.exhaustive
def test_scenes_are_read_out_of_what_the_autoencoder_makes():
    """On 32 fresh scenes, and by the gates of the card."""
    found = measure.autoencoder(nano(), 32)
    assert keeps_small_things(found)
    for pictures, far in (("original", "1/2"), ("reconstruction", "1")):
        assert min(found["read_out"][pictures][place][f"within {far}"] for place in PLACES) > 0.95


def test_samples_are_scenes_and_follow_their_captions():
    """Eight samples of the SDE: near the manifold, most facts right, the reflection under the sun.

    The control: the same pictures judged by other scenes' captions.
    """
    pipe, data = nano(), fresh(9, FEW)
    real = read_out(through_autoencoder(pipe, data.images))
    sample = generated(pipe, data, solver=DDIM(pipe.schedule, 1.0), steps=20)
    found = judged(sample, float(np.median(real.residual)))
    assert found["residual_ratio"] < 2.5  # the card's figure is a median of 2,000
    assert found["claims_right"] > 0.8 and found["reflection_within_2_pixels"] > 0.7
    shuffled = Sample(sample.images, sample.captions[1:] + sample.captions[:1], sample.read)
    assert judged(shuffled, 1.0)["claims_right"] < found["claims_right"] - 0.1


def test_the_card_says_what_was_measured():
    """Of this model, and good enough: a sharp autoencoder, samples that are what was asked for, none from memory.

    The card is for what falls short, as the ODE's samples do.
    """
    figures = json.loads((FOLDER / "figures.json").read_text())
    assert (FOLDER / "README.md").read_text() == card.card(figures)
    assert {part["model_sha256"] for part in figures.values()} == {nano().digest()}
    assert keeps_small_things(figures["autoencoder"])
    for found in (figures["samples"][method] for method in ("ode", "sde")):
        assert found["n"] >= 2000 and min(found["claims_right"], found["reflection_within_2_pixels"]) >= 0.9
        assert min(found["one_boat_where_said"], found["one_island_where_said"]) >= 0.95
    sde = figures["samples"]["sde"]
    assert sde["residual_ratio"] <= 2 and all(0.8 <= ratio <= 1.2 for ratio in sde["spread"].values())
    assert figures["memory"]["samples"]["10%"] > 0.8 * figures["memory"]["fresh"]["10%"]
