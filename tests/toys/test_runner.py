"""Experiments side by side: each in a process of its own, and an interrupt ends them all."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from tests.toys.trivial import first
from tests.toys.trivial.__main__ import SUITE
from tests.toys.trivial.first import SIGNS
from toys import runner, store


@pytest.fixture
def start(tmp_path):
    """Starts the trivial experiments, which write to `out` and say in `signs` that they have begun."""
    for name in ("out", "signs"):
        (tmp_path / name).mkdir()
    root, started = Path(__file__).parents[2], []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.toys.trivial", str(tmp_path / "out"), *arguments]
        environment = os.environ | {SIGNS: str(tmp_path / "signs")}
        started.append(
            subprocess.Popen(
                command, cwd=root, env=environment, stdout=-1, stderr=-1, text=True, start_new_session=True
            )
        )
        return started[-1]

    yield begin
    for process in started:
        if alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def alive(group: int) -> bool:
    """Whether a process of this group still runs."""
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def interrupted(process: subprocess.Popen[str]) -> bool:
    """By Ctrl-C, which a terminal sends to all of a group; Python may lose one, in a callback of its collector."""
    os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(5)
    return process.returncode is not None


def wait_for(happens) -> None:
    end = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_an_interrupt_ends_every_process(start, tmp_path):
    """Without a traceback, and no file is left."""
    cut_off = start()
    wait_for(lambda: len(list((tmp_path / "signs").iterdir())) == 2)
    assert cut_off.poll() is None  # the control: they have begun, and would take a minute
    wait_for(lambda: interrupted(cut_off))
    assert "Traceback" not in cut_off.communicate()[1]
    assert cut_off.returncode == 130
    wait_for(lambda: not alive(cut_off.pid))
    assert not list((tmp_path / "out").iterdir())


def test_each_is_made_by_a_process_of_its_own(start, tmp_path):
    """Files and what is printed are in reading order, whoever made them."""
    whole = start("--tiny")
    printed = whole.communicate()[0].split()
    assert whole.returncode == 0
    assert printed == [str(tmp_path / "out" / name) for name in ("first.png", "second.png", "results.md")]
    made_by = [int(np.load(tmp_path / "out" / f"{name}.npz")["process"]) for name in ("first", "second")]
    assert whole.pid not in made_by
    kinds = {f"{name}.{kind}" for name in ("first", "second") for kind in ("npz", "pdf", "png")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*kinds, "results.md"}


@pytest.mark.parametrize("another", [True, False])
def test_arrays_of_another_version_have_no_table(tmp_path, monkeypatch, another):
    """Tables are of all arrays that are there: those of other sources may have any shape, those of the same may not."""

    def rows(arrays):
        raise IndexError("of another shape")

    SUITE.experiment("second")  # it has the rows of the first from here on
    monkeypatch.setattr(first, "rows", rows)
    monkeypatch.setenv(SIGNS, str(tmp_path))
    made_by = SUITE.made_by("first", tiny=True)
    store.save(tmp_path / "first.npz", {"process": np.asarray(1)}, made_by | ({"sources": "x"} if another else {}))
    options = runner.Options(tmp_path, ("second",), tiny=True)
    if another:
        runner.run(SUITE, options)
        first_part, second_part = (tmp_path / "results.md").read_text().split("## ")[1:]
        assert "made before, and otherwise\n\nOf another version: make it again." in first_part
        assert "made before" not in second_part
    else:
        with pytest.raises(IndexError):
            runner.run(SUITE, options)
