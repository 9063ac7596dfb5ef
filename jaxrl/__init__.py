"""jaxrl: GRPO for reasoning models in JAX.

Importing this package loads nothing heavy; each name below is imported from its module when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxrl import lazy

if TYPE_CHECKING:
    from jaxrl.api import evaluate, export, train
    from jaxrl.config import Recipe
    from jaxrl.config import load as load_recipe
    from jaxrl.errors import InputError, RunError
    from jaxrl.grpo.advantages import group_advantages, sequence_weights, token_weights
    from jaxrl.grpo.objective import Objective, policy_objective
    from jaxrl.grpo.packing import Layout, PackedBatch, Placement, Terms, bucket_lengths, fill, lay_out, pack
    from jaxrl.grpo.update import (
        Functions,
        Likelihoods,
        Numerics,
        TrainState,
        init_state,
        learning_rate,
        make_optimizer,
        make_update,
    )
    from jaxrl.models.decoder import Config as ModelConfig
    from jaxrl.models.decoder import initialize
    from jaxrl.models.hf import Model
    from jaxrl.models.hf import load as load_model
    from jaxrl.models.hf import save as save_model
    from jaxrl.parallel.mesh import make_mesh, to_devices
    from jaxrl.programs import Programs, build_programs
    from jaxrl.rewards import VERIFIERS
    from jaxrl.sampling.local import LocalSampler
    from jaxrl.sampling.open import open_sampler
    from jaxrl.sampling.sampler import Sampler
    from jaxrl.sampling.vllm import VLLMSampler
    from jaxrl.types import Prompt, Rollout, SamplingParams

__version__ = "0.1.0"

# name: "module" or "module:name there"
_PUBLIC = {
    "Recipe": "config",
    "load_recipe": "config:load",
    "train": "api",
    "evaluate": "api",
    "export": "api",
    "InputError": "errors",
    "RunError": "errors",
    "Prompt": "types",
    "Rollout": "types",
    "SamplingParams": "types",
    "Sampler": "sampling.sampler",
    "LocalSampler": "sampling.local",
    "VLLMSampler": "sampling.vllm",
    "open_sampler": "sampling.open",
    "VERIFIERS": "rewards",
    "group_advantages": "grpo.advantages",
    "sequence_weights": "grpo.advantages",
    "token_weights": "grpo.advantages",
    "Layout": "grpo.packing",
    "PackedBatch": "grpo.packing",
    "Placement": "grpo.packing",
    "Terms": "grpo.packing",
    "bucket_lengths": "grpo.packing",
    "lay_out": "grpo.packing",
    "fill": "grpo.packing",
    "pack": "grpo.packing",
    "Objective": "grpo.objective",
    "policy_objective": "grpo.objective",
    "Functions": "grpo.update",
    "Numerics": "grpo.update",
    "TrainState": "grpo.update",
    "init_state": "grpo.update",
    "Likelihoods": "grpo.update",
    "learning_rate": "grpo.update",
    "make_optimizer": "grpo.update",
    "make_update": "grpo.update",
    "Programs": "programs",
    "build_programs": "programs",
    "make_mesh": "parallel.mesh",
    "to_devices": "parallel.mesh",
    "ModelConfig": "models.decoder:Config",
    "initialize": "models.decoder",
    "Model": "models.hf",
    "load_model": "models.hf:load",
    "save_model": "models.hf:save",
}

__all__ = [*_PUBLIC]

__getattr__ = lazy.names(__name__, _PUBLIC)
