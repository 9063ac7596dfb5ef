"""Vendor specifications."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One device, by its vendor's data sheet."""

    flops: float  # dense bf16 FLOP/s
    bandwidth: float  # bytes/s of device memory
    memory: float  # bytes
    nvlink: float  # bytes/s in each direction to the other devices of a node of 8; ICI of a TPU
    network: float  # bytes/s in each direction to other nodes, in its vendor's 8-device systems; DCN of a TPU

    @property
    def vector_flops(self) -> float:
        """Elementwise operations/s: A100's and H100's float32 rates outside of tensor cores, a FMA being one."""
        return self.flops / 32


# Sources: docs/planning.md.
HARDWARE = {
    "A100": Hardware(312e12, 2.039e12, 80e9, 300e9, 25e9),
    "A800": Hardware(312e12, 2.039e12, 80e9, 200e9, 25e9),
    "H100": Hardware(989e12, 3.35e12, 80e9, 450e9, 50e9),
    "H200": Hardware(989e12, 4.8e12, 141e9, 450e9, 50e9),
    "B200": Hardware(2250e12, 8.0e12, 180e9, 900e9, 50e9),
    "v5p": Hardware(459e12, 2.765e12, 95e9, 600e9, 6.25e9),
    "v6e": Hardware(918e12, 1.638e12, 32e9, 400e9, 12.5e9),
}
