"""The three mean distances against their definitions, pixel by pixel, with torch's interpolation."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sd_port.metrics.distance import (
    _nearest,
    discs,
    dragdiffusion_distance,
    draglora_distance,
    matches,
    nearest,
    regiondrag_distance,
    similarity,
)
from tests.tolerances import PARITY_32, ROUNDING_32

SIZE, MAP = (39, 52), (5, 7, 6)
rng = np.random.default_rng(0)
SOURCE, EDITED = (rng.normal(size=MAP).astype(np.float32) for _ in range(2))
HANDLE = np.stack([rng.integers(0, n, 12) for n in SIZE[::-1]], axis=1)
TARGET = np.stack([rng.integers(0, n, 12) for n in SIZE[::-1]], axis=1)
TARGET[0] = HANDLE[0] + (1, -1)  # closer than the least radius of a disc
MASK = np.zeros(SIZE, np.float32)
MASK[10:30, 20:40] = 1


def enlarged(features: np.ndarray, mode: str) -> np.ndarray:
    """(height, width, channels) in float64, by torch."""
    rows = torch.nn.functional.interpolate(torch.from_numpy(features).double().movedim(-1, 0)[None], SIZE, mode=mode)
    return rows[0].movedim(0, -1).numpy()


def searched(mode: str, allowed) -> list[tuple[int, int]]:
    """The match [x, y] of every handle, by looking at all pixels in turn."""
    source, edited = enlarged(SOURCE, mode), enlarged(EDITED, mode)
    found = []
    for pair, (x, y) in enumerate(HANDLE):
        wanted, best, place = source[y, x], -2.0, (-1, -1)
        for row in range(SIZE[0]):
            for column in range(SIZE[1]):
                if allowed(pair, column, row):
                    here = edited[row, column]
                    cosine = here @ wanted / np.sqrt((here @ here) * (wanted @ wanted))
                    if cosine > best + 1e-12:  # the first of equals
                        best, place = cosine, (column, row)
        found.append(place)
    return found


def anywhere(pair, x, y) -> bool:
    return True


def in_mask(pair, x, y) -> bool:
    return MASK[y, x] == 1


def near(pair, x, y) -> bool:
    """RegionDrag's discs, by its own formula."""
    radius = max(np.linalg.norm(HANDLE[pair] - TARGET[pair]) / 2**0.5, 5)
    return any(np.hypot(*(np.array([x, y]) - point)) < radius - 1e-9 for point in (HANDLE[pair], TARGET[pair]))


def maps() -> tuple:
    return jnp.asarray(SOURCE), jnp.asarray(EDITED)


def test_dragdiffusion():
    expected = np.linalg.norm(np.array(searched("bilinear", anywhere)) - TARGET, axis=1)
    found = dragdiffusion_distance(*maps(), HANDLE, TARGET, SIZE)
    np.testing.assert_allclose(found, expected, rtol=ROUNDING_32)


def test_draglora():
    expected = np.linalg.norm(np.array(searched("bilinear", in_mask)) - TARGET, axis=1)
    np.testing.assert_allclose(draglora_distance(*maps(), HANDLE, TARGET, MASK), expected, rtol=ROUNDING_32)
    everywhere = draglora_distance(*maps(), HANDLE, TARGET, np.ones_like(MASK))
    np.testing.assert_array_equal(everywhere, dragdiffusion_distance(*maps(), HANDLE, TARGET, SIZE))
    with pytest.raises(ValueError, match="the mask is black"):
        draglora_distance(*maps(), HANDLE, TARGET, np.zeros_like(MASK))


def test_regiondrag():
    way = np.array(searched("nearest", near)) - TARGET
    expected = np.linalg.norm(way / (SIZE[1], SIZE[0]), axis=1)
    np.testing.assert_allclose(regiondrag_distance(*maps(), HANDLE, TARGET, SIZE), expected, rtol=ROUNDING_32)


@pytest.mark.parametrize(
    ("mode", "allowed"),
    [("nearest", anywhere), ("bilinear", in_mask), ("bilinear", near)],
    ids=["nearest", "mask", "near"],
)
def test_definitions_differ(mode, allowed):
    """Negative control: the search sees another enlargement, and another place to look."""
    found = matches(*maps(), jnp.asarray(HANDLE), SIZE, "bilinear")
    assert (np.asarray(found) != searched(mode, allowed)).any()


@pytest.mark.parametrize("shift", [(0, 0), (16, 8)])
def test_a_moved_picture_is_found_where_it_went(shift):
    """What is a known number of feature pixels away is at a known distance: of a drag that succeeded it is zero."""
    x, y = shift
    moved = np.roll(rng.normal(size=(8, 8, 16)).astype(np.float32), (0, 0), (0, 1))
    edited = jnp.asarray(np.roll(moved, (y // 8, x // 8), (0, 1)))
    handle = np.array([[12, 12], [28, 20]])
    args = jnp.asarray(moved), edited, handle, handle + np.array(shift), (64, 64)
    np.testing.assert_array_equal(dragdiffusion_distance(*args), 0)
    stays = dragdiffusion_distance(*args[:3], handle, (64, 64))
    np.testing.assert_allclose(stays, np.hypot(x, y), rtol=ROUNDING_32)


def test_a_rim_is_outside():
    """At a distance of exactly the radius, 10 for a way of (10, 10), whatever rounding says."""
    inside = np.asarray(discs(np.array([[20, 20]]), np.array([[30, 30]]), (50, 50)))[0]
    assert not inside[20, 10] and inside[20, 11] and not inside[30, 40] and inside[30, 39]


def test_similarity_is_whole_however_it_is_computed():
    """By rows, or of an enlarged map at once."""
    wanted = jnp.asarray(SOURCE[0, :3])
    for mode in ("bilinear", "nearest"):
        whole = enlarged(EDITED, mode)
        lengths = np.linalg.norm(whole, axis=-1) * np.linalg.norm(wanted, axis=-1)[:, None, None]
        expected = np.einsum("nc,hwc->nhw", wanted, whole) / lengths
        np.testing.assert_allclose(similarity(wanted, jnp.asarray(EDITED), SIZE, mode), expected, atol=PARITY_32)


def test_nearest_is_torchs():
    """Rounding included, for every size up to 800; and of pictures."""
    for old in (3, 48, 85, 333, 512, 640):
        for new in range(1, 800, 7):
            line = torch.arange(old, dtype=torch.float32)[None, None]
            theirs = torch.nn.functional.interpolate(line, size=(new,), mode="nearest")[0, 0].numpy()
            np.testing.assert_array_equal(_nearest(old, new), theirs)
    np.testing.assert_array_equal(nearest(EDITED, SIZE), enlarged(EDITED, "nearest"))
