"""The sampler that a recipe asks for, with the vLLM servers that are started for it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxrl import config
from jaxrl.models import decoder
from jaxrl.parallel import processes
from jaxrl.parallel.mesh import local_mesh
from jaxrl.sampling import servers
from jaxrl.sampling.across_processes import Follower, Shared
from jaxrl.sampling.answers import Needs
from jaxrl.sampling.local import LocalSampler
from jaxrl.sampling.sampler import Sampler
from jaxrl.sampling.transports.base import Transport
from jaxrl.sampling.transports.files import Files, own_folder
from jaxrl.sampling.transports.nccl import NCCL
from jaxrl.sampling.vllm import VLLMSampler, going_on
from jaxrl.types import Say


@contextmanager
def open_sampler(
    recipe: config.Recipe,
    folder: Path,
    model: decoder.Config,
    mesh: Mesh,
    say: Say,
    devices: servers.Devices = servers.CPU,
    stopping: Callable[[], bool] = going_on,
) -> Iterator[Shared]:
    """Opens the recipe's sampler; vLLM servers that are started for it end with the context.

    With several processes, each samples its share of the prompts in process; only the first calls vLLM servers.

    Args:
      recipe: with [rollout] and [sampler].
      folder: the model's Hugging Face folder, from which servers start.
      model: its config.
      mesh: the trainer's, over which the in-process sampler decodes.
      say: prints a line.
      devices: where started servers run.
      stopping: whether no server is to be waited for any more.

    Raises:
      InputError: if a server cannot be used, or one that is started ends at once.
      RunError: if a started server does not get ready in time.
    """
    with open_own_sampler(recipe, folder, model, mesh, say, devices, stopping) as own:
        yield Shared(own, jax.process_count() if recipe.rollout.engine == "local" else 1)


@contextmanager
def open_own_sampler(
    recipe: config.Recipe,
    folder: Path,
    model: decoder.Config,
    mesh: Mesh,
    say: Say,
    devices: servers.Devices = servers.CPU,
    stopping: Callable[[], bool] = going_on,
) -> Iterator[Sampler]:
    """Opens this process's part of `open_sampler`."""
    if recipe.rollout.engine == "local":
        here = local_mesh() if jax.process_count() > 1 else mesh
        yield LocalSampler(model, dtype=recipe.model.dtype, slots=recipe.rollout.slots, mesh=here)
        return
    with ExitStack() as stack:
        transport = _open_transport(recipe, model, say, stack)
        if processes.chief():
            yield _open_vllm(recipe, folder, model, transport, say, devices, stopping, stack)
        else:
            yield Follower(transport)


def _open_transport(recipe: config.Recipe, model: decoder.Config, say: Say, stack: ExitStack) -> Transport:
    section, dtype = recipe.sampler, recipe.model.dtype
    if section.transport == "nccl":
        return NCCL(model, dtype, section.publish_seconds)
    # users and runs may share sampler.folder: the hash keeps runs of the same name apart
    run = Path(recipe.run.directory).absolute()
    digest = hashlib.sha256(str(run).encode()).hexdigest()[:8]
    published = Path(section.folder) / f"jaxrl-{os.geteuid()}-{run.name}-{digest}"
    if processes.chief():
        stack.enter_context(own_folder(published, say))
    return Files(model, published, dtype, section.publish_seconds)


def _open_vllm(
    recipe: config.Recipe,
    folder: Path,
    model: decoder.Config,
    transport: Transport,
    say: Say,
    devices: servers.Devices,
    stopping: Callable[[], bool],
    stack: ExitStack,
) -> VLLMSampler:
    """Starts the servers that the recipe asks for, and opens a sampler in front of all there are."""
    section, started, longest = recipe.sampler, dict[str, servers.Server](), config.longest(recipe)
    if section.servers:
        decoder.require_positions(model, longest)
        settings = servers.Settings(
            section.vllm,
            str(folder),
            recipe.model.dtype,
            longest,
            transport.backend,
            options=section.vllm_options,
            beyond=longest > model.max_positions,
        )
        logs = Path(recipe.run.directory).absolute() / "servers"
        running = servers.running(section.servers, settings, logs, devices=devices, say=say)
        started = {server.url: server for server in stack.enter_context(running)}

    def restart(url: str, unwell: float) -> bool:
        return url in started and started[url].restart(unwell)

    needs = Needs(model.vocab_size, longest, recipe.model.dtype)
    urls = section.urls or list(started)
    sampler = VLLMSampler(urls, transport, section, restart, say, needs, stopping)
    stack.callback(sampler.close)
    return sampler
