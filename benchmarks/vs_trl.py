"""The demo trained by jaxrl and by TRL's GRPOTrainer: `python -m benchmarks.vs_trl`. TRL runs in PyTorch on the CPU.

The same model, prompts in the same order, rewards, mini-batches and hyperparameters; each samples for itself. First
both take twelve updates from the same parameters on the same rollouts, and have to reach the same parameters. Then they
train in turn, seed by seed, and keep their parameters every few steps; the clock of each starts with its process.
Afterwards jaxrl measures the held-out accuracy of both's parameters. `seconds`, `accuracy` (of a step's own samples)
and `held_out` of every run are in results/vs_trl.json.

TRL needs an environment of its own: `python -m benchmarks.vs_trl --setup` makes it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.harness import HERE, write_results
from evals import held_out
from jaxrl import config, data
from jaxrl.checkpoint import Checkpoints
from jaxrl.grpo import packing
from jaxrl.grpo.advantages import group_advantages
from jaxrl.grpo.update import learning_rate
from jaxrl.marking import make_marker
from jaxrl.models import decoder, hf
from jaxrl.parallel.mesh import make_mesh, to_devices
from jaxrl.programs import Programs, build_programs
from jaxrl.report.runs import smooth
from jaxrl.sampling.local import LocalSampler
from jaxrl.types import Groups, JsonObject, OnRollout, Prompt, Rollout, SamplingParams, Tokenizer

TRL = HERE / ".envs" / "trl"
REQUIREMENTS = ("trl==1.16.0", "torch==2.13.0", "pylatexenc")
EVERY = 10  # steps between parameters that are kept
GOAL = 0.85  # held-out accuracy; the time until it is reached is compared
SETTLED = 5  # steps of a run that do not count for the seconds a step
EPSILON = 1e-4  # beside the standard deviation, which TRL cannot change
COLORS = {"jaxrl": "#0072B2", "TRL": "#D55E00"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--setup", action="store_true", help="make TRL's environment first")
    add("--check", action="store_true", help="compare updates, and train nothing")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3])
    add("--steps", type=int, default=100)
    add("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each")
    add("--folder", type=Path, default=Path("runs/vs_trl"), help="for models and runs")
    options = parser.parse_args()
    if options.setup:
        venv.create(TRL, with_pip=True)
        subprocess.run([TRL / "bin/python", "-m", "pip", "install", "-q", *REQUIREMENTS], check=True)
    result: JsonObject = {
        "trl": REQUIREMENTS[0],
        "torch": REQUIREMENTS[1],
        "threads": options.threads,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "steps": options.steps,
    }
    result["check"] = compare_updates(prepare(options.folder, options.seeds[0]), options.threads)
    print(json.dumps(result["check"], indent=1))
    if options.check:
        return
    runs: dict[str, list[JsonObject]] = {"jaxrl": [], "TRL": []}
    for n, seed in enumerate(options.seeds):
        base = prepare(options.folder, seed)
        for name in ("jaxrl", "TRL") if n % 2 == 0 else ("TRL", "jaxrl"):
            run = {"jaxrl": run_jaxrl, "TRL": run_trl}[name](base, seed, options.steps, options.threads)
            runs[name].append({"seed": seed} | run)
            print(f"{name}, seed {seed}: " + describe(run), flush=True)
    result |= {"runs": runs, "ratios": ratios(runs)}
    write_results("vs_trl", result)
    draw(runs, HERE.parent / "docs" / "vs_trl.png")
    for name, ratio in result["ratios"].items():
        low, high = min(ratio["each"]), max(ratio["each"])
        print(f"{name}: TRL takes {ratio['median']:.2f} times as long ({low:.2f} to {high:.2f})")


def prepare(folder: Path, seed: int) -> Path:
    """Makes the demo's problems, and its model that can reason a little."""
    base = folder / f"seed_{seed}"
    if not (base / "base" / "generation_config.json").exists():
        subprocess.run([sys.executable, "recipes/demo.py", base, "--seed", str(seed)], check=True)
    return base


def recipe_of(base: Path, seed: int, steps: int, out: Path) -> config.Recipe:
    values = {
        "run.directory": out,
        "run.seed": seed,
        "run.steps": steps,
        "run.rollouts-every": 0,
        "model.path": base / "base",
        "data.path": base / "train.jsonl",
        "eval.path": base / "heldout.jsonl",
        "advantage.epsilon": EPSILON,
        "checkpoint.every": EVERY,
        "checkpoint.keep-last": 1000,
    }
    flat = [str(part) for key, value in values.items() for part in (f"--{key}", value)]
    return config.load("recipes/demo.toml", flat)


def run_jaxrl(base: Path, seed: int, steps: int, threads: int) -> JsonObject:
    out = fresh(base / "jaxrl")
    recipe = recipe_of(base, seed, steps, out)
    (base / "recipe.toml").write_text(config.to_toml(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "jaxrl.cli", "train", str(base / "recipe.toml")]
    seconds, rows = watch(command, out, threads, base / "jaxrl.log")
    checkpoints = Checkpoints(out / "checkpoints", read_only=True)
    like = hf.load(base / "base").params
    kept = ((step, checkpoints.restore_params(step, like)) for step in range(EVERY, steps + 1, EVERY))
    return measure(recipe, base, seconds, rows, kept)


def run_trl(base: Path, seed: int, steps: int, threads: int) -> JsonObject:
    out = fresh(base / "trl")
    recipe = recipe_of(base, seed, steps, out)
    command = trl_command(recipe, threads, out, whole_groups=True)
    seconds, rows = watch(command, out, threads, base / "trl.log")
    kept = ((step, hf.load(out / f"step_{step}").params) for step in range(EVERY, steps + 1, EVERY))
    return measure(recipe, base, seconds, rows, kept)


def trl_command(
    recipe: config.Recipe,
    threads: int,
    out: Path,
    rollouts: Path | None = None,
    whole_groups: bool = False,
) -> list[str | Path]:
    """The command line of TRL's trainer, whose prompts are written to `out`.

    Args:
      recipe: whose hyperparameters TRL takes.
      threads: of PyTorch.
      out: where TRL writes.
      rollouts: a folder of rollouts to train on, in place of sampling.
      whole_groups: mini-batches have the rollouts of whole prompts, in order.
    """
    tokenizer, steps = data.load_tokenizer(recipe.model.path), recipe.run.steps
    prompts = data.load_prompts(recipe.data, tokenizer)
    ordered = [p for k in range(steps) for p in batch(recipe, prompts, k)]
    rows = [{"prompt": tokenizer.decode(p.tokens), "answer": p.answer} for p in ordered]
    path = out / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    rollout, optimizer, loss = recipe.rollout, recipe.optimizer, recipe.loss
    settings = {
        "model": recipe.model.path,
        "data": str(path),
        "out": str(out),
        "rollouts": rollouts and str(rollouts),
        "threads": threads,
        "seed": recipe.run.seed,
        "steps": steps,
        "save_every": EVERY,
        "updates": recipe.updates_per_step,
        "prompts": rollout.prompts,
        "samples": rollout.samples,
        "max_tokens": rollout.max_tokens,
        "learning_rate": optimizer.learning_rate,
        "warmup": optimizer.warmup_steps,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.max_grad_norm,
        "clip_low": loss.clip_low,
        "clip_high": loss.clip_high,
        "dual_clip": loss.dual_clip,
        "whole_groups": whole_groups,
    }
    return [TRL / "bin/python", HERE / "contestants" / "trl_grpo.py", json.dumps(settings)]


def batch(recipe: config.Recipe, found: data.PromptSet, step: int) -> list[Prompt]:
    size, order = recipe.rollout.prompts, recipe.data.order
    return data.batch(found.prompts, recipe.run.seed, step * size, size, order, found.mixture)


def watch(
    command: Sequence[str | Path], out: Path, threads: int, log: Path
) -> tuple[list[float], list[JsonObject]]:
    """Runs a program; returns the seconds from its start to each row of its metrics.jsonl, and the rows."""
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(HERE.parent),
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    pinned = ["taskset", "-c", f"0-{threads - 1}", *map(str, command)]
    seconds, path, began = list[float](), out / "metrics.jsonl", time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            pinned, stdout=file, stderr=subprocess.STDOUT, env=os.environ | environment
        )
        while True:
            ended = process.poll() is not None
            rows = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
            rows = [row for row in rows if row.endswith("\n")]
            seconds += [time.monotonic() - began] * (len(rows) - len(seconds))
            if ended:
                break
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(
            f"{log}: exit status {process.returncode}: {log.read_text(encoding='utf-8')[-1000:]}"
        )
    return seconds, [json.loads(row) for row in rows]


@dataclasses.dataclass(frozen=True)
class Base:
    """The model that both start from, and jaxrl's sampler and verifier for it."""

    model: hf.Model
    tokenizer: Tokenizer
    vocabulary: data.Vocabulary
    sampler: LocalSampler
    params: SamplingParams
    mark: OnRollout


def load_base(recipe: config.Recipe, base: Path) -> Base:
    folder, rollout = base / "base", recipe.rollout
    model, tokenizer = hf.load(folder), data.load_tokenizer(str(folder))
    vocabulary = data.read_vocabulary(folder, tokenizer, model.config.vocab_size)
    sampler = LocalSampler(model.config, dtype=recipe.model.dtype, slots=rollout.slots)
    params = SamplingParams(max_tokens=rollout.max_tokens, stop_ids=vocabulary.stop_ids)
    return Base(
        model, tokenizer, vocabulary, sampler, params, make_marker(recipe, data.detokenizer(tokenizer))
    )


def measure(
    recipe: config.Recipe,
    base: Path,
    seconds: list[float],
    rows: list[JsonObject],
    kept: Iterator[tuple[int, decoder.Params]],
) -> JsonObject:
    """Accuracy of each step's own samples, and of the kept parameters on the held-out problems."""
    b = load_base(recipe, base)
    problems = held_out.load_problems(recipe, b.tokenizer, b.vocabulary)
    results = []
    for step, trained in [(0, b.model.params), *kept]:
        b.sampler.publish(trained, step)
        groups = b.sampler.generate(problems, recipe.eval.samples, b.params, (1,), b.mark)
        accuracy = held_out.summary(groups, b.params, "step", step)["accuracy"]
        results.append({"step": step, "accuracy": accuracy})
    best = np.maximum.accumulate([result["accuracy"] for result in results])
    at = float(np.interp(GOAL, best, [result["step"] for result in results], right=np.nan))
    clock = np.array([0.0, *seconds])
    return {
        "seconds": [round(x, 2) for x in seconds],
        "accuracy": [row["reward/accuracy"] for row in rows],
        "held_out": results,
        "steps_to_goal": at,
        "seconds_to_goal": float(np.interp(at, np.arange(len(clock)), clock)),
        "seconds_a_step": statistics.median(np.diff(clock)[SETTLED:]),
    }


def ratios(runs: dict[str, list[JsonObject]]) -> JsonObject:
    """TRL over jaxrl, seed by seed."""
    found = {}
    for key in ("seconds_to_goal", "seconds_a_step"):
        each = [b[key] / a[key] for a, b in zip(runs["jaxrl"], runs["TRL"], strict=True)]
        found[key] = {"median": statistics.median(each), "each": each}
    each = [b["seconds"][-1] / a["seconds"][-1] for a, b in zip(*runs.values(), strict=True)]
    return found | {"all_steps": {"median": statistics.median(each), "each": each}}


def describe(run: JsonObject) -> str:
    return (
        f"{run['held_out'][0]['accuracy']:.3f} -> {run['held_out'][-1]['accuracy']:.3f}, {GOAL:.0%} after "
        f"{run['steps_to_goal']:.0f} steps and {run['seconds_to_goal']:.0f} s; {run['seconds_a_step']:.2f} s a step, "
        f"{run['seconds'][-1]:.0f} s in all"
    )


def compare_updates(base: Path, threads: int, steps: int = 3) -> JsonObject:
    """Both take the updates of `steps` steps on the same rollouts; the largest difference of a parameter after each."""
    out = fresh(base / "check")
    recipe = recipe_of(base, 1, steps, out)
    b = load_base(recipe, base)
    sampled = sample(recipe, b, out)
    watch(trl_command(recipe, threads, out, out), out, threads, base / "check.log")
    programs = build_programs(recipe, b.model.config, make_mesh(1, 1))
    state = programs.init_state(b.model.params)
    before = jax.tree.map(np.array, state.params)
    found: dict[str, list[float]] = {"parameter_difference": [], "parameter_change": [], "clip_fraction": []}
    advantage = 0.0
    for k, groups in enumerate(sampled):
        advantages = group_advantages(np.array([[r.score for r in g] for g in groups]), EPSILON)
        order = np.load(out / f"order_{k}.npz")
        flat = in_order(groups, advantages, order)
        pairs = zip(flat, order["advantages"], strict=True)
        advantage = max(advantage, *(abs(own - theirs) for (_, own), theirs in pairs))
        for minibatch in minibatches(
            recipe, programs, flat, state.params, learning_rate(recipe.optimizer, k)
        ):
            state, metrics = programs.update(state, minibatch)
            theirs = hf.load(out / f"update_{int(state.step)}").params
            found["parameter_difference"].append(largest(state.params, theirs))
            found["parameter_change"].append(largest(state.params, before))
            found["clip_fraction"].append(float(metrics["clip_fraction"]))
    return {"advantage_difference": float(advantage)} | found


def sample(recipe: config.Recipe, b: Base, out: Path) -> list[Groups]:
    """Samples the rollouts of each step from the base model; writes them to out/STEP.json for TRL."""
    prompts = data.load_prompts(recipe.data, b.tokenizer, vocabulary=b.vocabulary)
    b.sampler.publish(b.model.params, 0)
    sampled = list[Groups]()
    for k in range(recipe.run.steps):
        chosen = batch(recipe, prompts, k)
        groups = b.sampler.generate(chosen, recipe.rollout.samples, b.params, (1, k), b.mark)
        flat = [r for group in groups for r in group]
        rows = {
            "prompt_ids": [r.prompt.tokens.tolist() for r in flat],
            "completion_ids": [r.tokens.tolist() for r in flat],
            "logprobs": [r.logprobs.tolist() for r in flat],
        }
        (out / f"{k}.json").write_text(json.dumps(rows), encoding="utf-8")
        sampled.append(groups)
    return sampled


def in_order(
    groups: Groups, advantages: np.ndarray, order: Mapping[str, np.ndarray]
) -> list[tuple[Rollout, float]]:
    """Rollouts and their advantages, in the order to which TRL shuffled them."""
    found: dict[tuple[int, ...], list[tuple[Rollout, float]]] = {}
    for group, of_group in zip(groups, advantages, strict=True):
        for rollout, advantage in zip(group, of_group, strict=True):
            ids = (*rollout.prompt.tokens, -1, *rollout.tokens)
            found.setdefault(ids, []).append((rollout, float(advantage)))
    names = ("prompt_ids", "completion_ids", "completion_mask")
    rows = zip(*(order[name] for name in names), strict=True)
    return [found[(*prompt, -1, *completion[mask == 1])].pop() for prompt, completion, mask in rows]


def minibatches(
    recipe: config.Recipe,
    programs: Programs,
    flat: Sequence[tuple[Rollout, float]],
    params: decoder.Params,
    rate: float,
) -> list[packing.PackedBatch]:
    """Packs the step's mini-batches in this order, with old log-probs."""
    size, found = len(flat) // recipe.updates_per_step, []
    for first in range(0, len(flat), size):
        rollouts, advantages = zip(*flat[first : first + size], strict=True)
        packed = packing.pack(rollouts, np.array(advantages), 1, programs.layout, learning_rate=rate)
        minibatch = to_devices(packed, programs.mesh)
        found.append(minibatch.replace(old_logprobs=programs.logprobs(params, minibatch).logprobs))
    return found


def largest(a: decoder.Params, b: decoder.Params) -> float:
    """The largest difference of a parameter."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs)


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def draw(runs: dict[str, list[JsonObject]], path: Path) -> None:
    figure = Figure(figsize=(13.5, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    reward, by_step, by_time = figure.subplots(1, 3)
    for name, of_name in runs.items():
        for i, run in enumerate(of_name):
            style = {"color": COLORS[name], "label": None if i else name, "linewidth": 1.5, "alpha": 0.85}
            rewards = 2 * smooth(np.array(run["accuracy"])) - 1
            reward.plot(np.arange(1, len(rewards) + 1), rewards, **style)
            steps, held = zip(*((h["step"], h["accuracy"]) for h in run["held_out"]), strict=True)
            clock = np.array([0.0, *run["seconds"]])
            style |= {"marker": "o", "markersize": 3}
            by_step.plot(steps, held, **style)
            by_time.plot(clock[list(steps)], held, **style)
    for axes, x, y in (
        (reward, "step", "mean reward, smoothed"),
        (by_step, "step", "held-out accuracy"),
        (by_time, "seconds since the program was started", "held-out accuracy"),
    ):
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(color="#e5e5e5", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
