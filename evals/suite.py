"""`jaxrl eval MODEL --benchmarks ...`: generate, grade, ask the judge, write the tables. Each step can be repeated."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import json
import secrets
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from blake3 import blake3

from evals import benchmarks, tables
from evals.generate import Response, generate, read
from evals.grade import grade_many
from evals.judge import Candidate, Judge
from evals.task import Task, load_tasks
from jaxrl import config, data
from jaxrl.errors import InputError
from jaxrl.files import write_atomically
from jaxrl.models import hf
from jaxrl.sampling import servers
from jaxrl.telemetry.progress import Progress
from jaxrl.types import Rollout, SamplingParams

SUFFIX = " Please reason step by step, and put your final answer within \\boxed{}."
# JustRL's evaluation, as a recipe; what is ours is the number of requests that a vLLM server gets at one time
PROTOCOL: dict[str, Any] = {
    "data": {"suffix": SUFFIX},
    "rollout": {"max_tokens": 31_744},
    "eval": {"temperature": 0.7, "top_p": 0.9},
    "packing": {"stream_tokens": 1 << 20},  # nothing is packed: room for any length
    "sampler": {"concurrency": 256},
}
CALLS = 64  # of a vLLM sampler at one time
EVERY = 60.0  # seconds between lines of progress, where there is no terminal


def evaluate(
    model: str,
    folder: Path,
    chosen: dict[str, benchmarks.Benchmark],
    recipe: config.Recipe,
    out: Path,
    *,
    local: Path | None = None,
    samples: int = 0,
    protocol: Literal["default", "justrl_released"] = "default",
    judge: Callable[[], contextlib.AbstractContextManager[Judge]] | None = None,
    devices: servers.Devices = servers.CPU,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Evaluates a model on benchmarks, and goes on where that was interrupted.

    Args:
      model: its name, for people.
      folder: a Hugging Face folder.
      chosen: benchmarks by name.
      recipe: how to sample, `PROTOCOL` with changes.
      out: folder for NAME.jsonl (responses), NAME.scores.jsonl, judge.jsonl, results.json, results.md, results.png.
      local: folder with local copies of the benchmarks.
      samples: responses to each problem; 0 takes each benchmark's own number.
      protocol: justrl_released seeds as JustRL's scripts do, and adds their figures; its judge is the caller's.
      judge: opens what reads what the rules refuse; None grades by rule only.
      devices: where vLLM servers run that are started.

    Returns:
      what is in results.json.

    Raises:
      InputError: for whatever cannot be used as it is.
    """
    tokenizer = data.load_tokenizer(str(folder))
    data.check_template(tokenizer, recipe.data)
    tasks = load_tasks(chosen, recipe, tokenizer, local, samples)
    out.mkdir(parents=True, exist_ok=True)
    settings = _settle(out, model, folder, recipe, protocol, tasks)

    responses = _generate(folder, recipe, settings["seed"], tasks, out, tokenizer, devices, say)
    rule = {}
    for task in tasks:
        flat = [response for group in responses[task.name] for response in group]
        right = grade_many([(response.response, response.answer) for response in flat])
        rule[task.name] = np.array(right).reshape(len(task.prompts), task.samples)
        say(f"{task.name}: {rule[task.name].mean():.2%} by rule")
    labels: dict[str, np.ndarray] = {}
    judged: dict[str, Any] | None = None
    if judge:
        try:
            with judge() as asked:
                labels = _ask(asked, tasks, responses, rule, say)
                judged = asked.settings()
        except InputError as error:  # a server that was to be started
            say(f"{error}. The scores by rule are kept; the same command asks the judge")

    per_problem: dict[str, dict[str, np.ndarray]] = {stage: {} for stage in tables.STAGES}
    found: dict[str, Any] = {}
    for task in tasks:
        groups, marks, said = responses[task.name], rule[task.name], labels.get(task.name)
        answered = said is not None and not any(x is None for x in said.flat)
        both = marks | (said == "A") if answered else None
        _write_scores(_path(out, task), marks, said)
        found[task.name] = tables.describe(groups) | {"rule": tables.measure(marks, groups)}
        found[task.name]["rule+model"] = None if both is None else tables.measure(both, groups)
        found[task.name]["judge"] = None if said is None else _count(said[~marks])
        if protocol == "justrl_released":
            found[task.name]["released"] = tables.released(marks if both is None else both, groups)
        per_problem["rule"][task.name] = marks.mean(axis=1)
        if both is not None:
            per_problem["rule+model"][task.name] = both.mean(axis=1)
    results = {
        "model": model,
        "settings": settings,
        "judge": judged,
        "benchmarks": found,
        "average": {
            stage: tables.average(scores) if len(scores) == len(tasks) else None
            for stage, scores in per_problem.items()
        },
    }
    write_atomically(out / "results.json", json.dumps(results, indent=2))
    write_atomically(out / "results.md", tables.markdown(results, chosen))
    tables.plot(results, chosen, out / "results.png")
    return results


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keeps other evaluations from writing to the same folder.

    Raises:
      InputError: if one does already.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends, however it does
        except BlockingIOError:
            raise InputError(
                f"{out}: another evaluation is writing there; wait for it, or give another --out"
            ) from None
        yield


def _settle(
    out: Path, model: str, folder: Path, recipe: config.Recipe, protocol: str, tasks: list[Task]
) -> dict[str, Any]:
    """What every response depends on, the same for all in the folder; written to settings.json.

    Raises:
      InputError: if the folder has responses of something else.
    """
    path = out / "settings.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    seed = recipe.run.seed
    if protocol == "justrl_released":  # whose seeds come from an unseeded generator
        seed = before.get("seed", secrets.randbelow(2**31 - 1))
    weights = blake3(max_threads=blake3.AUTO)
    for file in sorted(folder.glob("*.safetensors")):
        weights.update_mmap(file)
    settings = {
        "weights": weights.hexdigest(),
        "protocol": protocol,
        "seed": seed,
        "temperature": recipe.eval.temperature,
        "top_p": recipe.eval.top_p,
        "max_tokens": recipe.rollout.max_tokens,
        "engine": recipe.rollout.engine,
        "dtype": recipe.model.dtype,
    }
    prompts = {
        task.name: blake3(
            b"".join(b"%d:" % len(p.tokens) + p.tokens.tobytes() for p in task.prompts)
        ).hexdigest()
        for task in tasks
    }
    for name, value in settings.items():
        if name in before and before[name] != value:
            raise InputError(
                f"{out}: its responses are of {name} = {before[name]}, not {value}; give another --out, or delete it"
            )
    for name, value in prompts.items():
        if before.get("prompts", {}).get(name, value) != value:
            raise InputError(
                f"{out}: its responses to {name} are to other prompts; give another --out, or delete it"
            )
    settings = {"model": model} | before | settings | {"prompts": before.get("prompts", {}) | prompts}
    write_atomically(path, json.dumps(settings, indent=2))
    return settings


def _path(out: Path, task: Task) -> Path:
    """The file of a task's responses."""
    return out / f"{task.name}.jsonl"


def _generate(
    folder: Path, recipe: config.Recipe, seed: int, tasks: list[Task], out: Path, tokenizer: Any,
    devices: servers.Devices, say: Callable[[str], None],
) -> dict[str, list[list[Response]]]:  # fmt: skip
    """Responses of all tasks; loads the model only if some are missing."""
    there = {task.name: len(read(_path(out, task), len(task.prompts), task.samples)) for task in tasks}
    wanted = {task.name: len(task.prompts) * task.samples for task in tasks}
    decode = data.detokenizer(tokenizer)
    params = SamplingParams(
        recipe.eval.temperature, recipe.eval.top_p, 0, recipe.rollout.max_tokens, hf.stop_ids(folder)
    )
    longest = max(len(prompt.tokens) for task in tasks for prompt in task.prompts)
    if there == wanted:
        sampler: Any = None
        return {
            t.name: generate(t.prompts, t.samples, params, (seed,), sampler, _path(out, t), decode) for t in tasks
        }
    room = hf.read_config(folder).max_positions - longest
    if room < params.max_tokens:
        raise InputError(
            f"{folder}: {params.max_tokens} new tokens after a prompt of {longest} are more than the model's "
            f"{room + longest} positions; set --rollout.max-tokens to {room} or less"
        )
    recipe = dataclasses.replace(
        recipe,
        run=dataclasses.replace(recipe.run, directory=str(out)),
        data=dataclasses.replace(recipe.data, max_prompt_tokens=longest),
    )
    from jaxrl.parallel.mesh import make_mesh
    from jaxrl.sampling.open import open_own_sampler

    mesh = make_mesh(recipe.mesh.data, recipe.mesh.fsdp)
    weights = hf.load(folder, mesh=mesh)
    responses = {}
    with (
        open_own_sampler(recipe, folder, weights.config, mesh, say, devices) as sampler,
        Progress(len(tasks), 0, title="benchmarks", quiet=not sys.stdout.isatty()) as progress,
    ):
        sampler.publish(weights.params, 0)
        for i, task in enumerate(tasks):
            progress.phase(task.name, wanted[task.name], there[task.name])
            told = _teller(task.name, there[task.name], wanted[task.name], progress, say)
            responses[task.name] = generate(
                task.prompts, task.samples, params, (seed, zlib.crc32(task.name.encode()) >> 1), sampler, _path(out, task),
                decode, told, CALLS if recipe.rollout.engine == "vllm" else 1,
            )  # fmt: skip
            progress.step_done(i, {})
    return responses


def _teller(
    name: str, done: int, total: int, progress: Progress, say: Callable[[str], None]
) -> Callable[[Rollout], None]:
    """Moves the bar; where that cannot be seen, prints a line now and then."""
    began = last = time.monotonic()
    first, tokens, live = done, 0, sys.stdout.isatty()

    def told(rollout: Rollout) -> None:
        nonlocal done, tokens, last
        done, tokens, now = done + 1, tokens + len(rollout.tokens), time.monotonic()
        progress.advance(rollout)
        if not live and (now > last + EVERY or done == total):
            last, seconds = now, max(now - began, 1e-9)
            left = datetime.timedelta(seconds=round((total - done) * seconds / (done - first)))
            say(f"{name}: {done:,}/{total:,} responses, {tokens / seconds:,.0f} tokens/s, ETA {left}")

    return told


def _ask(
    judge: Judge, tasks: list[Task], responses: dict[str, list[list[Response]]], rule: dict[str, np.ndarray],
    say: Callable[[str], None],
) -> dict[str, np.ndarray]:  # fmt: skip
    """Labels [P, G] of what the rules refused; "" where they did not, None where nobody answered."""
    labels = {}
    for task in tasks:
        marks = rule[task.name]
        candidates = [
            Candidate(task.problems[p].question, r.answer, r.response, r.finish_reason == "length")
            for p, group in enumerate(responses[task.name])
            for g, r in enumerate(group)
            if not marks[p, g]
        ]
        labels[task.name] = np.full(marks.shape, "", object)
        labels[task.name][~marks] = judge.labels(candidates)
    missing = sum(label is None for said in labels.values() for label in said.flat)
    if missing:
        say(
            f"the judge left {missing:,} responses unanswered: {judge.down}. The scores by rule are kept; the same "
            "command asks for the rest"
        )
    return labels


def _count(labels: np.ndarray) -> dict[str, int]:
    return dict(sorted(Counter("pending" if x is None else x or "no label" for x in labels).items()))


def _write_scores(path: Path, marks: np.ndarray, labels: np.ndarray | None) -> None:
    rows = (
        {"problem": p, "sample": g, "rule": bool(marks[p, g])}
        | ({} if labels is None else {"judge": labels[p, g]})
        for p, g in np.ndindex(*marks.shape)
    )
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(path.with_suffix(".scores.jsonl"), text)
