"""Fingerprints of arrays: 64 bits that any change of an element changes, the same for every sharding.

A checkpoint may be read on other devices than wrote it, so a digest of each file or shard could not be compared with
what arrives. A sum over all elements can, and each device adds up its own at the speed of its memory.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import PyTree, Shaped, UInt32

# A step per place and the multipliers of a mixer, all odd, for each of two sums of 32 bits.
_LANES = ((0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35), (0x27D4EB2F, 0x7FEB352D, 0x846CA68B))


def fingerprints(tree: PyTree[jax.Array]) -> dict[str, str]:
    """The fingerprint of each array, 16 hexadecimal digits, by its path in the tree.

    Element i of an array with the bits b adds mix(b + step * i), where mix is one to one (the finalizer of MurmurHash3,
    and one with other constants): no change of a single element is missed, and one of many in 2**64.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = jax.device_get(_sums([leaf for _, leaf in leaves]))
    return {
        path_name(path): f"{int(high):08x}{int(low):08x}"
        for (path, _), (high, low) in zip(leaves, sums, strict=True)
    }


def path_name(path: tuple[object, ...]) -> str:
    """A path in a tree as text, such as "params.layers.query": the same for tuples, lists and dicts of their names."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[list[UInt32[jax.Array, ""]]]:
    return [[_sum(leaf, lane) for lane in _LANES] for leaf in leaves]


def _sum(x: Shaped[jax.Array, " ..."], lane: tuple[int, int, int]) -> UInt32[jax.Array, ""]:
    step, first, second = lane
    h = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    for axis in range(h.ndim):
        stride = jnp.uint32(step * math.prod(h.shape[axis + 1 :]) % 2**32)
        h += jax.lax.broadcasted_iota(jnp.uint32, h.shape, axis) * stride
    h = (h ^ (h >> 16)) * jnp.uint32(first)
    h = (h ^ (h >> 13)) * jnp.uint32(second)
    return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)
