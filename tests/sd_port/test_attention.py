"""Every form of attention against torch's, and when each is chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sd_port.models import attention
from sd_port.models.attention import KeysValues, causal, choose, chunked, mapped, plain
from tests.sd_port.torch_models import distance
from tests.tolerances import PARITY_16, PARITY_32

pytestmark = pytest.mark.hasty

rng = np.random.default_rng(0)


def compiled(form, q, k, v):
    """One program; a new one each time, as the tests change how long a chunk is."""
    return jax.jit(lambda q, k, v: form(q, KeysValues(k, v)))(*map(jnp.asarray, (q, k, v)))


def inputs(batch=2, queries=37, keys=21, heads=3, dim=8):
    sizes = queries, keys, keys
    return tuple(rng.normal(size=(batch, n, heads, dim)).astype(np.float32) for n in sizes)


def torch_attention(q, k, v, **options):
    q, k, v = (torch.from_numpy(x).transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).numpy()


@pytest.mark.parametrize("form", [plain, mapped, chunked])
@pytest.mark.parametrize("chunk", [5, 10**6])
def test_forms(form, chunk, monkeypatch):
    """Whole, and in chunks that do not divide the queries; keys in another order are told apart only by values."""
    monkeypatch.setattr(attention, "MAPPED_QUERIES", chunk)
    monkeypatch.setattr(attention, "CHUNKED_LOGITS", chunk * 2 * 3 * 21)
    q, k, v = inputs()
    expected = torch_attention(q, k, v)
    got = compiled(form, q, k, v)
    assert distance(got, expected) < PARITY_32
    turned = compiled(form, q, k[:, ::-1], v)
    assert distance(turned, expected) > 0.1


def test_causal():
    q, k, v = inputs(queries=9, keys=9)
    got = compiled(causal, q, k, v)
    assert distance(got, torch_attention(q, k, v, is_causal=True)) < PARITY_32
    assert distance(got, torch_attention(q, k, v)) > 0.1


@pytest.mark.parametrize("form", [plain, mapped])
def test_large_logits_do_not_overflow(form):
    """Logits of a thousand, as a trained network may have: the softmax subtracts the largest first."""
    q, k, v = inputs()
    got = compiled(form, 100 * q, 100 * k, v)
    assert distance(got, torch_attention(100 * q, 100 * k, v)) < 1e-3  # float32 logits of 1e4 are good to 1e-3
    assert np.isfinite(got).all()


@pytest.mark.parametrize("form", [plain, mapped, chunked])
def test_half_precision_keeps_its_softmax_in_float32(form):
    q, k, v = inputs(keys=500)
    half = [jnp.asarray(x.astype(jnp.bfloat16)) for x in (q, k, v)]
    got = form(half[0], KeysValues(*half[1:]))  # not as one program, in which XLA may leave roundings out
    assert got.dtype == jnp.bfloat16
    assert distance(got, torch_attention(q, k, v)) < PARITY_16


def test_gradients():
    q, k, v = inputs()

    def gradient(form):
        return lambda q, kv: jax.grad(lambda q: (form(q, kv) ** 2).sum())(q)

    grads = [compiled(gradient(form), q, k, v) for form in (plain, mapped, chunked)]
    assert distance(grads[1], grads[0]) < PARITY_32
    assert distance(grads[2], grads[0]) < PARITY_32


@pytest.mark.parametrize(
    ("backend", "dtype", "q", "tokens", "dim", "expected"),
    [
        ("cpu", "float32", (2, 4096, 8, 40), 4096, 0, "mapped"),
        ("cpu", "float32", (2, 4096, 8, 40), 8, 0, "plain"),
        ("cpu", "float32", (2, 64, 8, 160), 64, 0, "plain"),
        ("gpu", "bfloat16", (2, 4096, 8, 40), 4096, 256, "cudnn"),
        ("gpu", "float16", (2, 256, 8, 160), 256, 256, "cudnn"),
        ("gpu", "bfloat16", (2, 256, 8, 160), 256, 128, "plain"),  # an A100 has no heads of 160
        ("gpu", "float32", (2, 4096, 8, 40), 4096, 256, "plain"),
        ("gpu", "float32", (2, 16384, 8, 40), 16384, 256, "chunked"),  # 1024 pixels: 17 GB of logits
        ("gpu", "bfloat16", (1, 16384, 1, 512), 16384, 256, "plain"),  # the VAE: no such heads in cuDNN
        ("tpu", "bfloat16", (2, 16384, 8, 40), 16384, 0, "chunked"),
    ],
)
def test_choice(backend, dtype, q, tokens, dim, expected):
    assert choose(backend, dtype, q, tokens, dim) == expected
