"""How programs are traced and compiled: in less time, kept between runs, for which device; and how many there are.

Commands set flags of XLA before they load JAX, so it is loaded where it is used.
"""

import atexit
import gc
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

# XLA ends the process at a flag that it does not know: each is set only where jaxlib was seen to know it.
OLD_EMITTERS = "--xla_cpu_use_fusion_emitters=false"
# The default schedule for the CPU needs eight times the temporary memory for a UNet, at the same speed.
LITTLE_MEMORY = "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"
KNOWN_TO = {
    OLD_EMITTERS: {"0.10.0", "0.10.1", "0.10.2", "0.11.0"},
    LITTLE_MEMORY: {"0.10.0", "0.10.1", "0.10.2", "0.11.0", "0.11.1", "0.11.2", "0.12.0", "0.12.0.1"},
    ONE_THREAD: {"0.10.0", "0.10.1", "0.10.2", "0.11.0", "0.11.1", "0.11.2", "0.12.0", "0.12.0.1"},
}


def set_flags(*flags: str) -> None:
    """Adds those that the installed jaxlib knows to XLA_FLAGS, whose own words come last, and so stand.

    Before the first use of a device. What is there already is not added again: kept programs are found by all of
    XLA_FLAGS. Raises KeyError for a flag that is not in KNOWN_TO.
    """
    there = os.environ.get("XLA_FLAGS", "")
    known = [flag for flag in flags if version("jaxlib") in KNOWN_TO[flag]]
    os.environ["XLA_FLAGS"] = " ".join([*(flag for flag in known if flag not in there.split()), there]).strip()


def collect_rarely() -> None:
    """Has Python's collector look for garbage a hundred times less often, and not when the process ends.

    Modules that load and programs that are traced are hardly ever garbage; to look for it took a tenth of the time.
    """
    gc.set_threshold(100_000, 20, 10)
    atexit.register(gc.freeze)


def stay_on_cpu() -> None:
    """Leaves GPUs and their memory alone, unless JAX_PLATFORMS says otherwise. Before the first use of a device."""
    import jax

    if not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")


def keep_compilations() -> None:
    """Keeps every compiled program under the user's cache folder, unless a place is set already.

    JAX_COMPILATION_CACHE_DIR, or jax's option of that name, says where; the empty string switches it off.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blessing" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def compile_hastily(hastily: bool = True) -> None:
    """Has XLA leave out what takes it long: programs compile in less than half the time and run more slowly.

    For small work, and for tests. Programs that are compiled already stay as they are.
    """
    import jax

    jax.config.update("jax_disable_most_optimizations", hastily)


@contextmanager
def traces() -> Iterator[Counter[str]]:
    """How many programs JAX makes of each function inside the block, by the function's name: new ones, none kept.

    with traces() as count:
        sample(...)
    assert count["_advance"] == 1
    """
    from jax import monitoring

    count: Counter[str] = Counter()

    def listen(event: str, duration_secs: float, **what: str | int) -> None:
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            count[re.sub(r"^jit\((.*)\)$", r"\1", str(what["fun_name"]))] += 1

    monitoring.register_event_duration_secs_listener(listen)
    try:
        yield count
    finally:
        monitoring.unregister_event_duration_listener(listen)
