"""Compiled programs kept between runs: compiling takes longer than most of what is compiled."""

import os
from pathlib import Path

import jax


def keep_compilations() -> None:
    """Keeps every compiled program under the user's cache folder, unless a place is set already.

    JAX_COMPILATION_CACHE_DIR, or jax's option of that name, says where; the empty string switches it off.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blessing" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
