"""The cores of a CPU as devices, over which batches are split."""

import os
from contextlib import suppress

import jax
import numpy as np
from jax.sharding import Mesh

from sd_port.hardware import processor
from theory.compilations import ONE_THREAD, set_flags


def split_cpu(devices: int) -> None:
    """Has XLA take the CPU for that many devices, or for as many as it has cores; before the first use of a device.

    Each has one thread: on two cores, two devices with one thread do half as much again as one with two, whose
    threads wait for each other in small products, and a quarter more than two devices with two threads.
    """
    count = min(devices, os.cpu_count() or 1)
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):  # the user's number stands
        with suppress(RuntimeError):  # devices that are in use already stay as they are
            jax.config.update("jax_num_cpu_devices", count)
    set_flags(ONE_THREAD)


def all_devices() -> Mesh:
    """The mesh of all devices, whose axis is the batch."""
    return Mesh(np.array(jax.devices()), ("batch",))


def device_name() -> str:
    """Of the first device; JAX calls every CPU cpu."""
    device = jax.devices()[0]
    return processor() if device.platform == "cpu" else device.device_kind
