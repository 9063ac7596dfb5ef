"""Writes the model weights of a run as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from jaxrl.checkpoint import Checkpoints
from jaxrl.errors import InputError
from jaxrl.models import decoder, hf
from jaxrl.parallel.mesh import abstract_sharded, make_mesh
from jaxrl.types import Dtype, Say


def run_of(source: Path) -> tuple[Path, int | None]:
    """The run folder of a path to a run or to one of its checkpoints, and the step of the latter.

    Raises:
      InputError: if it is neither.
    """
    if source.parent.name == "checkpoints" and source.name.isdecimal() and source.is_dir():
        return source.parent.parent, int(source.name)
    if (source / "checkpoints").is_dir():
        return source, None
    raise InputError(f"{source}: neither a run folder nor a checkpoint (RUN/checkpoints/N); check the path")


def export(source: Path, out: Path, dtype: Dtype = "bfloat16", say: Say = print) -> int:
    """Writes a checkpoint as a folder that transformers and vLLM load; returns its step.

    Args:
      source: a run folder, whose newest checkpoint is taken, or a checkpoint.
      out: the folder to write.
      dtype: of the model weights.
      say: prints a line.

    Raises:
      InputError: if there is no checkpoint, it is damaged, or the model folder that the run began with cannot be read.
      RunError: if a disk fails.
    """
    run, step = run_of(source)
    checkpoints = Checkpoints(run / "checkpoints", read_only=True)
    step = step if step is not None else checkpoints.latest()
    if step is None:
        raise InputError(f"{run}: has no checkpoint yet; train until the first one is written")
    with checkpoints.explaining(step):
        recipe = checkpoints.recipe(step)
    folder = hf.resolve(recipe.model.path)
    model = hf.read_config(folder)
    like = abstract_sharded(decoder.abstract_params(model), make_mesh())
    params = checkpoints.restore_params(step, like)
    hf.save(hf.Model(model, params, folder), out, dtype)
    say(f"step {step} of {run} -> {out} ({dtype})")
    return step
