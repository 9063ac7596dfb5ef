"""Checkpoints of a run: asynchronous, atomic, resumed bit for bit.

A checkpoint is the training state and the recipe. Batches, seeds and packing follow from the seed and the step, so
nothing else has to be kept. Orbax writes into a temporary folder and renames it when all of it is on disk.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import jax
import orbax.checkpoint as ocp

from jaxrl import config
from jaxrl.errors import InputError, RunError, first_line
from jaxrl.grpo.update import TrainState
from jaxrl.models import decoder
from jaxrl.types import Say

# Keys that may change between one start of a run and the next: where, how long and on what, not what is computed.
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
# Keys under these that may not, since they change what is computed.
FIXED = ("sampler.correction", "sampler.max_staleness")
SHOWN = 200  # characters of another library's error that are shown


class Checkpoints:
    """The checkpoints of one run folder, numbered by steps done."""

    def __init__(
        self, directory: Path, keep_last: int = 2, keep_every: int = 0, read_only: bool = False
    ) -> None:
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
        """The newest step, or None without a checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, recipe: config.Recipe) -> None:
        """Starts writing `state`; returns as soon as it is copied off the devices.

        Raises:
          RunError: if there is no room for it, or this or the write before it failed; with the step that a restart
            goes on from.
        """
        need = sum(x.nbytes for x in jax.tree.leaves(state))
        free = shutil.disk_usage(self.directory).free
        if free < need:  # Orbax would fail too, after many lines of its own
            self._fail(f"it takes {need / 1e9:.2f} GB and {free / 1e9:.2f} GB are free")
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
            recipe=ocp.args.JsonSave(config.to_dict(recipe)),
        )
        self._guarded(lambda: self._manager.save(step, args=items, force=True))

    def resume(self, recipe: config.Recipe, like: TrainState, say: Say) -> tuple[int, TrainState]:
        """Reads the newest checkpoint that can be read, and deletes the newer ones that cannot.

        Args:
          recipe: the run's.
          like: see `restore`.
          say: prints a line.

        Returns:
          the step of the checkpoint and the state.

        Raises:
          InputError: if another recipe wrote it, or none can be read.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                self.require_same_recipe(step, recipe)
                return step, self.restore(step, like)
            except InputError:
                raise
            except Exception as error:  # a torn file raises whatever its format's reader does
                why = _root(error)[:SHOWN]
                say(f"{self.directory / str(step)} cannot be read ({why}); the one before it is used")
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

    def restore_params(self, step: int, like: decoder.Params) -> decoder.Params:
        """Reads the parameters alone, which are a third of the bytes; `like` has their shapes and shardings."""
        items = ocp.args.Composite(params=ocp.args.StandardRestore(like))
        return self._manager.restore(step, args=items)["params"]

    def require_same_recipe(self, step: int, recipe: config.Recipe) -> None:
        """Refuses to go on with another recipe than the one that wrote the checkpoint.

        Raises:
          InputError: naming the keys that differ and may not.
        """
        differing = config.differences(self.recipe(step), recipe)
        fixed = [d for d in differing if d.startswith(FIXED) or not d.startswith(FREE)]
        if fixed:
            raise InputError(
                f"{self.directory / str(step)} was written by another recipe ({'; '.join(fixed)}); "
                "put these back, or set run.directory to a new folder"
            )

    def recipe(self, step: int) -> config.Recipe:
        """The recipe that wrote a checkpoint."""
        items = ocp.args.Composite(recipe=ocp.args.JsonRestore())
        values = self._manager.restore(step, args=items)["recipe"]
        return config.from_dict(values, str(self.directory / str(step)))

    def close(self) -> None:
        """Waits for the write under way.

        Raises:
          RunError: if it failed.
        """
        self._guarded(self._manager.wait_until_finished)
        self._manager.close()

    def _guarded(self, write: Callable[[], object]) -> None:
        try:
            write()
        except Exception as error:  # Orbax wraps errors of the file system in types of its own
            self._fail(_root(error), error)

    def _fail(self, why: str, cause: Exception | None = None) -> NoReturn:
        good = self.latest()
        after = "there is no older one" if good is None else f"the last good one is of step {good}"
        raise RunError(
            f"{self.directory}: writing a checkpoint failed ({why}); {after}. "
            "Free space or fix the folder and run the same command again"
        ) from cause


def _root(error: BaseException) -> str:
    """The message of the error that all others of the chain come from."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return first_line(error)
