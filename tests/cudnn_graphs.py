"""Compiles cuDNN's attention for a GPU that is not here: `python cudnn_graphs.py HARDWARE LENGTH...`.

cuDNN's engines load the CUDA driver's library, which only a machine with a GPU has. They ask it for nothing while they
compile, except for handles of what they have compiled: a stub gives handles to nothing.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

HANDLES = ("cuLibraryLoadData", "cuLibraryGetKernel", "cuLibraryGetModule", "cuKernelGetFunction")
HANDLES += ("cuModuleLoadData", "cuModuleLoadFatBinary", "cuModuleGetFunction")
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


def environment(folder: Path) -> dict[str, str]:
    """Writes the stub there; returns what a process needs in which XLA compiles cuDNN's graphs."""
    (spec,) = find_spec("nvidia").submodule_search_locations
    nvidia = Path(spec)
    cudnn = nvidia / "cudnn" / "lib"
    names = re.findall(
        rb"\0(cu[A-Z][a-z]+[A-Z]\w+)(?=\0)", (cudnn / "libcudnn_engines_runtime_compiled.so.9").read_bytes()
    )
    lines = ["static long nothing[64];"]
    for name in sorted({name.decode() for name in names} | {"cuInit", "cuGetProcAddress", *HANDLES}):
        if name in HANDLES:
            lines.append(f"int {name}(void **handle) {{ *handle = nothing; return 0; }}")
        else:
            lines.append(f"int {name}() {{ return {0 if name.startswith('cuCtx') else NO_DEVICE}; }}")
    source = folder / "stub.c"
    source.write_text("\n".join(lines))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / "libcuda.so.1", source], check=True)
    libraries = [cudnn, folder, *(nvidia / name / "lib" for name in ("cuda_nvrtc", "cublas", "cuda_runtime"))]
    flag = "--xla_gpu_cudnn_deviceless_compilation_mode=CUDNN_DEVICELESS_COMPILATION_ALWAYS"
    return {
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
        "LD_PRELOAD": str(cudnn / "libcudnn.so.9"),
        "XLA_FLAGS": flag,
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
    }


def main() -> None:
    """Prints a JSON list of the bytes of workspace of each graph, by length: forward, backward."""
    import jax
    import jax.numpy as jnp

    from jaxrl import aot
    from jaxrl.models import attention

    (device,) = aot.devices(sys.argv[1], 1)
    sharding = jax.sharding.SingleDeviceSharding(device)
    found = []
    for length in map(int, sys.argv[2:]):
        batch = max(1, attention.TRIP // length)

        def array(*shape: int, dtype: type = jnp.bfloat16) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        q, k = array(batch, length, 12, 128), array(batch, length, 2, 128)
        lengths = array(batch, dtype=jnp.int32)
        lse = array(batch, length, 12, dtype=jnp.float32)
        programs = [
            jax.jit(attention._cudnn_forward).lower(q, k, k, lengths),
            jax.jit(attention._cudnn_backward).lower(q, k, k, q, lse, q, lengths),
        ]
        for program in programs:
            (call,) = [line for line in program.compile().as_text().splitlines() if "__cudnn$fmha" in line]
            found.append(int(re.findall(r"u8\[(\d+)\]", call)[0]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
