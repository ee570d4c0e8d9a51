"""Rows of results and files of results."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from toys import priors, store
from toys.__main__ import EXPERIMENTS, experiment
from toys.results import Row, table


def test_rows_agree_within_four_errors():
    """Estimates by their standard error, exact numbers by their digits; what has no exact value claims nothing."""
    assert Row("x", 1.0, 0.1, 1.39).agrees and not Row("x", 1.0, 0.1, 1.41).agrees
    assert Row("x", 1.00009, exact=1.0).agrees and not Row("x", 1.001, exact=1.0).agrees
    assert Row("x", 1.02, exact=1.0, tolerance=0.05).agrees and not Row("x", 1.06, exact=1.0, tolerance=0.05).agrees
    assert Row("x", 9.0, 0.1, 1.0, biased=True).agrees and not Row("x", 9.0, 0.1, 1.0).agrees
    assert Row("x", 1.0).agrees and not Row("x", math.nan, exact=1.0).agrees


def test_table():
    """One line a row, errors counted where there are some."""
    lines = table([Row("a", 0.5, 0.1, 0.3, "why"), Row("b", 2.0)]).splitlines()
    more = table([Row("c", 1.02, exact=1.0, tolerance=0.05), Row("d", 9.0, 0.1, 1.0, biased=True)]).splitlines()
    assert more[2] == "| c | 1.02 |  | 1 | +2.0% |  |" and more[3] == "| d | 9 | 0.1 | 1 | biased |  |"
    assert lines[2] == "| a | 0.5 | 0.1 | 0.3 | +2.0 errors | why |" and lines[3] == "| b | 2 |  |  |  |  |"
    assert table([Row("e", 1.0, exact=1.0)]).splitlines()[2] == "| e | 1 |  | 1 |  |  |"


def arrays() -> priors.Arrays:
    return priors.Arrays(*(np.full(2, float(i)) for i in range(len(priors.Arrays._fields))))


def test_arrays_carry_what_made_them(tmp_path):
    """Config with seed, versions, sources, commit; a change in any of the first three is seen."""
    made_by = store.made_by(priors.Config(seed=5))
    store.save(tmp_path / "a.npz", arrays()._asdict(), made_by)
    found = store.load(tmp_path / "a.npz")
    assert found is not None and found[1] == made_by and found[1]["config"]["seed"] == 5
    assert set(made_by) == {"config", "versions", "sources", "commit"} and made_by["versions"]["jax"]
    for name, array in arrays()._asdict().items():
        np.testing.assert_array_equal(found[0][name], array)
    assert store.same(made_by, made_by | {"commit": "another"})
    assert not store.same(made_by, store.made_by(priors.Config(seed=6)))
    assert not store.same(made_by, made_by | {"sources": "others"})


@pytest.mark.parametrize("content", [b"", b"PK not a zip", None])
def test_what_cannot_be_read_is_not_there(tmp_path, content):
    """An empty, a broken and a missing file: all are made anew."""
    if content is not None:
        (tmp_path / "a.npz").write_bytes(content)
    assert store.load(tmp_path / "a.npz") is None


def test_pickles_are_not_opened(tmp_path):
    """An .npz with an object in it would need unpickling: it counts as unreadable."""
    np.savez(tmp_path / "a.npz", made_by=np.array(json.dumps({})), x=np.array([{}], dtype=object))
    assert store.load(tmp_path / "a.npz") is None


RESULTS = Path(__file__).parents[2] / "docs" / "toys" / "results.md"


def committed() -> list[tuple[str, dict, list[str]]]:
    """Name, config and cells of the column "off by" of every experiment."""
    found = []
    for part in RESULTS.read_text().split("\n## ")[1:]:
        name, config = re.search(r"^`(\w+)`, (\{.*?\})$", part, re.MULTILINE).groups()
        rows = [line.split(" | ") for line in part.splitlines() if line.startswith("| ") and not line.startswith("| |")]
        found.append((name, json.loads(config), [row[4].strip() for row in rows]))
    return found


def test_committed_numbers_agree():
    """No number with an exact value is off by more than four of its errors, in any experiment."""
    counted = [abs(float(cell.removesuffix(" errors"))) for *_, off in committed() for cell in off if "errors" in cell]
    assert len(counted) > 30 and max(counted) <= 4


def test_committed_headline_of_learned_scores():
    """Some noise is best, and not the most that was tried, for every network from both starts; from a wrong start the
    ODE keeps the gap of .448 to a tenth, whatever the last network has learned."""
    text = RESULTS.read_text()
    best = [float(level) for level in re.findall(r"λ = ([\d.]+), the best", text)]
    levels = {name: config for name, config, _ in committed()}["learned"]["levels"]
    assert len(best) == 8 and min(best) > 0 and max(best) < max(levels)
    last = re.search(r"a wrong start, 6000 training steps, λ = 0 \| ([\d.]+)", text)
    assert last is not None and abs(float(last.group(1)) - 0.448) < 0.0448


def test_committed_numbers_are_of_the_paper_size():
    """Every experiment, with its present settings and no other: the line would say so if it had been made before."""
    found = {name: config for name, config, _ in committed()}
    assert tuple(found) == EXPERIMENTS
    for name, config in found.items():
        assert config == json.loads(json.dumps(dataclasses.asdict(experiment(name).Config()))), name
