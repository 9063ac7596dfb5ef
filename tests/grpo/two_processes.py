"""One of two processes of four devices each: `python two_processes.py PORT RANK DATA GATHER OUT`.

Follows the trajectory of test_update's mini-batches on a mesh over both; rank 0 writes the results.
"""

import pickle
import sys
from pathlib import Path

import jax

port, rank, data, gather, out = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, int(rank))

import test_update  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402

t = test_update.trainer(8, int(data), gather=gather)
state, steps = t.state(), []
for mini in test_update.minibatches(test_update.UNTIED):
    batch = t.batch(mini)
    logprobs = t.logprobs(state.params, batch)
    state, metrics = t.update(state, batch)
    steps.append(multihost_utils.process_allgather((state.params, metrics, logprobs), tiled=True))
if rank == "0":
    with Path(out).open("wb") as file:
        pickle.dump(steps, file)
