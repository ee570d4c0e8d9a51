"""Pairs that say more than two means, and verdicts on known differences."""

import numpy as np

from sd_port.experiments.compare import Cell, differences, paired, row, summary, to_the_data, verdict
from sd_port.experiments.judge import Judged
from sd_port.metrics.bootstrap import bootstrap


def judged(scenes: int, **values) -> Judged:
    return Judged(**{name: np.full(scenes, values.get(name, 0.0)) for name in Judged._fields})


def test_pairs_say_more():
    """Scenes differ more than methods: the paired interval is narrower, and finds the difference that two do not."""
    rng = np.random.default_rng(1)
    scene = rng.normal(5, 2, 100)
    ode, sde = scene + rng.normal(0, 0.2, 100), scene - 0.2 + rng.normal(0, 0.2, 100)
    pair, apart = paired(ode, sde), [bootstrap(values) for values in (ode, sde)]
    width = [one.high - one.low for one in (pair, *apart)]
    assert width[0] < 0.3 * min(width[1:])
    assert verdict(pair) == "wins" and verdict(paired(sde, ode)) == "loses"
    assert apart[0].low < apart[1].high  # taken apart, they overlap
    shuffled = rng.permutation(sde)
    assert verdict(paired(ode, shuffled)) == "ties"
    assert verdict(paired(ode, ode)) == "ties"


def test_rows_say_what_was_found():
    found = row("what", np.array([1.0, 2, 3]), np.array([0.0, 1, 1]), ("without", "with"))
    assert found.found == -4 / 3 and found.error > 0
    assert "with wins; without 2, with 0.6667" in found.remark
    cell = Cell("here", judged(4, residual=0.2), judged(4, residual=0.1))
    (line,) = differences([cell], ["residual"])
    assert line.what.startswith("here: residual") and np.isclose(line.found, -0.1) and "SDE wins" in line.remark
    (line,) = to_the_data([cell], np.array([[[0.4, 0.01], [0.1, 0.5]]]))
    assert line.found == 0.1 and "p = 0.5; ODE 0.4, p = 0.01" in line.remark


def test_summary_is_plain():
    """What the theorems speak of is counted by itself; where SDE loses is named."""
    better = Cell("a", judged(4, residual=0.2, rmse=0.1), judged(4, residual=0.1, rmse=0.3))
    equal = Cell("b", judged(4), judged(4))
    law, rest = summary([better, equal], ["residual", "rmse"])
    chance = "0.1 of each by chance alone, were there no difference"  # 2.5 % of two
    assert law.found == 1 and law.remark == f"of 2, with 1 ties and 0 losses; {chance}"
    assert rest.found == 0 and rest.remark == f"of 2, with 1 ties and 1 losses; {chance}; SDE loses: a (rmse)"
