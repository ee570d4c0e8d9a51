"""Parts of a run that was cut off."""

from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

from toys import runner, store


def test_parts_are_kept_for_the_same_run(tmp_path):
    """What was made is not made again, unless anything that decides it is other; another commit decides nothing."""
    calls = []

    def make(value: float) -> np.ndarray:
        calls.append(value)
        return np.full(3, value)

    asked = {"config": {"seed": 0}, "commit": "a"}
    for made_by in (asked, asked | {"commit": "b"}):
        with store.parts(tmp_path, made_by):
            np.testing.assert_array_equal(store.kept(("one", 1), make, 1.0), [1, 1, 1])
            np.testing.assert_array_equal(store.kept(("one", 2), make, 2.0), [2, 2, 2])
    assert calls == [1.0, 2.0]
    with store.parts(tmp_path, asked | {"config": {"seed": 1}}):
        store.kept(("one", 1), make, 1.0)
    assert calls == [1.0, 2.0, 1.0]
    np.testing.assert_array_equal(store.kept(("one", 1), make, 3.0), [3, 3, 3])  # outside nothing is kept
    assert calls[-1] == 3.0 and len(list(tmp_path.rglob("*.npy"))) == 3


def test_a_run_that_was_cut_off_goes_on(tmp_path):
    """The second call makes the second part alone; when all is there, and with --force, nothing of them is left."""

    class Arrays(NamedTuple):
        both: np.ndarray

    made, broken = [], [True]

    def part(name: int) -> np.ndarray:
        if name == 2 and broken[0]:
            raise KeyboardInterrupt
        made.append(name)
        return np.full(2, float(name))

    def run(config: object) -> Arrays:
        return Arrays(np.stack([store.kept((name,), part, name) for name in (1, 2)]))

    class Suite(runner.Suite):
        def experiment(self, name):
            return SimpleNamespace(Arrays=Arrays, run=run)

        def config(self, name, tiny):
            return None

        def made_by(self, name, tiny):
            return {"config": {}, "commit": ""}

    suite, options = Suite("", ("x",), "", "", ()), runner.Options(out=tmp_path, only=("x",))
    with pytest.raises(KeyboardInterrupt):
        runner.make(suite, "x", options)
    assert made == [1] and (tmp_path / "x.parts").exists() and not (tmp_path / "x.npz").exists()
    broken[0] = False
    np.testing.assert_array_equal(runner.make(suite, "x", options).both, [[1, 1], [2, 2]])
    assert made == [1, 2] and [path.name for path in tmp_path.iterdir()] == ["x.npz"]
    runner.make(suite, "x", replace(options, force=True))
    assert made == [1, 2, 1, 2]
