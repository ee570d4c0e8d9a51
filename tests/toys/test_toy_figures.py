"""`toy-figures` as a user meets it: files, what is not computed again, and what is refused."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from toys import priors, store
from toys.__main__ import EXPERIMENTS, main


@pytest.fixture(autouse=True)
def only_here(monkeypatch):
    """main() sets what compiles for the rest of its process; here it goes back to what it was."""
    monkeypatch.setattr("toys.__main__.keep_compilations", lambda: None)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))


def code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return stop.value.code


@pytest.mark.hasty
def test_files_and_repetition(tmp_path, monkeypatch, capsys):
    """Figures, arrays and numbers; again nothing is computed; a missing figure is drawn from the arrays."""
    out = tmp_path / "made" / "here"
    usual = ("--out", str(out), "--tiny", "--only", "priors")
    assert code(*usual) == 0
    assert jax.config.values["jax_disable_most_optimizations"]
    assert {path.name for path in out.iterdir()} == {"priors.npz", "priors.pdf", "priors.png", "results.md"}
    assert capsys.readouterr().out.splitlines() == [str(out / "priors.png"), str(out / "results.md")]
    with np.load(out / "priors.npz") as file:
        assert json.loads(str(file["made_by"]))["config"]["samples"] == priors.Config.tiny().samples
    text = (out / "results.md").read_text()
    assert priors.TITLE in text and "0.846 in the paper's figure" in text

    def unwanted(config):
        raise AssertionError("computed again")

    drawn = (out / "priors.pdf").stat().st_mtime_ns
    (out / "priors.png").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(priors, "run", unwanted)
        assert code(*usual) == 0
        assert (out / "priors.png").exists() and (out / "priors.pdf").stat().st_mtime_ns == drawn
        os.utime(out / "priors.pdf", ns=(0, 0))  # older than the arrays: a run was cut off before it drew
        assert code(*usual) == 0
        assert (out / "priors.pdf").stat().st_mtime_ns > 0
        with pytest.raises(AssertionError):
            main([*usual, "--force"])
        with pytest.raises(AssertionError):  # another configuration is computed
            main(["--out", str(out), "--only", "priors"])
    assert {path.name for path in out.iterdir()} == {"priors.npz", "priors.pdf", "priors.png", "results.md"}


def gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.exhaustive  # of experiments at full size, on every core for twenty seconds
def test_side_by_side(tmp_path, monkeypatch):
    """An interrupt ends every process without a word and leaves no file; two experiments are made by two processes."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(jax.config.values["jax_compilation_cache_dir"]))

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "toys", "--out", str(tmp_path), "--only", *arguments]
        return subprocess.Popen(command, stdout=-1, stderr=-1, text=True, start_new_session=True)

    cut_off = start("learned", "kl")
    time.sleep(20)  # all have begun, and at this size none ends in half a minute
    assert cut_off.poll() is None
    os.killpg(cut_off.pid, signal.SIGINT)  # as a terminal does
    assert "Traceback" not in cut_off.communicate()[1]
    assert cut_off.returncode == 130
    end = time.monotonic() + 20
    while not gone(cut_off.pid):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert not list(tmp_path.iterdir())

    whole = start("priors", "plane", "--tiny")
    printed = whole.communicate()[0].split()
    assert whole.returncode == 0
    assert printed == [str(tmp_path / name) for name in ("priors.png", "plane.png", "results.md")]
    kinds = [f"{name}.{kind}" for name in ("priors", "plane") for kind in ("npz", "pdf", "png")]
    assert {path.name for path in tmp_path.iterdir()} == {*kinds, "results.md"}


def test_tiny_does_not_replace_what_is_whole(tmp_path, capsys):
    """Arrays of the full size stay, and the line says what to do."""
    config = json.loads(json.dumps(dataclasses.asdict(priors.Config())))
    store.save(tmp_path / "priors.npz", {"x": np.zeros(1)}, {"config": config})
    before = (tmp_path / "priors.npz").read_bytes()
    assert code("--out", str(tmp_path), "--tiny", "--only", "priors") == 2
    assert "holds priors at full size; give another folder, or --force" in capsys.readouterr().err
    assert (tmp_path / "priors.npz").read_bytes() == before


def test_list(capsys):
    assert code("--list") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(EXPERIMENTS)


def test_refused(tmp_path, capsys):
    """One line, exit code 2."""
    (tmp_path / "file").write_text("")
    for arguments, said in (
        (("--only", "prior"), "--only prior: no such experiment; choose from priors"),
        (("--only",), "--only: name at least one of priors"),
        (("--out", str(tmp_path / "file")), str(tmp_path / "file")),
    ):
        assert code(*arguments) == 2
        line = capsys.readouterr().err.strip()
        assert line.startswith("toy-figures: ") and said in line and "\n" not in line
