"""Seconds to save and to restore a checkpoint, with and without its fingerprints: `python -m benchmarks.checkpoint`.

The state is parameters and both moments in float32, random, of DeepSeek-R1-Distill-Qwen-1.5B's widths and of as many
layers and words as asked for. The variants take turns. A save lasts until all is on disk, a restore until all is on the
device; a run waits for less, since it goes on while a checkpoint is written.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar
from unittest import mock

import jax

from benchmarks.harness import write_results
from jaxrl import checkpoint, config
from jaxrl.checkpoint import Checkpoints
from jaxrl.fingerprint import fingerprints
from jaxrl.grpo.update import TrainState, init_state, make_optimizer
from jaxrl.models import decoder
from jaxrl.parallel.mesh import abstract_sharded, make_mesh
from jaxrl.plan import KNOWN
from jaxrl.types import JsonObject

T = TypeVar("T")
NAMES = ("save", "save without", "restore", "restore without", "fingerprints")
MODEL = KNOWN["deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", help="where checkpoints go; default: the system's for temporary files")
    parser.add_argument("--layers", type=int, default=1, help=f"of {MODEL.layers}")
    parser.add_argument("--words", type=int, default=8192, help=f"of {MODEL.vocab_size:,}")
    parser.add_argument("--repeats", type=int, default=5, help="of each variant")
    options = parser.parse_args()
    model = dataclasses.replace(MODEL, layers=options.layers, vocab_size=options.words)
    mesh = make_mesh()
    state = init_state(decoder.initialize(model, 0), make_optimizer(config.Optimizer()), mesh)
    leaves = jax.tree.leaves(state)
    size = sum(leaf.nbytes for leaf in leaves)
    with tempfile.TemporaryDirectory(prefix="jaxrl-checkpoint-", dir=options.folder) as folder:
        seconds = measure(state, Path(folder), options.repeats)
    median = {name: statistics.median(found) for name, found in seconds.items()}
    ratios = {
        "save": median["save"] / median["save without"],
        "restore": median["restore"] / median["restore without"],
    }
    print(f"{size / 1e9:.2f} GB in {len(leaves)} arrays, {options.repeats} of each in turn")
    for name, found in seconds.items():
        print(f"{name:<16}{median[name]:6.2f} s  ({min(found):.2f} to {max(found):.2f})")
    print(f"with over without: save {ratios['save']:.2f}, restore {ratios['restore']:.2f}")
    device = jax.devices()[0].device_kind
    setting = {"device": device, "jax": jax.__version__, "layers": options.layers, "words": options.words}
    record: JsonObject = {"setting": setting, "bytes": size, "seconds": seconds, "median": median}
    print(f"written to {write_results('checkpoint', record | {'with_over_without': ratios})}")


def measure(state: TrainState, folder: Path, repeats: int) -> dict[str, list[float]]:
    """Seconds of each variant, by name. A first turn, which compiles, is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    like = abstract_sharded(state, make_mesh())
    checkpoints = Checkpoints(folder / "checkpoints", keep_last=1)

    def save(step: int) -> None:
        checkpoints.save(step, state, config.Recipe())
        checkpoints._manager.wait_until_finished()

    def restore(step: int) -> None:
        jax.block_until_ready(checkpoints.restore(step, like))

    for turn in range(repeats + 1):
        with without_fingerprints():
            seconds["save without"].append(timed(save, 2 * turn))
        seconds["save"].append(timed(save, 2 * turn + 1))
        with without_fingerprints():
            seconds["restore without"].append(timed(restore, 2 * turn + 1))
        seconds["restore"].append(timed(restore, 2 * turn + 1))
        seconds["fingerprints"].append(timed(fingerprints, state))
    checkpoints.close()
    return {name: found[1:] for name, found in seconds.items()}


@contextlib.contextmanager
def without_fingerprints() -> Iterator[None]:
    with (
        mock.patch.object(checkpoint, "_described", lambda tree: {}),
        mock.patch.object(Checkpoints, "_require_intact", lambda *_: None),
    ):
        yield


def timed(work: Callable[[T], object], argument: T) -> float:
    began = time.perf_counter()
    work(argument)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
