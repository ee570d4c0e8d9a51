"""Flags that XLA is known to take, devices, kept programs, and how many programs there are."""

import gc
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from theory import compilations
from theory.compilations import KNOWN_TO, LITTLE_MEMORY, OLD_EMITTERS, collect_rarely, set_flags, stay_on_cpu, traces


@pytest.fixture
def flags(monkeypatch):
    """XLA_FLAGS as the user set them; the other tests never see what is added."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_mine=1")


def test_only_known_flags_are_set_and_the_user_s_stand(flags, monkeypatch):
    """XLA takes the last of two: the user's come last. A jaxlib that nobody tried gets none."""
    monkeypatch.setattr(compilations, "version", lambda name: "0.10.2")
    for _ in range(2):  # not again: kept programs would not be found
        set_flags(OLD_EMITTERS, LITTLE_MEMORY)
        assert os.environ["XLA_FLAGS"] == f"{OLD_EMITTERS} {LITTLE_MEMORY} --xla_mine=1"
    for new, known in (("0.12.0.1", LITTLE_MEMORY + " "), ("99.0", "")):
        monkeypatch.setenv("XLA_FLAGS", "--xla_mine=1")
        monkeypatch.setattr(compilations, "version", lambda name, new=new: new)
        set_flags(OLD_EMITTERS, LITTLE_MEMORY)
        assert os.environ["XLA_FLAGS"] == f"{known}--xla_mine=1"
    with pytest.raises(KeyError):
        set_flags("--xla_not_tried=1")


def test_the_installed_jaxlib_takes_what_it_is_said_to_know():
    """XLA ends a process whose flags it does not know: the control is one that nobody knows."""
    code = "from theory.compilations import *; set_flags(*KNOWN_TO); import jax; print(jax.devices()[0].platform)"
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}, capture_output=True)
    assert done.returncode == 0 and done.stdout == b"cpu\n", done.stderr
    unknown = {"XLA_FLAGS": "--xla_nobody_knows=1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(run, env=os.environ | unknown, capture_output=True)
    assert done.returncode != 0 and b"nknown flag" in done.stderr
    assert all(KNOWN_TO.values())


def test_the_collector_looks_rarely():
    """Fifty thousand new objects, as a traced program makes them, start no search; by Python's own settings they do."""
    searches = []
    before, watch = gc.get_threshold(), lambda phase, info: searches.append(phase)
    gc.callbacks.append(watch)
    try:
        for settings, expected in ((lambda: gc.set_threshold(700, 10, 10), True), (collect_rarely, False)):
            settings()
            gc.collect()
            searches.clear()
            kept = [[] for _ in range(50_000)]
            assert len(kept) == 50_000 and bool(searches) == expected
    finally:
        gc.callbacks.remove(watch)
        gc.set_threshold(*before)


def test_jax_platforms_stands(monkeypatch):
    """Small float64 programs leave a GPU alone, unless the user says otherwise."""
    asked = []
    monkeypatch.setattr(jax.config, "update", lambda *what: asked.append(what))
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    stay_on_cpu()
    assert asked == []
    monkeypatch.delenv("JAX_PLATFORMS")
    stay_on_cpu()
    assert asked == [("jax_platforms", "cpu")]


def test_traces_counts_programs():
    """One for each shape, none for new values; a program inside another is part of it."""

    @jax.jit
    def inner(x):
        return jnp.sin(x)

    @jax.jit
    def outer(x):
        return inner(x) + 1

    with traces() as count:
        outer(np.float32(1))
        outer(np.float32(2))
        assert count["outer"] == 1
        outer(np.ones(3, np.float32))
    assert count["outer"] == 2 and count["inner"] == 0
    outer(np.ones(4, np.float32))
    assert count["outer"] == 2  # it listens no more


def test_commands_refuse_before_they_load_jax():
    """Half a second instead of two: help, and options, files and points that cannot be."""
    code = """
import contextlib, io, sys
import sd_port.__main__, theory.__main__, toys.__main__

def refused(main, *argv):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main(list(argv))
        except SystemExit as stop:
            return stop.code
    return 0

edit, check, figures = sd_port.__main__.main, theory.__main__.main, toys.__main__.main
for main in (edit, check, figures):
    assert refused(main, "--help") == 0
assert refused(edit, "generate", "x", "--steps", "0") == 2
assert refused(edit, "drag", "nowhere.png", "--source", "1", "1", "--target", "2", "2") == 2
assert refused(edit, "drag", "docs/demo.png", "--source", "9999", "1", "--target", "2", "2") == 2
assert refused(edit, "inpaint", "docs/demo.png") == 2
assert refused(edit, "replay", "nowhere.json") == 2
assert refused(edit, "bench", "nowhere") == 2
assert refused(check, "--only", "nothing") == 2
assert refused(check, "--target", '{"weights": [1], "means": [0], "stds": [-1]}') == 2
assert refused(figures, "--only", "nothing") == 2
print("jax" in sys.modules)
refused(edit, "models")
import theory.mixtures
print("jax" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"], done.stderr
