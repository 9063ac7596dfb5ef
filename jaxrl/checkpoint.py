"""Checkpoints of a run: asynchronous, atomic, resumed bit for bit.

A checkpoint is the training state and the recipe. Batches, seeds and packing follow from the seed and the step, so
nothing else has to be remembered. Orbax writes into a temporary folder and renames it when all of it is on disk.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxrl import config
from jaxrl.errors import InputError
from jaxrl.grpo.update import TrainState

# What may change between one start of a run and the next: where, how long and on what, not what is computed.
FREE = (
    "run.steps",
    "run.directory",
    "run.tensorboard",
    "run.rollouts_every",
    "run.rollouts_keep",
    "run.compilation_cache",
    "run.profile",
    "checkpoint.",
    "eval.",
    "mesh.",
    "packing.",
    "model.attention",
    "model.remat",
    "rollout.slots",
    "sampler.",
)
FIXED = ("sampler.correction", "sampler.max_staleness")


class Checkpoints:
    """The checkpoints of one run folder, numbered by rollout batches done."""

    def __init__(self, directory: Path, keep_last: int = 2, keep_every: int = 0, read_only: bool = False):
        self.directory = directory.absolute()
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep_last,
                keep_period=keep_every or None,
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
            ),
        )

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, recipe: config.Recipe) -> None:
        """Starts writing `state`; returns as soon as it is copied off the devices.

        Raises:
          InputError: if there is no room for it, or this or the write before it failed; with the step that a
            restart goes on from.
        """
        need = sum(x.nbytes for x in jax.tree.leaves(state))
        free = shutil.disk_usage(self.directory).free
        if free < need:  # Orbax would find out too, after many lines of its own
            self._fail(f"it takes {need / 1e9:.2f} GB and {free / 1e9:.2f} GB are free")
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
            recipe=ocp.args.JsonSave(config.to_dict(recipe)),
        )
        self._guarded(lambda: self._manager.save(step, args=items, force=True))

    def resume(
        self, recipe: config.Recipe, like: TrainState, say: Callable[[str], None]
    ) -> tuple[int, TrainState]:
        """The newest checkpoint that can be read, and its state; newer ones that cannot are deleted.

        Raises:
          InputError: if another recipe wrote it, or none can be read.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                self.check(step, recipe)
                return step, self.restore(step, like)
            except InputError:
                raise
            except Exception as error:
                say(
                    f"{self.directory / str(step)} cannot be read ({_root(error)[:200]}); the one before it is used"
                )
                self._manager.delete(step)
        raise InputError(f"{self.directory}: no checkpoint can be read; set run.directory to a new folder")

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Reads the state of `step` into the shapes and shardings of `like` (abstract arrays)."""
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(like.params),
            optimizer=ocp.args.StandardRestore({"step": like.step, "opt_state": like.opt_state}),
        )
        read = self._manager.restore(step, args=items)
        return TrainState(read["optimizer"]["step"], read["params"], read["optimizer"]["opt_state"])

    def restore_params(self, step: int, like: Any) -> Any:
        """The parameters alone: a third of the bytes."""
        items = ocp.args.Composite(params=ocp.args.StandardRestore(like))
        return self._manager.restore(step, args=items)["params"]

    def check(self, step: int, recipe: config.Recipe) -> None:
        """Refuses to go on with another recipe than the one that wrote the checkpoint.

        Raises:
          InputError: naming the keys that differ.
        """
        differing = config.differences(self.recipe(step), recipe)
        fixed = [d for d in differing if d.startswith(FIXED) or not d.startswith(FREE)]
        if fixed:
            raise InputError(
                f"{self.directory / str(step)} was written by another recipe ({'; '.join(fixed)}); "
                "put these back, or set run.directory to a new folder"
            )

    def recipe(self, step: int) -> config.Recipe:
        items = ocp.args.Composite(recipe=ocp.args.JsonRestore())
        values = self._manager.restore(step, args=items)["recipe"]
        return config.from_dict(values, str(self.directory / str(step)))

    def close(self) -> None:
        """Waits for the write under way.

        Raises:
          InputError: if it failed.
        """
        self._guarded(self._manager.wait_until_finished)
        self._manager.close()

    def _guarded(self, write: Any) -> None:
        try:
            write()
        except Exception as error:  # Orbax wraps what the file system said in types of its own
            self._fail(_root(error), error)

    def _fail(self, why: str, cause: Exception | None = None) -> None:
        good = self.latest()
        after = "there is no older one" if good is None else f"the last good one is of step {good}"
        raise InputError(
            f"{self.directory}: writing a checkpoint failed ({why}); {after}. "
            "Free space or fix the folder and run the same command again"
        ) from cause


def _root(error: BaseException) -> str:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
