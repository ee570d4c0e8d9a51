"""Convolution, in the form that is fastest where it runs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def conv(
    x: Float[Array, "batch height width in_channels"],
    kernel: Float[Array, "k k in_channels out_channels"],
    stride: int,
    padding: tuple[int, int],
) -> Float[Array, "batch new_height new_width out_channels"]:
    """Cross-correlation with padding (before, after) on both axes, as torch's conv2d."""
    if kernel.shape[:2] == (1, 1) and stride == 1 and padding == (0, 0):
        return x @ kernel[0, 0]
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), (padding, padding), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
