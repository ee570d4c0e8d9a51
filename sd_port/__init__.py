"""Stable Diffusion 1.5 in Flax NNX, sampled and edited by the solvers of `theory`."""
