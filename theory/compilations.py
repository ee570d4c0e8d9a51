"""Compiling takes longer than most of what is compiled: programs kept between runs, and compiled in less time."""

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


def compile_quickly(*, hastily: bool = False) -> None:
    """Has XLA compile the theory's programs for CPUs in two thirds of the time, by its older emitters.

    Networks take longer so. hastily: everything in a third of the time, programs that run more slowly, for small work.
    Before the first use of a device. What XLA_FLAGS says already stands.
    """
    flags = "--xla_cpu_use_fusion_emitters=false"
    if hastily:
        flags += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"
