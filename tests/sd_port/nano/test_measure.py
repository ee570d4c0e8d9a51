"""How the model is measured: reconstruction, in both precisions, compiled once, and resumed."""

import json

import jax.random as jr
import numpy as np
import pytest

from sd_port.nano import fresh, measure
from sd_port.pipeline import StableDiffusion
from tests.sd_port import tiny
from theory.compilations import traces

ROUNDING = {"float32": 1e-5, "float64": 1e-13}  # of a few steps; latents are of size 1


@pytest.mark.parametrize("dtype", ROUNDING)
def test_chunks_share_one_program(monkeypatch, dtype):
    """Cycle-SDE loses rounding alone and the inversion far more, and what is compiled serves every chunk."""
    monkeypatch.setattr(fresh, "CHUNK", 2)
    latents = np.asarray(jr.normal(jr.key(0), (6, 16, 16, 4), "float32"))
    with traces() as count:
        found = measure._reconstructed(StableDiffusion.load(tiny.folder()), latents, ["a boat"] * 6, 3, 1.0, dtype)
    assert found["cycle_sde"] < ROUNDING[dtype] and found["ode_inversion"] > 1e-2
    assert count["_cycle"] == count["_inverted"] == 1


def test_reconstruction_goes_on_where_it_was_cut_off(tmp_path, monkeypatch):
    asked, kept, pipe = [], tmp_path / "rows", StableDiffusion.load(tiny.folder())

    def reconstructed(pipe, latents, texts, *cell):
        if len(asked) == 5:
            asked.append("cut off")
            raise KeyboardInterrupt
        asked.append(cell)
        return {"cycle_sde": 0.0, "ode_inversion": 1.0}

    monkeypatch.setattr(measure, "_reconstructed", reconstructed)
    with pytest.raises(KeyboardInterrupt):
        measure.reconstruction(pipe, 2, kept)
    assert len(json.loads(kept.read_text())) == 5
    rows = measure.reconstruction(pipe, 2, kept)["rows"]
    asked.remove("cut off")
    assert [(row["steps"], row["guidance"], row["dtype"]) for row in rows] == asked
    assert len(set(asked)) == len(asked) == 16 and not kept.exists()
