"""What somebody who comes from another library may have meant by an option."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

# TRL's and verl's names of the same values, and common short ones.
ELSEWHERE = {
    "model_name_or_path": "model.path",
    "dataset_name": "data.path",
    "max_prompt_length": "data.max_prompt_tokens",
    "num_generations": "rollout.samples",
    "rollout.n": "rollout.samples",
    "max_completion_length": "rollout.max_tokens",
    "max_response_length": "rollout.max_tokens",
    "train_batch_size": "rollout.prompts",
    "ppo_mini_batch_size": "optimizer.minibatch_prompts",
    "ppo_epochs": "optimizer.epochs",
    "num_iterations": "optimizer.epochs",
    "optim.lr": "optimizer.learning_rate",
    "lr": "optimizer.learning_rate",
    "beta": "kl.coefficient",
    "kl_loss_coef": "kl.coefficient",
    "epsilon": "loss.clip_low",
    "clip_ratio_low": "loss.clip_low",
    "epsilon_high": "loss.clip_high",
    "clip_ratio_high": "loss.clip_high",
    "entropy_coeff": "entropy.bonus",
    "output_dir": "run.directory",
    "default_local_dir": "run.directory",
    "max_steps": "run.steps",
    "total_training_steps": "run.steps",
    "save_steps": "checkpoint.every",
    "save_freq": "checkpoint.every",
    "eval_steps": "eval.every",
    "test_freq": "eval.every",
    "vllm_server_host": "sampler.urls",
    "report_to": "run.trackers",
    "project_name": "run.project",
}


def misnamed(args: Sequence[str], keys: Collection[str]) -> str | None:
    """A line for the first option that is no "--section.key", with what may be meant; None where all are such.

    Args:
      args: overrides of a command line.
      keys: "section.key" of all that a recipe has.
    """
    for arg in args:
        name, equals, value = arg.partition("=")
        if equals and name in keys:
            return f"{arg}: an option begins with --: --{name} {value}"
        if not name.startswith("--") or name == "--help":
            continue
        flat = name[2:].replace("-", "_")
        if flat not in keys and (_elsewhere(flat) or "." not in flat):
            return f"{name}: options are --section.key; {meant(flat, keys, '--')}"
    return None


def meant(name: str, keys: Collection[str], prefix: str = "") -> str:
    """What may be meant by a name that is no "section.key" of `keys`, to put behind a message."""
    own = [key for key in keys if key.partition(".")[2] == name]
    found = own or _elsewhere(name) or _close(name, keys)
    if not found:
        return "jaxrl train RECIPE --help lists them all"
    return f"did you mean {' or '.join(prefix + key for key in found)}?"


def _elsewhere(name: str) -> list[str]:
    return [meant for other, meant in ELSEWHERE.items() if f".{name}".endswith(f".{other}")]


def _close(name: str, keys: Collection[str]) -> list[str]:
    by_key = {key.partition(".")[2]: key for key in keys}
    return [by_key[near] for near in difflib.get_close_matches(name, by_key, n=2, cutoff=0.75)]
