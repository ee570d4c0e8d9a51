"""How the model is measured: reconstruction, in both precisions, compiled once, and resumed; the command; the card."""

import json
import shutil
from functools import cache

import jax
import jax.random as jr
import numpy as np
import pytest

from sd_port.nano import card, data, fresh, measure, quality
from sd_port.nano.quality import Sample
from sd_port.nano.read_out import ReadOut
from sd_port.pipeline import StableDiffusion
from sd_port.weights.hub import BUNDLED
from tests.sd_port import tiny
from theory.compilations import traces

ROUNDING = {"float32": 1e-5, "float64": 1e-13}  # of a few steps; latents are of size 1


@pytest.mark.parametrize("dtype", ROUNDING)
def test_chunks_share_one_program(monkeypatch, dtype):
    """Cycle-SDE loses rounding alone and the inversion far more, and what is compiled serves every chunk."""
    monkeypatch.setattr(fresh, "CHUNK", 2)
    latents = np.asarray(jr.normal(jr.key(0), (6, 16, 16, 4), "float32"))
    with traces() as count:
        found = measure.reconstructed(StableDiffusion.load(tiny.folder()), latents, ["a boat"] * 6, 3, 1.0, dtype)
    assert found["cycle_sde"] < ROUNDING[dtype] and found["ode_inversion"] > 1e-2
    assert count["_cycle"] == count["_inverted"] == 1


def test_reconstruction_goes_on_where_it_was_cut_off(tmp_path, monkeypatch):
    asked, kept, pipe = [], tmp_path / "rows", StableDiffusion.load(tiny.folder())

    def cut_off(pipe, latents, texts, *cell):
        if len(asked) == 5:
            asked.append("cut off")
            raise KeyboardInterrupt
        asked.append(cell)
        return {"cycle_sde": 0.0, "ode_inversion": 1.0}

    monkeypatch.setattr(measure, "reconstructed", cut_off)
    with pytest.raises(KeyboardInterrupt):
        measure.reconstruction(pipe, 2, kept)
    assert len(json.loads(kept.read_text())) == 5
    rows = measure.reconstruction(pipe, 2, kept)["rows"]
    asked.remove("cut off")
    assert [(row["steps"], row["guidance"], row["dtype"]) for row in rows] == asked
    assert len(set(asked)) == len(asked) == 16 and not kept.exists()


def nothing_lost(pipe, images):
    return images


@cache
def drawn() -> list[fresh.Fresh]:
    return [fresh.fresh(seed, FEW) for seed in range(1, 4)]


def read(images) -> ReadOut:
    """The scene, of those that are measured, whose picture is nearest."""
    known = drawn()
    pictures = np.concatenate([one.images for one in known]).reshape(3 * FEW, -1)
    nearest = [int(((pictures - image.reshape(-1)) ** 2).sum(1).argmin()) for image in np.asarray(images)]
    scene = jax.tree.map(lambda *leaves: np.concatenate(leaves)[nearest], *[one.scene for one in known])
    return ReadOut(scene, np.full(len(images), 0.01, np.float32))


FEW, SEED, SCENES = 20, 5, 70  # a hundredth of what is measured, and a training


@pytest.fixture
def perfect(monkeypatch, tmp_path):
    """The command, for a model that makes just what was asked for; a list of what was generated."""
    asked = []

    def generated(pipe, data, *, solver, steps=50, guidance_scale=3.0, label=""):
        asked.append((type(solver).__name__, steps, guidance_scale))
        return Sample(data.images, data.captions, read(data.images))

    def seen(images, read):
        return [np.asarray(getattr(read.scene, f"{part}_presence") > 0.5, int) for part in ("boat", "island")]

    monkeypatch.setattr(measure, "split_cpu", lambda count: None)
    monkeypatch.setattr(quality, "counts", seen)
    for name, stub in (("generated", generated), ("through_autoencoder", nothing_lost), ("read_out", read)):
        monkeypatch.setattr(measure, name, stub)
    config, out = tmp_path / "config.toml", tmp_path / "figures"
    config.write_text(f"seed = {SEED}\nscenes = {SCENES}\n")
    given = ["--out", str(out), "--model", str(tiny.folder()), "--share", "0.01", "--config", str(config), "--only"]
    return lambda *parts: measure.main([*given, *parts]), out, asked


def test_samples_and_sweep_of_a_perfect_model(perfect, capsys, monkeypatch):
    """All claims are right and no spread is lost; what was measured of this model is not measured again.

    The control: one picture for all captions.
    """
    measured, out, asked = perfect
    measured("samples", "sweep")
    found = json.loads((out / "samples.json").read_text())
    for method in ("ode", "sde"):
        assert found[method]["claims_right"] == found[method]["reflection_within_2_pixels"] == 1
        assert found[method]["discrepancy"]["parameters"]["p_value"] > 0.01
        assert 0.3 < min(found[method]["spread"].values()) < max(found[method]["spread"].values()) < 3
    rows = json.loads((out / "sweep.json").read_text())["rows"]
    assert len(rows) == len({(row["solver"], row["steps"], row["guidance"]) for row in rows}) == len(asked) - 2 == 21
    assert {path.name for path in out.glob("*.png")} == set(card.SHEETS)
    assert capsys.readouterr().out.split() == [str(out / name) for name in ("samples.json", "sweep.json")]
    measured("samples", "sweep")
    assert len(asked) == 23 and capsys.readouterr().out == ""

    def always_one(pipe, data, **_):
        images = np.repeat(data.images[:1], FEW, axis=0)
        return Sample(images, data.captions, read(images))

    monkeypatch.setattr(measure, "generated", always_one)
    (out / "samples.json").unlink()
    measured("samples")
    one = json.loads((out / "samples.json").read_text())["sde"]
    assert one["claims_right"] < 0.8 and one["discrepancy"]["parameters"]["p_value"] < 0.01
    assert max(one["spread"].values()) < 0.01


def test_memory_is_seen(perfect, capsys):
    """Samples that are pictures of training are no distance from them; those of fresh scenes are some."""
    measured, out, _ = perfect
    with pytest.raises(SystemExit, match="2"):
        measured("memory")
    assert "measure samples first" in capsys.readouterr().err
    measured("samples", "memory")
    honest = json.loads((out / "memory.json").read_text())
    assert min(honest["samples"]["min"], honest["fresh"]["min"]) > 0.01 and honest["training_pictures"] == SCENES
    training = data.drawn(jr.key(4 * SEED + 2), SCENES, fresh.SIZE, each=1).images
    np.savez_compressed(out / "samples_sde.npz", images=training[-5:])
    (out / "memory.json").unlink()
    measured("memory")
    copied = json.loads((out / "memory.json").read_text())
    assert copied["samples"]["50%"] < 1e-3 and copied["fresh"] == honest["fresh"]


def test_the_card_is_of_its_model_alone(tmp_path, capsys):
    """From the parts that measure wrote; refused where there are none, no model, or those of another model."""
    figures, model, empty = tmp_path / "figures", tmp_path / "model", tmp_path / "empty"
    shutil.copytree(BUNDLED["nano"], model)
    parts = json.loads((model / "figures.json").read_text())
    expected = [(model / name).read_text() for name in ("figures.json", "README.md")]
    for path in (figures, empty):
        path.mkdir()
    for name, part in parts.items():
        (figures / f"{name}.json").write_text(json.dumps(part))
    (figures / "real.png").write_bytes(b"a picture")
    for name in ("figures.json", "README.md"):
        (model / name).unlink()
    card.main(["--figures", str(figures), "--model", str(model)])
    assert [(model / name).read_text() for name in ("figures.json", "README.md")] == expected
    assert (model / "real.png").read_bytes() == b"a picture"
    (figures / "memory.json").write_text(json.dumps(parts["memory"] | {"model_sha256": "0"}))
    for folder, of, said in (
        (figures, model, "memory.json is of another model"),
        (empty, model, "holds no figures"),
        (figures, empty, "holds no model_index.json"),
    ):
        with pytest.raises(SystemExit, match="2"):
            card.main(["--figures", str(folder), "--model", str(of)])
        assert said in capsys.readouterr().err
