"""Every experiment at its tiny size through the command: files, rows, figures, and nothing computed twice."""

import os
from pathlib import Path

import jax
import matplotlib.text
import numpy as np
import pytest
import tyro

from sd_port.experiments import cost, dragging, image_to_image, inpainting, settings
from sd_port.experiments.command import EXPERIMENTS, ExperimentsCommand
from sd_port.experiments.editing import by_batches
from sd_port.experiments.judge import Judged
from theory.editing import edit
from theory.schedules import LinearVP
from theory.solve import time_grid
from theory.solvers import DDIM
from toys import store

MODULES = dict(zip(EXPERIMENTS, (inpainting, image_to_image, dragging, settings, cost), strict=True))
every = pytest.mark.parametrize("name", EXPERIMENTS)


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """The folder after `sd-edit experiments --tiny`."""
    folder = tmp_path_factory.mktemp("experiments") / "made"
    ExperimentsCommand(out=folder, tiny=True, format=("pdf",)).run()
    return folder


def arrays(out: Path, name: str):
    found = store.load(out / f"{name}.npz")
    assert found is not None
    return MODULES[name].Arrays(**found[0])


def test_files_and_repetition(out, monkeypatch):
    """Arrays with what made them, figures, and one table of all; a second call computes nothing and draws nothing."""
    wanted = {f"{name}.{kind}" for name in EXPERIMENTS for kind in ("npz", "pdf")} | {"results.md"}
    assert {path.name for path in out.iterdir()} == wanted
    text = (out / "results.md").read_text()
    found = store.load(out / "dragging.npz")
    assert found is not None and len(found[1]["model_sha256"]) == 64 and found[1]["model_sha256"] in text
    assert found[1]["config"]["scenes"] == dragging.Config.tiny().scenes
    for module in MODULES.values():
        assert module.TITLE in text
        monkeypatch.setattr(module, "run", lambda config: pytest.fail("computed again"))
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name != "results.md"}
    ExperimentsCommand(out=out, tiny=True, format=("pdf",)).run()
    assert times == {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name != "results.md"}
    os.remove(out / "cost.pdf")
    ExperimentsCommand(out=out, only=("cost",), tiny=True, format=("pdf",)).run()
    assert (out / "cost.pdf").exists() and (out / "results.md").read_text() == text


@every
def test_rows_are_finite(out, name):
    rows = MODULES[name].rows(arrays(out, name))
    assert rows and all(np.isfinite([row.found, row.error]).all() for row in rows)
    assert len({(row.what, row.remark) for row in rows}) == len(rows)


@every
def test_arrays_are_whole(out, name):
    """Plain arrays, of numbers or of names, with nothing missing: no tiny setting is one that a method lacks."""
    for field, array in arrays(out, name)._asdict().items():
        assert array.dtype.kind in "fiU", field
        assert array.dtype.kind == "U" or np.isfinite(array).all(), field


@every
def test_figures_can_be_read_in_print(out, name):
    figure = MODULES[name].plot(arrays(out, name))
    assert figure.get_figwidth() <= 7.5
    texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text()]
    assert texts and min(text.get_fontsize() for text in texts) >= 5.5


@pytest.mark.parametrize("name", ["inpainting", "image_to_image", "dragging"])
def test_methods_are_told_apart(out, name):
    """Negative control: with the methods exchanged, wins become losses."""
    found = arrays(out, name)
    axis = found.found.ndim - 3
    assert found.found.shape[axis] == 2 and np.abs(np.diff(found.found, axis=axis)).max() > 1e-3
    other_way = {"found": np.flip(found.found, axis)}
    if name == "dragging":
        other_way["lora"] = np.flip(found.lora, 1)
    rows, swapped = (MODULES[name].rows(one) for one in (found, found._replace(**other_way)))
    count, other = ([[f" SDE {v};" in one.remark for one in of] for v in ("wins", "loses")] for of in (rows, swapped))
    assert count == other[::-1] and np.any(count)


def test_edits_do_something(out):
    """Results differ from what they came from, and pictures of drags are not those before."""
    pictures = arrays(out, "dragging").pictures
    assert np.abs(pictures[:, 2:] - pictures[:, :1]).max((2, 3, 4)).min() > 0.05
    away = arrays(out, "dragging").baseline[:, :, :, Judged._fields.index("away")]
    np.testing.assert_allclose(away[0], 20, atol=1)
    assert np.all(away[1] < 1)  # the truth through the autoencoder


@pytest.mark.parametrize(("latent", "calls"), [("noise", 1), ("invert", 2), ("cycle", 2)])
def test_evaluations_are_counted_right(latent, calls):
    """What `cost` multiplies: the way back asks the network once a step, and so does the way up where it is asked."""
    counted = []

    def asked(x, t):
        jax.debug.callback(lambda: counted.append(1))
        return 0.5 * x

    eps_fn = jax.tree_util.Partial(asked)
    schedule, steps = LinearVP(), 7
    ts = time_grid(schedule, steps, start=0.5, end=1e-3)
    solver = DDIM(schedule, 0.0 if latent == "invert" else 1.0)
    edit(solver, eps_fn, eps_fn, jax.numpy.ones(3), ts, jax.random.key(0), latent=latent)
    jax.effects_barrier()
    assert len(counted) == calls * steps


def test_batches_are_of_one_size():
    """Seven rows by threes are 3 + 3 + 1 in parts of three, and four by three are 2 + 2: rows come back in order."""
    for n, sizes in ((7, [3, 3, 3]), (4, [2, 2]), (2, [2])):
        seen = []

        def edit(rows, key, seen=seen):
            seen.append(len(rows))
            return 10.0 * rows

        np.testing.assert_array_equal(by_batches(n, 3, jax.random.key(0), edit), 10.0 * np.arange(n))
        assert seen == sizes


def test_list(capsys):
    ExperimentsCommand(list=True).run()
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(EXPERIMENTS)


def test_options_are_explained(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(ExperimentsCommand, args=["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())  # as if no line were broken
    assert "--model" in text and "Only these experiments" in text and "trained on the same scenes" in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"only": ("drag",)}, "--only drag: no such experiment; choose from inpainting"),
        ({"only": ()}, "--only: name at least one of inpainting"),
        ({"scenes": 1}, "--scenes 1: give at least 2"),
        ({"model": "no/such/folder/here"}, "no/such/folder/here"),
    ],
)
def test_refused(tmp_path, options, said):
    with pytest.raises((ValueError, OSError), match=said):
        ExperimentsCommand(out=tmp_path / "made", tiny=True, **options).run()
    assert not list(tmp_path.rglob("*.npz"))
