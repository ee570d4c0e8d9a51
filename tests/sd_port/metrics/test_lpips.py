"""LPIPS against a transcription in torch with the same random weights, read from the files that torch writes."""

from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch

from sd_port.metrics.lpips import LPIPS, image_fidelity, lpips, read_lpips
from tests.sd_port.torch_lpips import published, state, write_weights
from tests.tolerances import PARITY_32

rng = np.random.default_rng(0)
A, B = (rng.uniform(size=(2, 224, 224, 3)).astype(np.float32) for _ in range(2))


@cache
def expected() -> np.ndarray:
    return published(A, B)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("lpips"))


@pytest.fixture(scope="module")
def weights(files) -> LPIPS:
    return read_lpips(*files)


def test_it_is_the_original(weights):
    """Whole, on a batch; and 0 for the same pictures."""
    found = lpips(weights, jnp.asarray(A), jnp.asarray(B))
    assert found.shape == (2,) and (expected() > 0.1).all()
    np.testing.assert_allclose(found, expected(), rtol=PARITY_32)
    np.testing.assert_array_equal(lpips(weights, jnp.asarray(A), jnp.asarray(A)), 0)


@pytest.mark.parametrize("leaf", ["kernels", "biases", "heads"])
def test_every_layer_counts(weights, leaf):
    """Negative control: half as much again of one channel is seen, in the first layer and in the last."""
    for layer in (0, 4):
        leaves = list(getattr(weights, leaf))
        leaves[layer] = leaves[layer].at[..., 0].multiply(1.5)
        found = lpips(weights._replace(**{leaf: tuple(leaves)}), jnp.asarray(A), jnp.asarray(B))
        assert np.abs(np.asarray(found) / expected() - 1).max() > 1.5 * PARITY_32


def test_image_fidelity_brings_pictures_to_224(weights):
    """As torch's interpolate, which skips pixels where it makes a picture smaller."""
    a, b = (rng.uniform(size=(300, 512, 3)).astype(np.float32) for _ in range(2))
    small = [
        torch.nn.functional.interpolate(torch.from_numpy(image).movedim(-1, 0)[None], (224, 224), mode="bilinear")
        .movedim(1, -1)
        .numpy()
        for image in (a, b)
    ]
    assert image_fidelity(weights, a, b) == pytest.approx(1 - published(*small)[0], rel=PARITY_32)
    assert image_fidelity(weights, a, a) == 1


def test_safetensors_do_too(files, weights, tmp_path):
    safetensors.torch.save_file({name: value.clone() for name, value in state().items()}, tmp_path / "a.safetensors")
    for ours, same in zip(read_lpips(tmp_path / "a.safetensors", files[1]).kernels, weights.kernels, strict=True):
        np.testing.assert_array_equal(ours, same)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"features.3.bias": None}, "there is no features.3.bias"),
        ({"features.3.bias": torch.zeros(5)}, r"features.3.bias has the shape \(5,\)"),
        ({"features.12.bias": torch.zeros(5)}, "has features.12.bias, which is not known here"),
    ],
)
def test_bad_files_are_named(files, tmp_path, change, said):
    values = {name: value for name, value in (state() | change).items() if value is not None}
    torch.save(values, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=f"other.pth: {said}"):
        read_lpips(tmp_path / "other.pth", files[1])
    with pytest.raises(ValueError, match=r"alexnet.pth: there is no lin0.model.1.weight"):
        read_lpips(files[0], files[0])
    with pytest.raises(FileNotFoundError, match=r"none.pth: no such file"):
        read_lpips(tmp_path / "none.pth", files[1])
