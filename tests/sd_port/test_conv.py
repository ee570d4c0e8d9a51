"""Every form of the convolution against torch, with its gradients, and when each is chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sd_port.models import conv as module
from sd_port.models.conv import conv, conv_upsampled, gathered, library, winograd, winograd_upsampled
from tests.sd_port.torch_models import distance, to_nchw, to_nhwc
from tests.tolerances import PARITY_32

pytestmark = pytest.mark.hasty

rng = np.random.default_rng(0)


def compiled(form, *arrays, options=()):
    """One program; a new one each time, as the tests change how long a strip is."""
    return jax.jit(lambda *arrays: form(*arrays, *options))(*map(jnp.asarray, arrays))


def inputs(batch=2, height=8, width=10, channels=5, outputs=6, size=3):
    shapes = (batch, height, width, channels), (size, size, channels, outputs)
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in shapes)


def torch_conv(x, kernel, stride=1, padding=(1, 1), double=False):
    image = to_nchw(x)
    if double:
        image = torch.nn.functional.interpolate(image, scale_factor=2.0, mode="nearest")
    image = torch.nn.functional.pad(image, padding * 2)
    return to_nhwc(torch.nn.functional.conv2d(image, torch.from_numpy(kernel).permute(3, 2, 0, 1), stride=stride))


@pytest.mark.parametrize("padding", [(1, 1), (0, 1)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("form", [library, gathered, conv])
def test_strides_and_paddings(form, stride, padding):
    x, kernel = inputs(height=9)
    got = compiled(form, x, kernel, options=(stride, padding))
    assert distance(got, torch_conv(x, kernel, stride, padding)) < PARITY_32
    assert distance(got, torch_conv(x, kernel[::-1].copy(), stride, padding)) > 0.1


@pytest.mark.parametrize("size", [(8, 10), (7, 9), (1, 2)])
def test_winograd(size):
    x, kernel = inputs(height=size[0], width=size[1])
    assert distance(compiled(winograd, x, kernel), torch_conv(x, kernel)) < PARITY_32


@pytest.mark.parametrize("size", [(8, 10), (7, 3)])
def test_winograd_upsampled(size):
    x, kernel = inputs(height=size[0], width=size[1])
    got = compiled(winograd_upsampled, x, kernel)
    assert distance(got, torch_conv(x, kernel, double=True)) < PARITY_32


@pytest.mark.parametrize("strip", [1, 150, 400])
def test_strips_of_large_images(strip, monkeypatch):
    """However the image is cut, the result is that of the whole; a strip is at least one row of tiles."""
    monkeypatch.setattr(module, "STRIP", strip)
    x, kernel = inputs(height=11)
    assert distance(compiled(winograd, x, kernel), torch_conv(x, kernel)) < PARITY_32
    got = compiled(winograd_upsampled, x, kernel)
    assert distance(got, torch_conv(x, kernel, double=True)) < PARITY_32


@pytest.mark.parametrize("size", [(16, 20), (15, 19), (16, 19)])
def test_upsampling_crops_before_the_convolution(size):
    """The border that is left is followed by zeros, not by the pixels that were cropped."""
    x, kernel = inputs()
    doubled = x.repeat(2, 1).repeat(2, 2)[:, : size[0], : size[1]]
    got = compiled(conv_upsampled, x, kernel, options=size)
    assert got.shape[1:3] == size
    assert distance(got, torch_conv(doubled, kernel)) < PARITY_32


@pytest.mark.parametrize(
    ("shape", "outputs", "stride", "expected"),
    [
        ((1, 64, 64, 320), 320, 1, "winograd"),
        ((2, 16, 16, 1280), 1280, 1, "winograd"),
        ((1, 16, 16, 1280), 1280, 1, "gathered"),
        ((1, 8, 8, 2560), 1280, 1, "gathered"),
        ((1, 16, 16, 1280), 1280, 2, "gathered"),
        ((1, 64, 64, 320), 320, 2, "library"),
        ((1, 64, 64, 4), 320, 1, "library"),
        ((2, 8, 8, 32), 32, 1, "library"),
    ],
)
def test_the_choice_on_a_cpu(shape, outputs, stride, expected, monkeypatch):
    """The shapes of SD 1.5: which form is traced."""
    chosen = []
    for name in ("winograd", "gathered", "library"):
        form = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, form=form, name=name: (chosen.append(name), form(*a))[1])
    args = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((3, 3, shape[-1], outputs), jnp.float32)
    jax.eval_shape(lambda x, k: conv(x, k, stride, (1, 1)), *args)
    assert chosen == [expected]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    jax.eval_shape(lambda x, k: conv(x, k, stride, (1, 1)), *args)
    assert chosen == [expected, "library"]


@pytest.mark.parametrize("form", [winograd, winograd_upsampled, lambda x, k: gathered(x, k, 1, (1, 1))])
def test_gradients(form):
    """Of the sum of squares, for image and kernel, against torch's autograd."""
    x, kernel = inputs(height=4, width=6)
    got = compiled(jax.grad(lambda x, k: (form(x, k) ** 2).sum(), (0, 1)), x, kernel)
    image, weight = to_nchw(x).requires_grad_(), torch.from_numpy(kernel).permute(3, 2, 0, 1).requires_grad_()
    double = form is winograd_upsampled
    big = torch.nn.functional.interpolate(image, scale_factor=2.0, mode="nearest") if double else image
    (torch.nn.functional.conv2d(big, weight, padding=1) ** 2).sum().backward()
    assert distance(got[0], to_nhwc(image.grad)) < PARITY_32
    assert distance(got[1], weight.grad.permute(2, 3, 1, 0).numpy()) < PARITY_32
