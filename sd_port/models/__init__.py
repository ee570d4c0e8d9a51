"""Stable Diffusion's networks as nnx modules: images NHWC, no input or output."""
