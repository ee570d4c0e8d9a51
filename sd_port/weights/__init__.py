"""Weights files in and out: diffusers folders, single files, LoRA files, Hub ids."""
