"""Compiling for GPUs and TPUs that this machine does not have.

XLA's compilers need neither a driver nor a device, only a description of one. JAX has them where the extras `cuda` and
`tpu` are installed; nothing is allocated, and what is compiled cannot run here.
"""

from __future__ import annotations

import importlib.util
import os

import jax
from jax.experimental import topologies

from jaxrl.errors import InputError

_COMMON = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  threads_per_core_limit: 2048 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0" dnn_version: "9.10.0"
"""
_AMPERE = """
  shared_memory_per_core: 167936 core_count: 108 fpus_per_core: 64 l2_cache_size: 41943040 clock_rate_ghz: 1.41
  memory_bandwidth: 2039040000000 device_memory_size: 97843937280 shared_memory_per_block_optin: 166912
  cuda_compute_capability { major: 8 }
"""
_HOPPER = """
  shared_memory_per_core: 233472 core_count: 132 fpus_per_core: 128 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
"""
# What XLA has to know of a GPU (openxla/xla, xla/backends/gpu/target_config/specs). It plans with 80% of
# `device_memory_size`, and a trainer takes 92% of a GPU: so this is 0.92 / 0.8 of what the GPU has.
TARGETS = {
    "A100": _AMPERE + 'name: "NVIDIA A100-SXM4-80GB"',
    "A800": _AMPERE + 'name: "NVIDIA A800-SXM4-80GB"',
    "H100": _HOPPER
    + 'memory_bandwidth: 3352320000000 device_memory_size: 97684425932 name: "NVIDIA H100 80GB HBM3"',
    "H200": _HOPPER + 'memory_bandwidth: 4800000000000 device_memory_size: 172626362368 name: "NVIDIA H200"',
}
# Slices of eight chips, and what libtpu calls their shape.
TPUS = {"v5p": "v5p:2x2x2", "v6e": "v6e:2x4"}


def available(hardware: str) -> bool:
    """Whether its compiler is installed, and knows the device."""
    needs = ("libtpu",) if hardware in TPUS else ("jax_cuda12_plugin", "jax_cuda13_plugin")
    return hardware in {*TARGETS, *TPUS} and any(importlib.util.find_spec(name) for name in needs)


def devices(hardware: str, count: int, hosts: int = 1) -> list[jax.Device]:
    """Abstract devices, for meshes of abstract arrays.

    Args:
      hardware: one of TARGETS or TPUS.
      count: of devices on all hosts together; of TPUs, up to eight.
      hosts: that they are evenly on; of TPUs, one.

    Raises:
      InputError: if its compiler is not installed here.
    """
    if not available(hardware):
        extra = "tpu" if hardware in TPUS else "cuda"
        raise InputError(f"no compiler for {hardware} here; pip install 'jaxrl[{extra}]' brings it")
    if hardware in TPUS:
        # asks no metadata server which TPU this host has, and shares libtpu with other processes
        alone = {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }
        os.environ.update(alone)
        found = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[hardware])
    else:
        target = f'{_COMMON}{TARGETS[hardware]}\n}}\nplatform_name: "CUDA"\ndnn_version_info {{ major: 9 minor: 10 }}\n'
        topology = f"1x{hosts}x{count // hosts}"
        found = topologies.get_topology_desc(platform="cuda", target_config=target, topology=topology)
    return list(found.devices)[:count]
