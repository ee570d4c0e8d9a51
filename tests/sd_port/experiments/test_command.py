"""`sd-edit experiments`: real edits through the whole command, files, and nothing computed twice."""

import os
from pathlib import Path

import numpy as np
import pytest
import tyro

from sd_port.experiments import cost, dragging, image_to_image, inpainting, settings
from sd_port.experiments.command import EXPERIMENTS, ExperimentsCommand
from sd_port.experiments.judge import Judged
from sd_port.nano import devices
from tests.sd_port import tiny
from toys import store

pytestmark = pytest.mark.hasty

MODULES = dict(zip(EXPERIMENTS, (inpainting, image_to_image, dragging, settings, cost), strict=True))


@pytest.fixture(autouse=True, scope="module")
def one_device():
    """The command splits the CPU before the first use of a device, of which there has been one here."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(devices, "split_cpu", lambda count: None)
        yield


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """The folder after `sd-edit experiments --tiny --only cost`, which makes all three edits, by a random model.

    What is judged is how much they changed: reading scenes out of pictures takes a minute of compiling, and is tested
    by itself (test_judge.py).
    """

    def changes(results):
        return {
            key: Judged(*[np.sqrt(((images - task.pictures[:, 0]) ** 2).mean((1, 2, 3)))] * len(Judged._fields))
            for key, (images, task) in results.items()
        }

    folder = tmp_path_factory.mktemp("experiments") / "made"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cost, "judge", changes)
        command(folder).run()
    return folder


def command(out: Path) -> ExperimentsCommand:
    return ExperimentsCommand(out=out, only=("cost",), model=str(tiny.folder()), tiny=True, format=("pdf",))


def arrays(out: Path, name: str):
    found = store.load(out / f"{name}.npz")
    assert found is not None
    return MODULES[name].Arrays(**found[0])


def test_files(out):
    """Arrays with what made them, a figure, and a table."""
    assert {path.name for path in out.iterdir()} == {"cost.npz", "cost.pdf", "results.md"}
    text = (out / "results.md").read_text()
    found = store.load(out / "cost.npz")
    assert found is not None and len(found[1]["model_sha256"]) == 64 and found[1]["model_sha256"] in text
    assert found[1]["config"]["scenes"] == cost.Config.tiny().scenes and cost.TITLE in text


def test_nothing_is_made_twice(out, monkeypatch):
    """A second call computes nothing and draws nothing but what is missing."""
    text = (out / "results.md").read_text()
    monkeypatch.setattr(cost, "run", lambda config: pytest.fail("computed again"))
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name != "results.md"}
    command(out).run()
    assert times == {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.name != "results.md"}
    os.remove(out / "cost.pdf")
    command(out).run()
    assert (out / "cost.pdf").exists() and (out / "results.md").read_text() == text


def test_edits_do_something(out):
    """Every edit by either method is neither the truth nor what the other made; evaluations are those of its steps."""
    found, (steps,) = arrays(out, "cost"), cost.Config.tiny().steps
    assert found.found.shape[:3] == (3, 1, 2) and np.isfinite(found.found).all()
    assert found.found.min() > 1e-3 and np.abs(np.diff(found.found, axis=2)).max(-1).min() > 1e-4
    np.testing.assert_array_equal(found.evaluations[:2, 0], [[2 * steps] * 2, [3 * steps] * 2])
    assert found.evaluations[2].min() > 2 * steps and found.seconds.min() > 0


@pytest.mark.exhaustive
def test_every_experiment_runs(tmp_path):
    """All of `sd-edit experiments --tiny`: real edits, read out; finite rows, whole arrays, methods that differ."""
    out = tmp_path / "made"
    ExperimentsCommand(out=out, tiny=True, format=("pdf",)).run()
    wanted = {f"{name}.{kind}" for name in EXPERIMENTS for kind in ("npz", "pdf")} | {"results.md"}
    assert {path.name for path in out.iterdir()} == wanted
    text = (out / "results.md").read_text()
    for name, module in MODULES.items():
        found = arrays(out, name)
        rows = module.rows(found)
        assert module.TITLE in text and rows
        assert all(np.isfinite([row.found, row.error]).all() for row in rows)
        for field, array in found._asdict().items():
            assert array.dtype.kind == "U" or np.isfinite(array).all(), (name, field)
        if name in ("inpainting", "image_to_image", "dragging"):
            assert np.abs(np.diff(found.found, axis=found.found.ndim - 3)).max() > 1e-3
    drags = arrays(out, "dragging")
    assert np.abs(drags.pictures[:, 2:] - drags.pictures[:, :1]).max((2, 3, 4)).min() > 0.05
    away = drags.baseline[:, :, :, Judged._fields.index("away")]
    np.testing.assert_allclose(away[0], 20, atol=1)
    assert np.all(away[1] < 1)  # the truth through the autoencoder


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
