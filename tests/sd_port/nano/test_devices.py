"""How a CPU is taken for several devices."""

import os

import jax

from sd_port.nano.devices import split_cpu
from theory.compilations import ONE_THREAD, set_flags


def test_a_device_for_each_core_at_most(monkeypatch):
    """Set for jax, which is asked before its first device; each has one thread, where this jaxlib knows how."""
    asked = {}
    monkeypatch.setattr(type(jax.config), "update", lambda config, name, value: asked.update({name: value}))
    monkeypatch.setenv("XLA_FLAGS", "")
    set_flags(ONE_THREAD)
    expected = os.environ["XLA_FLAGS"]
    for wanted in (1, 1000):
        monkeypatch.setenv("XLA_FLAGS", "")
        split_cpu(wanted)
        assert asked == {"jax_num_cpu_devices": min(wanted, os.cpu_count() or 1)}
        assert os.environ["XLA_FLAGS"] == expected


def test_the_user_s_number_stands(monkeypatch):
    """XLA_FLAGS says how many devices there are: jax is not asked for another number, which would win."""
    asked = []
    monkeypatch.setattr(type(jax.config), "update", lambda config, *what: asked.append(what))
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    split_cpu(2)
    assert asked == [] and os.environ["XLA_FLAGS"].endswith("--xla_force_host_platform_device_count=3")
