"""What the commands that sample have in common: options, the model, servers, lines of progress."""

from __future__ import annotations

import argparse
import datetime
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from jaxrl import config
from jaxrl.commands.options import positive
from jaxrl.types import OnRollout, Rollout, Say

if TYPE_CHECKING:
    from jaxrl.sampling.servers import Devices
    from jaxrl.telemetry.progress import Progress

# Options of vLLM that decide about memory, not about responses.
MEMORY = re.compile(r"--(gpu-memory-utilization|max-num-seqs|max-num-batched-tokens|cpu-offload-gb)[ =]\S+ ?")
EVERY = 60.0  # seconds between lines of progress, where there is no terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds MODEL, --samplers and --servers."""
    model = "Hugging Face folder, Hub id, or run folder, whose newest checkpoint is exported first"
    parser.add_argument("model", help=model)
    parser.add_argument("--samplers", metavar="URL,URL", help="sample by these vLLM servers")
    servers = "start N vLLM servers here, or all: one on each GPU"
    parser.add_argument("--servers", type=_servers, metavar="N", help=servers)


def _servers(text: str) -> int:
    """An argparse type: a number of servers, or "all" for the number of GPUs."""
    if text != "all":
        return positive(text)
    from jaxrl.sampling import servers

    return max(1, len(servers.gpus()))


def devices_of(recipe: config.Recipe) -> Devices:
    """Where started servers run: on all GPUs. This process keeps to the CPU where they load models from files.

    Called before JAX looks for GPUs.
    """
    from jaxrl.sampling import servers

    if recipe.rollout.engine == "vllm" and recipe.sampler.transport == "files":
        import jax

        jax.config.update("jax_platforms", "cpu")
    devices = servers.choose_devices(recipe.sampler.servers, trains=False)
    servers.require_startable(recipe, devices)
    return devices


def run_folder(model: str) -> Path | None:
    """The run folder that MODEL is, or has it as one of its checkpoints; None for another folder, or a Hub id."""
    path = Path(model)
    if path.parent.name == "checkpoints":
        return path.parents[1]
    return path if (path / "checkpoints").is_dir() else None


def exported(model: str, kept: str) -> tuple[Path, int]:
    """The Hugging Face folder of MODEL, which is exported first if it is a run or a checkpoint, and its step.

    Args:
      model: what the command line has.
      kept: the folder of the run in which that of an older checkpoint is written; the newest one's is hf in the run.

    Raises:
      InputError: if it is no model, or has no checkpoint.
    """
    from jaxrl.exports import export, run_of
    from jaxrl.models import hf

    if run_folder(model) is None:
        return hf.resolve(model), 0
    run, step = run_of(Path(model))
    folder = run / "hf" if step is None else run / kept / f"step_{step:06d}" / "hf"
    return folder, export(Path(model), folder)


def vllm_options(recipe: config.Recipe) -> str:
    """The options of started servers on which responses depend, or "none"."""
    options = " ".join(recipe.sampler.vllm_options) if recipe.sampler.servers else ""
    return MEMORY.sub("", options).strip() or "none"


def reporter(name: str, total: int, done: int, progress: Progress, say: Say) -> OnRollout:
    """Returns a callback that moves the bar, or without a terminal prints a line now and then.

    Args:
      name: of the phase.
      total: rollouts of the phase.
      done: how many of them were there before.
      progress: shows the phase.
      say: prints a line.
    """
    began = last = time.monotonic()
    first, tokens, live = done, 0, sys.stdout.isatty()

    def on_rollout(rollout: Rollout) -> Rollout:
        nonlocal done, tokens, last
        done, tokens, now = done + 1, tokens + len(rollout.tokens), time.monotonic()
        progress.advance(rollout)
        if not live and (now > last + EVERY or done == total):
            last, seconds = now, max(now - began, 1e-9)
            left = datetime.timedelta(seconds=round((total - done) * seconds / (done - first)))
            speed = f"{tokens / seconds:,.0f} tokens/s"
            say(f"{name}: {done:,}/{total:,} responses, {speed}, ETA {left}")
        return rollout

    return on_rollout
