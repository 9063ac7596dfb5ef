"""The demo trained by jaxrl and by TRL's GRPOTrainer: `python -m benchmarks.vs_trl`. TRL runs in PyTorch on the CPU.

The same model, prompts in the same order, rewards, mini-batches and hyperparameters; each samples for itself. First
both take twelve updates from the same weights on the same rollouts, and have to reach the same weights. Then they train
in turn, seed by seed, with weights kept every few steps; the clock of each starts with its process. Held-out accuracy
of the weights is measured afterwards, of both by jaxrl. `seconds`, `accuracy` (of a step's own samples) and `held_out`
of every run are in results/vs_trl.json.

TRL needs an environment of its own: `python -m benchmarks.vs_trl --setup` makes it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.harness import HERE, RESULTS
from evals import in_training
from jaxrl import config, data
from jaxrl.checkpoint import Checkpoints
from jaxrl.grpo import packing
from jaxrl.grpo import update as grpo
from jaxrl.grpo.advantages import group_advantages
from jaxrl.models import hf
from jaxrl.parallel.mesh import make_mesh, to_devices
from jaxrl.prepare import verifier
from jaxrl.programs import attention_buckets, make_optimizer, make_update, stream_lengths
from jaxrl.report.runs import smooth
from jaxrl.sampling.local import LocalSampler
from jaxrl.types import Prompt, Rollout, SamplingParams

TRL = HERE / ".envs" / "trl"
REQUIREMENTS = ("trl==1.16.0", "torch==2.13.0", "pylatexenc")
EVERY = 10  # steps between weights that are kept
GOAL = 0.85
EPSILON = 1e-4  # beside the standard deviation, which TRL cannot change
COLORS = {"jaxrl": "#0072B2", "TRL": "#D55E00"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--setup", action="store_true", help="make TRL's environment first")
    parser.add_argument("--check", action="store_true", help="compare updates, and train nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each")
    parser.add_argument("--folder", type=Path, default=Path("runs/vs_trl"), help="for models and runs")
    options = parser.parse_args()
    if options.setup:
        venv.create(TRL, with_pip=True)
        subprocess.run([TRL / "bin/python", "-m", "pip", "install", "-q", *REQUIREMENTS], check=True)
    result: dict[str, Any] = {
        "trl": REQUIREMENTS[0], "torch": REQUIREMENTS[1], "threads": options.threads, "cores": os.cpu_count(),
        "python": platform.python_version(), "jax": jax.__version__, "steps": options.steps,
    }  # fmt: skip
    result["check"] = check(prepare(options.folder, options.seeds[0]), options.threads)
    print(json.dumps(result["check"], indent=1))
    if options.check:
        return
    runs: dict[str, list[dict]] = {"jaxrl": [], "TRL": []}
    for n, seed in enumerate(options.seeds):
        base = prepare(options.folder, seed)
        for name in ("jaxrl", "TRL") if n % 2 == 0 else ("TRL", "jaxrl"):
            run = {"jaxrl": run_jaxrl, "TRL": run_trl}[name](base, seed, options.steps, options.threads)
            runs[name].append({"seed": seed} | run)
            print(f"{name}, seed {seed}: " + describe(run), flush=True)
    result |= {"runs": runs, "ratios": ratios(runs)}
    (RESULTS / "vs_trl.json").write_text(json.dumps(result, indent=1))
    draw(runs, HERE.parent / "docs" / "vs_trl.png")
    for name, ratio in result["ratios"].items():
        print(f"{name}: TRL takes {ratio['median']:.2f} times as long ({min(ratio['each']):.2f} to "
              f"{max(ratio['each']):.2f})")  # fmt: skip


def prepare(folder: Path, seed: int) -> Path:
    """The demo's problems and its model that can reason a little."""
    base = folder / f"seed_{seed}"
    if not (base / "base" / "generation_config.json").exists():
        subprocess.run([sys.executable, "recipes/demo.py", base, "--seed", str(seed)], check=True)
    return base


def recipe_of(base: Path, seed: int, steps: int, out: Path) -> config.Recipe:
    return config.load("recipes/demo.toml", [
        "--run.directory", str(out), "--run.seed", str(seed), "--run.steps", str(steps),
        "--model.path", str(base / "base"), "--data.path", str(base / "train.jsonl"),
        "--eval.path", str(base / "heldout.jsonl"), "--advantage.epsilon", str(EPSILON),
        "--checkpoint.every", str(EVERY), "--checkpoint.keep-last", "1000", "--run.rollouts-every", "0",
    ])  # fmt: skip


def run_jaxrl(base: Path, seed: int, steps: int, threads: int) -> dict[str, Any]:
    out = fresh(base / "jaxrl")
    recipe = recipe_of(base, seed, steps, out)
    (base / "recipe.toml").write_text(config.to_toml(recipe))
    seconds, rows = watch(
        [sys.executable, "-m", "jaxrl.cli", "train", base / "recipe.toml"], out, threads, base / "jaxrl.log"
    )
    checkpoints = Checkpoints(out / "checkpoints", read_only=True)
    like = hf.load(base / "base").params
    weights = ((step, checkpoints.restore_params(step, like)) for step in range(EVERY, steps + 1, EVERY))
    return measured(recipe, base, seconds, rows, weights)


def run_trl(base: Path, seed: int, steps: int, threads: int) -> dict[str, Any]:
    out = fresh(base / "trl")
    recipe = recipe_of(base, seed, steps, out)
    seconds, rows = watch(
        trl_command(recipe, base, steps, threads, out, whole_groups=True), out, threads, base / "trl.log"
    )
    weights = ((step, hf.load(out / f"step_{step}").params) for step in range(EVERY, steps + 1, EVERY))
    return measured(recipe, base, seconds, rows, weights)


def trl_command(
    recipe: config.Recipe,
    base: Path,
    steps: int,
    threads: int,
    out: Path,
    rollouts: Path | None = None,
    whole_groups: bool = False,
) -> list[Any]:
    tokenizer = data.load_tokenizer(recipe.model.path)
    prompts = data.load_prompts(recipe.data, tokenizer).prompts
    ordered = [p for k in range(steps) for p in batch(recipe, prompts, k)]
    rows = [{"prompt": tokenizer.decode(p.tokens), "answer": p.answer} for p in ordered]
    path = out / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": recipe.model.path, "data": str(path), "out": str(out), "rollouts": rollouts and str(rollouts),
        "threads": threads, "seed": recipe.run.seed, "steps": steps, "save_every": EVERY,
        "updates": recipe.updates_per_step, "prompts": recipe.rollout.prompts, "samples": recipe.rollout.samples,
        "max_tokens": recipe.rollout.max_tokens, "learning_rate": recipe.optimizer.learning_rate,
        "warmup": recipe.optimizer.warmup_steps, "weight_decay": recipe.optimizer.weight_decay,
        "max_grad_norm": recipe.optimizer.max_grad_norm, "clip_low": recipe.loss.clip_low,
        "clip_high": recipe.loss.clip_high, "dual_clip": recipe.loss.dual_clip, "whole_groups": whole_groups,
    }  # fmt: skip
    return [TRL / "bin/python", HERE / "contestants" / "trl_grpo.py", json.dumps(settings)]


def batch(recipe: config.Recipe, prompts: list[Prompt], step: int) -> list[Prompt]:
    return data.batch(prompts, recipe.run.seed, step, recipe.rollout.prompts, recipe.data.order)


def watch(command: list[Any], out: Path, threads: int, log: Path) -> tuple[list[float], list[dict]]:
    """Runs a program; when each row of its metrics.jsonl came, in seconds since it was started, and the rows."""
    environment = {
        "OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(HERE.parent), "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    pinned = ["taskset", "-c", f"0-{threads - 1}"]
    seconds, path, began = list[float](), out / "metrics.jsonl", time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            list(map(str, [*pinned, *command])),
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
        )
        while True:
            ended = process.poll() is not None
            rows = path.read_text().splitlines(keepends=True) if path.exists() else []
            rows = [row for row in rows if row.endswith("\n")]
            seconds += [time.monotonic() - began] * (len(rows) - len(seconds))
            if ended:
                break
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{log}: exit status {process.returncode}: {log.read_text()[-1000:]}")
    return seconds, [json.loads(row) for row in rows]


def measured(
    recipe: config.Recipe,
    base: Path,
    seconds: list[float],
    rows: list[dict],
    weights: Iterator[tuple[int, Any]],
) -> dict[str, Any]:
    """Accuracy of each step's own samples, and of the weights on the held-out problems."""
    model, tokenizer = hf.load(base / "base"), data.load_tokenizer(str(base / "base"))
    sampler = LocalSampler(model.config, dtype=recipe.model.dtype, slots=recipe.rollout.slots)
    prompts = in_training.load_held_out(recipe, tokenizer)
    verify = verifier(recipe, lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
    params = SamplingParams(max_tokens=recipe.rollout.max_tokens, stop_ids=hf.stop_ids(base / "base"))
    held_out = []
    for step, trained in [(0, model.params), *weights]:
        sampler.publish(trained, step)
        groups = sampler.generate(prompts, recipe.eval.samples, params, (1,), verify)
        held_out.append({"step": step, "accuracy": held_out.summary(groups, params)["accuracy"]})
    at = float(np.interp(GOAL, np.maximum.accumulate([h["accuracy"] for h in held_out]),
                         [h["step"] for h in held_out], right=np.nan))  # fmt: skip
    clock = np.array([0.0, *seconds])
    return {
        "seconds": [round(x, 2) for x in seconds],
        "accuracy": [row["reward/accuracy"] for row in rows],
        "held_out": held_out,
        "steps_to_goal": at,
        "seconds_to_goal": float(np.interp(at, np.arange(len(clock)), clock)),
        "seconds_a_step": statistics.median(np.diff(clock)[5:]),
    }


def ratios(runs: dict[str, list[dict]]) -> dict[str, Any]:
    """TRL over jaxrl, seed by seed."""
    found = {}
    for key in ("seconds_to_goal", "seconds_a_step"):
        each = [b[key] / a[key] for a, b in zip(runs["jaxrl"], runs["TRL"], strict=True)]
        found[key] = {"median": statistics.median(each), "each": each}
    each = [b["seconds"][-1] / a["seconds"][-1] for a, b in zip(*runs.values(), strict=True)]
    return found | {"all_steps": {"median": statistics.median(each), "each": each}}


def describe(run: dict[str, Any]) -> str:
    return (
        f"{run['held_out'][0]['accuracy']:.3f} -> {run['held_out'][-1]['accuracy']:.3f}, {GOAL:.0%} after "
        f"{run['steps_to_goal']:.0f} steps and {run['seconds_to_goal']:.0f} s; {run['seconds_a_step']:.2f} s a step, "
        f"{run['seconds'][-1]:.0f} s in all"
    )


def check(base: Path, threads: int, steps: int = 3) -> dict[str, Any]:
    """Both take the updates of `steps` steps on the same rollouts; the largest difference of a parameter after each."""
    out = fresh(base / "check")
    recipe = recipe_of(base, 1, steps, out)
    model, tokenizer = hf.load(base / "base"), data.load_tokenizer(str(base / "base"))
    mesh = make_mesh(1, 1)
    verify = verifier(recipe, lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
    prompts = data.load_prompts(recipe.data, tokenizer).prompts
    sampler = LocalSampler(model.config, dtype="float32", slots=recipe.rollout.slots)
    sampler.publish(model.params, 0)
    params = SamplingParams(max_tokens=recipe.rollout.max_tokens, stop_ids=hf.stop_ids(base / "base"))
    sampled = []
    for k in range(steps):
        chosen = batch(recipe, prompts, k)
        sampled.append(sampler.generate(chosen, recipe.rollout.samples, params, (1, k), verify))
        flat = [r for group in sampled[-1] for r in group]
        rows = {"prompt_ids": [r.prompt.tokens.tolist() for r in flat],
                "completion_ids": [r.tokens.tolist() for r in flat],
                "logprobs": [r.logprobs.tolist() for r in flat]}  # fmt: skip
        (out / f"{k}.json").write_text(json.dumps(rows))
    watch(trl_command(recipe, base, steps, threads, out, out), out, threads, base / "check.log")

    optimizer = make_optimizer(recipe)
    update, score = make_update(recipe, model.config, optimizer, mesh)
    state = grpo.init_state(model.params, optimizer, mesh)
    differences, moved, clipped, advantage = [], [], [], 0.0
    before = jax.tree.map(np.array, state.params)
    for k, groups in enumerate(sampled):
        advantages = group_advantages(np.array([[r.score for r in g] for g in groups]), EPSILON)
        order = np.load(out / f"order_{k}.npz")
        flat = in_order(groups, advantages, order)
        advantage = max(
            advantage, max(abs(a - b) for (_, a), b in zip(flat, order["advantages"], strict=True))
        )
        old, size = state.params, len(flat) // recipe.updates_per_step
        packed = [pack(recipe, flat[i : i + size]) for i in range(0, len(flat), size)]
        scored = [to_devices(p, mesh) for p in packed]
        scored = [b.replace(old_logprobs=score(old, b)) for b in scored]
        for b in scored:
            state, metrics = update(state, b)
            theirs = hf.load(out / f"update_{int(state.step)}").params
            differences.append(largest(state.params, theirs))
            moved.append(largest(state.params, before))
            clipped.append(float(metrics["clip_fraction"]))
    return {"advantage_difference": float(advantage), "parameter_difference": differences, "parameter_change": moved,
            "clip_fraction": clipped}  # fmt: skip


def in_order(groups: list[list[Rollout]], advantages: np.ndarray, order: Any) -> list[tuple[Rollout, float]]:
    """Rollouts and their advantages as TRL shuffled them."""
    there: dict[tuple, list] = {}
    for group, of_group in zip(groups, advantages, strict=True):
        for rollout, a in zip(group, of_group, strict=True):
            there.setdefault((*rollout.prompt.tokens, -1, *rollout.tokens), []).append((rollout, float(a)))
    found = []
    for prompt, completion, mask in zip(*(order[f"{n}_ids"] for n in ("prompt", "completion")),
                                        order["completion_mask"], strict=True):  # fmt: skip
        found.append(there[(*prompt, -1, *completion[mask == 1])].pop())
    return found


def pack(recipe: config.Recipe, chosen: list[tuple[Rollout, float]]) -> packing.PackedBatch:
    return packing.pack(
        [rollout for rollout, _ in chosen], np.array([a for _, a in chosen], np.float32), devices=1,
        streams=stream_lengths(recipe), buckets=attention_buckets(recipe),
        segments=recipe.packing.segments,
    )  # fmt: skip


def largest(a: Any, b: Any) -> float:
    return max(
        jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()), a, b))
    )


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def draw(runs: dict[str, list[dict]], path: Path) -> None:
    figure = Figure(figsize=(13.5, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    reward, by_step, by_time = figure.subplots(1, 3)
    for name, of_name in runs.items():
        for i, run in enumerate(of_name):
            style = {
                "color": COLORS[name],
                "label": name if i == 0 else None,
                "linewidth": 1.5,
                "alpha": 0.85,
            }
            reward.plot(
                np.arange(1, len(run["accuracy"]) + 1), 2 * smooth(np.array(run["accuracy"])) - 1, **style
            )
            steps, held = zip(*((h["step"], h["accuracy"]) for h in run["held_out"]), strict=True)
            clock = np.array([0.0, *run["seconds"]])
            by_step.plot(steps, held, marker="o", markersize=3, **style)
            by_time.plot(clock[list(steps)], held, marker="o", markersize=3, **style)
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
