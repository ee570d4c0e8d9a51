"""Intervals of means: their coverage, their weights, and what is refused."""

import numpy as np
import pytest

from sd_port.metrics.bootstrap import bootstrap


def test_it_covers_as_often_as_it_says():
    """Of 300 samples of 40 the interval holds the true mean 95 times in a hundred, to four standard errors."""
    rng = np.random.default_rng(0)
    held = []
    for i in range(300):
        found = bootstrap(values := rng.exponential(size=40), resamples=500, seed=i)
        held.append(found.low <= 1 <= found.high)
    assert abs(np.mean(held) - 0.93) < 4 * np.sqrt(0.95 * 0.05 / 300)  # a skewed law costs two percent at this size
    assert found.error == pytest.approx(values.std() / np.sqrt(40), rel=0.15)  # of 500 resamples, to 4 %
    narrow, wide = bootstrap(values, level=0.5), bootstrap(values)
    assert narrow.high - narrow.low < wide.high - wide.low


def test_weights_are_as_if_items_were_repeated():
    values, weights = np.array([1.0, 4.0, 10.0]), np.array([3, 1, 2])
    assert bootstrap(values, weights).mean == pytest.approx(np.repeat(values, weights).mean(), rel=1e-15)
    assert bootstrap(values).mean == 5 and bootstrap([2.0]) == (2, 0, 2, 2)
    many = np.arange(30.0) ** 2
    assert bootstrap(many) == bootstrap(many) != bootstrap(many, seed=1)


@pytest.mark.parametrize(("args", "level"), [(([],), 0.95), (([1.0], [1.0, 2.0]), 0.95), (([1.0],), 1.0)])
def test_bad_input_is_named(args, level):
    with pytest.raises(ValueError, match="bootstrap: "):
        bootstrap(*args, level=level)
