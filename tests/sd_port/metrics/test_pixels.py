"""What is measured and made without a network."""

import numpy as np
import pytest

from sd_port.metrics.pixels import composited, mean_change, pasted, rmse

SIZE = (64, 80)
rng = np.random.default_rng(0)
A, B = (rng.uniform(size=(*SIZE, 3)).astype(np.float32) for _ in range(2))
MASK = np.zeros(SIZE, np.float32)
MASK[10:30, 20:70] = 1


def test_changes_add_up():
    """The whole is the weighted sum of inside and outside; a composite has none outside."""
    inside, outside, whole = mean_change(A, B, MASK), mean_change(A, B, 1 - MASK), mean_change(A, B)
    share = MASK.mean()
    assert whole == pytest.approx(share * inside + (1 - share) * outside, rel=1e-6)
    assert whole == pytest.approx(float(np.abs(A.astype(float) - B).mean()), rel=1e-6)
    made = composited(A, B, MASK)
    assert mean_change(A, made, 1 - MASK) == 0 and mean_change(B, made, MASK) == 0
    assert mean_change(A, B, np.zeros(SIZE, np.float32)) is None
    np.testing.assert_array_equal(composited(A, B, None), B)


def test_rmse():
    assert rmse(A, A) == 0
    assert rmse(A, A + np.float32(0.25)) == pytest.approx(0.25, rel=1e-6)
    assert rmse(A, B) == pytest.approx(np.sqrt(1 / 6), rel=0.02)  # of two uniform numbers


def test_a_disc_is_pasted():
    """Radius 5 at 64 pixels: the target has the source's pixels, all else is as it was, rims are cut off."""
    handle, target = np.array([[20, 20], [2, 60]]), np.array([[50, 40], [78, 3]])
    found = pasted(A, handle, target)
    expected = A.copy()
    for y in range(64):
        for x in range(80):
            for (hx, hy), (tx, ty) in zip(handle, target, strict=True):
                sx, sy = x - tx + hx, y - ty + hy
                if (x - tx) ** 2 + (y - ty) ** 2 <= 25 and 0 <= sx < 80 and 0 <= sy < 64:
                    expected[y, x] = A[sy, sx]
    np.testing.assert_array_equal(found, expected)
    assert 0 < (found != A).any(axis=-1).sum() < 2 * 81
