"""The recipe: everything that defines a run. Sections and defaults, loading, rules, and the stages of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxrl import lazy

if TYPE_CHECKING:
    from jaxrl.config.loading import (
        differences,
        draft,
        flat,
        from_command_line,
        from_dict,
        from_earlier,
        load,
        to_dict,
        to_toml,
    )
    from jaxrl.config.sections import (
        KL,
        Advantage,
        Checkpoint,
        Data,
        Entropy,
        Eval,
        Groups,
        Length,
        Loss,
        Mesh,
        Model,
        Optimizer,
        Packing,
        Recipe,
        Reward,
        RewardFunction,
        Rollout,
        Run,
        Sampler,
        Source,
        StageEntry,
    )
    from jaxrl.config.stages import Stage, longest, stage_at, stages_of

# By module; each is loaded when it is first used, so that `jaxrl --help` is there at once
_PUBLIC = {
    "loading": """
        differences draft flat from_command_line from_dict from_earlier load to_dict
        to_toml
    """,
    "sections": """
        KL Advantage Checkpoint Data Entropy Eval Groups Length Loss Mesh Model Optimizer
        Packing Recipe Reward RewardFunction Rollout Run Sampler Source StageEntry
    """,
    "stages": """
        Stage longest stage_at stages_of
    """,
}

__getattr__ = lazy.names(
    __name__, {name: module for module, them in _PUBLIC.items() for name in them.split()}
)
