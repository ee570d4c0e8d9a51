"""A generator for CPUs: JAX's own, threefry2x32, with its rounds unrolled. Same numbers, twice as fast.

    key = jr.key(0, impl=unrolled_threefry)     # then as any key; jr.normal(key) == jr.normal(jr.key(0))

On a CPU JAX rolls the rounds into a loop, which compiles faster and passes over memory five times. Unrolled they are
elementwise, so XLA fuses them with what is done to the noise: with the solver step, in `theory.solve.sample`.
"""

import math

import jax.numpy as jnp
from jax.extend.random import define_prng_impl, threefry_prng_impl
from jaxtyping import Array, UInt32

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
PARITY = 0x1BD11BDA
Words = UInt32[Array, "*shape"]


def threefry2x32(key: UInt32[Array, "2"], high: Words, low: Words) -> tuple[Words, Words]:
    """The block cipher with 20 rounds. Salmon et al. 2011 (doi 10.1145/2063384.2063405), Sec. 3.3."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(PARITY))
    high, low = high + schedule[0], low + schedule[1]
    for i in range(5):
        for r in ROTATIONS[i % 2]:
            high = high + low
            low = high ^ ((low << r) | (low >> (32 - r)))
        high, low = high + schedule[(i + 1) % 3], low + schedule[(i + 2) % 3] + jnp.uint32(i + 1)
    return high, low


def _random_bits(key: UInt32[Array, "2"], bit_width: int, shape: tuple[int, ...]) -> Array:
    """The bits of `jax.random.bits`: the cipher of 0, 1, 2, ..., as with jax_threefry_partitionable, the default."""
    size = math.prod(shape)
    if size > 2**32:
        raise NotImplementedError(f"unrolled_threefry draws up to 2**32 numbers at once, got the shape {shape}")
    count = jnp.arange(size, dtype=jnp.uint32).reshape(shape)
    high, low = threefry2x32(key, jnp.zeros_like(count), count)
    if bit_width == 64:
        return (high.astype(jnp.uint64) << 32) | low.astype(jnp.uint64)
    return (high ^ low).astype(f"uint{bit_width}")


unrolled_threefry = define_prng_impl(
    key_shape=(2,),
    seed=threefry_prng_impl.seed,
    split=threefry_prng_impl.split,
    fold_in=threefry_prng_impl.fold_in,
    random_bits=_random_bits,
    name="unrolled_threefry",
    tag="utf",
)
