"""Diffusion processes, solvers and the contraction theorems, on exact Gaussian mixtures."""
