"""The cores of a CPU as devices, over which batches are split."""

import os

import jax
import numpy as np
from jax.sharding import Mesh

from sd_port.hardware import processor


def split_cpu(devices: int) -> None:
    """Has XLA take the CPU for that many devices, or for as many as it has cores; before the first use of a device.

    Each has one thread: on two cores, two devices with one thread do half as much again as one with two, whose
    threads wait for each other in small products, and a quarter more than two devices with two threads.
    """
    count = min(devices, os.cpu_count() or 1)
    flags = f"--xla_force_host_platform_device_count={count} --xla_cpu_multi_thread_eigen=false"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"


def all_devices() -> Mesh:
    """The mesh of all devices, whose axis is the batch."""
    return Mesh(np.array(jax.devices()), ("batch",))


def device_name() -> str:
    """Of the first device; JAX calls every CPU cpu."""
    device = jax.devices()[0]
    return processor() if device.platform == "cpu" else device.device_kind
