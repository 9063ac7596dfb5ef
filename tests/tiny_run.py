"""A complete run small enough for a test: a model that answers at random, and a recipe that teaches it to copy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrl import config
from jaxrl.grpo import packing
from jaxrl.grpo import update as grpo
from jaxrl.grpo.objective import Objective
from jaxrl.models import Config, Model, hf, initialize, save
from jaxrl.parallel.mesh import make_mesh, to_devices
from jaxrl.telemetry.trackers import MetricsRow
from jaxrl.types import Prompt, Rollout
from tiny import lines

SYMBOLS = ["<pad>", "<eos>", "<user>", "<assistant>", "\\boxed{", "}", *"012"]


def make_tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({s: i for i, s in enumerate(SYMBOLS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    fast.chat_template = "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}<assistant>"
    return fast


def make_base(folder: Path, head_dim: int = 8, updates: int = 150) -> Path:
    """A Hugging Face folder whose model answers \\boxed{0}, \\boxed{1} or \\boxed{2}: right half the time.

    Without updates it answers at random.
    """

    def example(rng: np.random.Generator) -> Rollout:
        asked, guess = 6 + rng.integers(3, size=2)
        answered = asked if rng.random() < 0.25 else guess
        prompt = Prompt("", np.array([2, asked, 3], np.int32), "")
        answer = np.array([4, answered, 5, 1], np.int32)
        return Rollout(prompt, answer, np.zeros(4, np.float32), "stop", 0)

    return pretrain(folder, len(SYMBOLS), make_tokenizer(), example, updates, head_dim=head_dim)


def pretrain(
    folder: Path,
    vocab_size: int,
    tokenizer: Any,
    example: Callable[[np.random.Generator], Rollout],
    updates: int,
    longest: int = 8,
    positions: int = 64,
    head_dim: int = 8,
) -> Path:
    """A Hugging Face folder of a small Qwen2, trained on 32 examples an update, of at most `longest` tokens.

    Token 1 ends an answer.
    """
    shape = {
        "width": 4 * head_dim,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": head_dim,
        "mlp_width": 48,
    }
    sizes = shape | {"rope_theta": 1e4, "norm_epsilon": 1e-6, "tied": True, "max_positions": positions}
    decoder = Config(family="qwen2", vocab_size=vocab_size, **sizes)  # type: ignore[arg-type]
    mesh, rng = make_mesh(), np.random.default_rng(0)
    adam = config.Optimizer(learning_rate=3e-3, warmup_steps=0, beta2=0.99, weight_decay=0.0)
    optimizer = grpo.make_optimizer(adam)
    layout = packing.Layout(streams=(32 * longest,), buckets=(longest,))
    objective = Objective(clip_low=0.2, clip_high=0.2, dual_clip=10.0)
    update, _ = grpo.make_update(decoder, optimizer, mesh, layout, grpo.Numerics(logprob_chunk=64), objective)
    state = grpo.init_state(initialize(decoder, 0, scale=0.2), optimizer, mesh)
    for _ in range(updates):
        examples = [example(rng) for _ in range(32)]
        rate = adam.learning_rate
        batch = packing.pack(examples, np.ones(32), mesh.size, layout, learning_rate=rate, on_policy=True)
        state, _ = update(state, to_devices(batch, mesh))
        jax.block_until_ready(state)  # XLA on CPUs can stall on collectives of two updates at a time
    save(Model(decoder, state.params), folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    return folder


def write_recipe(folder: Path, base: Path, **overrides: Any) -> Path:
    """A recipe of 6 steps in folder/recipe.toml, run folder folder/run; overrides are {'section.key': value}."""
    rows = [{"problem": d, "answer": d} for d in "012"]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = {
        "run": {
            "directory": str(folder / "run"), "steps": 6, "tensorboard": False,
            "compilation_cache": str(base.parent / "cache"),
        },
        "model": {"path": str(base), "dtype": "float32", "remat": "none"},
        "data": {
            "path": str(folder / "problems.jsonl"), "problem_column": "problem", "answer_column": "answer",
            "suffix": "", "max_prompt_tokens": 8,
        },
        "rollout": {"prompts": 8, "samples": 8, "max_tokens": 8, "slots": 16},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 1, "minibatch_prompts": 4},
        "packing": {"stream_tokens": 128, "bucket_tokens": 8, "logprob_chunk": 64},
        "checkpoint": {"every": 2},
    }  # fmt: skip
    for key, value in overrides.items():
        section, name = key.split(".")
        values.setdefault(section, {})[name] = value
    path = folder / "recipe.toml"
    path.write_text(config.to_toml(config.from_dict(values)))
    return path


def environment(**more: str) -> dict[str, str]:
    """Of a process on one device, and `more`."""
    return {**os.environ, "XLA_FLAGS": "", "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"} | more


def jaxrl(*args: Any, largest_file: int = 0, **more: str) -> subprocess.Popen[str]:
    """Starts the command line in a process of its own, on one device; `largest_file` in KiB fails bigger writes.

    `more` is added to its environment.
    """
    command = [sys.executable, "-m", "jaxrl.cli", *map(str, args)]
    if largest_file:
        command = ["bash", "-c", f'ulimit -f {largest_file}; exec "$@"', "jaxrl", *command]
    return subprocess.Popen(
        command, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(*args: object) -> str:
    """Runs the command line to its end, which must be a good one; returns what it printed."""
    process = jaxrl(*args)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def weights(run: Path, out: Path) -> list[np.ndarray]:
    """The parameters of a run's newest checkpoint, exported to `out`."""
    finish("export", run, out, "--dtype", "float32")
    return [np.asarray(a) for a in jax.tree.leaves(hf.load(out).params)]


def metrics(run: Path) -> list[MetricsRow]:
    """The metrics of a run's steps, less those that follow the clock, the machine and evaluations."""
    others = ("time/", "perf/", "eval/")
    rows = [
        {k: v for k, v in row.items() if not k.startswith(others)} for row in lines(run / "metrics.jsonl")
    ]
    return [row for row in rows if len(row) > 1]


def evaluations(run: Path) -> dict[int, dict[str, float]]:
    """The results of evaluations among a run's metrics, by the steps that were trained before."""
    found = {
        row["step"]: {name: value for name, value in row.items() if name.startswith("eval/")}
        for row in lines(run / "metrics.jsonl")
    }
    return {step: values for step, values in found.items() if values}
