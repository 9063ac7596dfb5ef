"""Makes the model on the device, and measures the device's best rates; see benchmarks/update_gpu.py."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxrl.models import Config, Model, initialize, save

folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
REPEATS = 20


def seconds(function: Callable[..., jax.Array], *arguments: jax.Array) -> float:
    """Seconds of a call, in a row of many."""
    jax.block_until_ready(function(*arguments))
    began = time.perf_counter()
    for _ in range(REPEATS):
        result = function(*arguments)
    jax.block_until_ready(result)
    return (time.perf_counter() - began) / REPEATS


for _ in sys.stdin:
    config, tokens = Config(**settings["model"]), settings["stream"]
    save(Model(config, initialize(config, 0)), folder / "model", dtype=settings["dtype"])
    x, w, square = (
        jax.random.normal(jax.random.key(0), shape, settings["dtype"])
        for shape in ((tokens, config.width), (config.mlp_width, config.width), (settings["square"],) * 2)
    )
    matmul, mlp = jax.jit(jnp.matmul), jax.jit(functools.partial(jnp.einsum, "ni,oi->no"))
    found = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "matmul_flops": 2 * settings["square"] ** 3 / seconds(matmul, square, square),
        "mlp_flops": 2 * tokens * w.size / seconds(mlp, x, w),
        "copy_bytes": 2 * square.nbytes / seconds(jax.jit(jnp.negative), square),
    }
    print(json.dumps(found), flush=True)
