"""`jaxrl eval MODEL --benchmarks ...`: generate, grade, ask the judge, write the tables. Each step can be repeated."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from blake3 import blake3
from jaxtyping import Bool, Shaped

from evals import measures, tables
from evals.benchmarks import Benchmark
from evals.generate import Response, Responses, generate, in_order, read
from evals.grade import undecided_note
from evals.judge import Candidate, Judge
from evals.sampling import reporter, vllm_options
from evals.task import Task, load_tasks
from jaxrl import config, data
from jaxrl.errors import InputError, RunError
from jaxrl.files import write_atomically
from jaxrl.models import hf
from jaxrl.models.tensors import hash_weights
from jaxrl.parallel.mesh import make_mesh
from jaxrl.results import (
    Average,
    BenchmarkResult,
    BenchmarksResult,
    EvalProtocol,
    Grading,
    JudgeSettings,
    Settings,
)
from jaxrl.sampling import servers
from jaxrl.sampling.open import open_own_sampler
from jaxrl.telemetry.progress import Progress
from jaxrl.types import Detokenize, JsonObject, SamplingParams, Say

SUFFIX = " Please reason step by step, and put your final answer within \\boxed{}."
# JustRL's evaluation, as a recipe. Ours is only the number of requests that a vLLM server gets at one time.
PROTOCOL: dict[str, dict[str, object]] = {
    "data": {"suffix": SUFFIX},
    "rollout": {"max_tokens": 31_744},
    "eval": {"temperature": 0.7, "top_p": 0.9},
    "packing": {"stream_tokens": 1 << 20},  # nothing is packed: room for any length
    "sampler": {"concurrency": 256},
}
TOP_K = 0  # all tokens
CALLS = 64  # of a vLLM sampler at one time

# Opens a judge that keeps its files in a folder.
OpenJudge = Callable[[Path], contextlib.AbstractContextManager[Judge]]


@dataclasses.dataclass(frozen=True)
class Job:
    """A model, benchmarks, and how it is evaluated on them."""

    model: str  # its name, for people
    folder: Path  # its Hugging Face folder
    chosen: Mapping[str, Benchmark]  # by name
    recipe: config.Recipe  # how to sample: PROTOCOL with changes
    out: Path  # folder for the results
    local: Path | None = None  # folder with local copies of the benchmarks
    samples: int = 0  # responses to each problem; 0 takes each benchmark's own number
    # justrl_released draws seeds as JustRL's scripts do, and adds their figures.
    protocol: EvalProtocol = "default"

    def file(self, task: Task) -> Path:
        """The file of a task's responses."""
        return self.out / f"{task.name}.jsonl"


@dataclasses.dataclass(frozen=True)
class Graded:
    """A task's responses and their grades."""

    task: Task
    responses: Responses  # [P][G]
    rule: Bool[np.ndarray, "P G"]  # right by rule
    undecided: int  # by either rules, and so wrong
    corrected: Bool[np.ndarray, "P G"]  # right by the corrected rules
    labels: Shaped[np.ndarray, "P G"] | None = None  # see `_ask`; None without a judge

    @property
    def judged(self) -> Bool[np.ndarray, "P G"] | None:
        """Right by rule or by the judge; None unless all that the rules refuse has been judged."""
        if self.labels is None or any(label is None for label in self.labels.flat):
            return None
        return self.rule | (self.labels == "A")

    def right(self, grading: Grading) -> Bool[np.ndarray, "P G"] | None:
        """The grades of one grading; None where it is incomplete."""
        return {"rule": self.rule, "rule+model": self.judged, "corrected": self.corrected}[grading]


def evaluate(
    job: Job,
    open_judge: OpenJudge | None = None,
    devices: servers.Devices = servers.CPU,
    say: Say = print,
) -> BenchmarksResult:
    """Evaluates a model on benchmarks, and goes on where that was interrupted.

    It writes NAME.jsonl (responses), NAME.scores.jsonl, settings.json, results.json, results.md and results.png.

    Args:
      job: what is evaluated, and how.
      open_judge: opens the judge of what the rules refuse; None grades by rule only.
      devices: where started vLLM servers run.
      say: prints a line.

    Returns:
      what is in results.json.

    Raises:
      InputError: for whatever cannot be used.
      RunError: if a server stops, does not get ready or does not answer.
    """
    tokenizer = data.load_tokenizer(str(job.folder))
    vocabulary = data.read_vocabulary(job.folder, tokenizer, hf.read_config(job.folder).vocab_size)
    say(vocabulary.summary)
    tasks = load_tasks(job.chosen, job.recipe, tokenizer, job.local, job.samples, vocabulary)
    job.out.mkdir(parents=True, exist_ok=True)
    settings = _settle(job, tasks, vocabulary.stop_ids)
    detokenize, stop_ids = data.detokenizer(tokenizer), vocabulary.stop_ids
    responses = _generate(job, settings["seed"], tasks, stop_ids, detokenize, devices, say)
    graded = [_grade(task, responses[task.name], say) for task in tasks]
    judge: JudgeSettings | None = None
    unjudged: InputError | RunError | None = None
    if open_judge:
        try:
            with open_judge(job.out) as asked:
                graded, judge = _ask(asked, graded, say), asked.settings()
        except (InputError, RunError) as error:  # the judge's server could not be started
            unjudged = type(error)(f"{error}. The grades by rule are kept; the same command asks the judge")
    results = _write(job, settings, judge, graded)
    if unjudged:
        raise unjudged
    return results


def _settle(job: Job, tasks: Sequence[Task], stop_ids: tuple[int, ...]) -> Settings:
    """Writes settings.json: all that a response depends on, the same for all in the folder.

    Raises:
      InputError: if the folder has responses of other settings, or of some that it does not name.
    """
    path, recipe = job.out / "settings.json", job.recipe
    before: JsonObject = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    seed = recipe.run.seed
    if job.protocol == "justrl_released":  # JustRL's seeds come from an unseeded generator
        seed = before.get("seed", secrets.randbelow(2**31 - 1))
    prompts = {task.name: _hash_prompts(task) for task in tasks}
    settings: Settings = {
        "model": before.get("model", job.model),
        "weights": hash_weights(job.folder),
        "protocol": job.protocol,
        "seed": seed,
        "temperature": recipe.eval.temperature,
        "top_p": recipe.eval.top_p,
        "max_tokens": recipe.rollout.max_tokens,
        "top_k": TOP_K,
        "stop_ids": list(stop_ids),
        "tokenizer": data.tokenizer_digest(job.folder),
        "config": blake3((job.folder / "config.json").read_bytes()).hexdigest(),
        "engine": recipe.rollout.engine,
        "dtype": recipe.model.dtype,
        "vllm_options": vllm_options(recipe),
        "prompts": before.get("prompts", {}) | prompts,
    }
    remedy = "give another --out, or delete it"
    for name, value in settings.items():
        if name != "prompts" and before.get(name, value) != value:
            raise InputError(
                f"{job.out}: its responses are of {name} = {before[name]}, not {value}; {remedy}"
            )
    for name, value in prompts.items():
        if before.get("prompts", {}).get(name, value) != value:
            raise InputError(f"{job.out}: its responses to {name} are to other prompts; {remedy}")
    unknown = {name: value for name, value in settings.items() if before and name not in before}
    unknown.pop("top_k", None)  # older versions had no other
    if not recipe.sampler.servers:
        unknown.pop("vllm_options", None)
    if unknown:
        raise InputError(
            f"{path}: an older version wrote it without {', '.join(unknown)}, so its responses may be of others; "
            f"give another --out, or if they are of these, add {json.dumps(unknown)[1:-1]}"
        )
    write_atomically(path, json.dumps(before | settings, indent=2))
    return settings


def _hash_prompts(task: Task) -> str:
    parts = (b"%d:" % len(prompt.tokens) + prompt.tokens.tobytes() for prompt in task.prompts)
    return blake3(b"".join(parts)).hexdigest()


def _generate(
    job: Job,
    seed: int,
    tasks: Sequence[Task],
    stop_ids: tuple[int, ...],
    detokenize: Detokenize,
    devices: servers.Devices,
    say: Say,
) -> dict[str, list[list[Response]]]:
    """Returns the responses to all tasks, by name; loads the model only if some are missing."""
    found = {task.name: read(job.file(task), len(task.prompts), task.samples) for task in tasks}
    if all(len(found[task.name]) == task.total for task in tasks):
        return {task.name: in_order(found[task.name], len(task.prompts), task.samples) for task in tasks}
    recipe, parallel = _fitted(job, tasks), CALLS if job.recipe.rollout.engine == "vllm" else 1
    section, longest = recipe.eval, recipe.rollout.max_tokens
    params = SamplingParams(section.temperature, section.top_p, TOP_K, longest, stop_ids)
    mesh = make_mesh(recipe.mesh.data, recipe.mesh.fsdp)
    model = hf.load(job.folder, mesh=mesh)
    responses = {}
    with (
        open_own_sampler(recipe, job.folder, model.config, mesh, say, devices) as sampler,
        Progress(len(tasks), 0, title="benchmarks", quiet=not sys.stdout.isatty()) as progress,
    ):
        sampler.publish(model.params, 0)
        for i, task in enumerate(tasks):
            done = len(found[task.name])
            progress.phase(task.name, task.total, done)
            on_rollout = reporter(task.name, task.total, done, progress, say)
            seeds = (seed, zlib.crc32(task.name.encode()) >> 1)  # JAX folds in 31 bits
            responses[task.name] = generate(
                task, params, seeds, sampler, job.file(task), detokenize, on_rollout, parallel
            )
            progress.step_done(i, {})
    return responses


def _fitted(job: Job, tasks: Sequence[Task]) -> config.Recipe:
    """The recipe with this evaluation's folder and longest prompt.

    Raises:
      InputError: if the model has no room for the longest response after it.
    """
    longest, wanted = max(task.longest for task in tasks), job.recipe.rollout.max_tokens
    positions = hf.read_config(job.folder).positions
    if positions - longest < wanted:
        raise InputError(
            f"{job.folder}: {wanted} new tokens after a prompt of {longest} are more than the model's {positions} "
            f"positions; set --rollout.max-tokens to {positions - longest} or less"
        )
    return dataclasses.replace(
        job.recipe,
        run=dataclasses.replace(job.recipe.run, directory=str(job.out)),
        data=dataclasses.replace(job.recipe.data, max_prompt_tokens=longest),
    )


def _grade(task: Task, responses: Responses, say: Say) -> Graded:
    """Grades the responses to a task by rule, and by the corrected rules."""
    pairs = [
        (response.response, prompt.answer)  # not the row's: a reference may have been corrected since
        for prompt, group in zip(task.prompts, responses, strict=True)
        for response in group
    ]
    shape = len(task.prompts), task.samples
    right, corrected, undecided = (marks.reshape(shape) for marks in measures.grade_by_both(pairs))
    say(f"{task.name}: {right.mean():.2%} by rule, {corrected.mean():.2%} by the corrected rules")
    if count := int(undecided.sum()):
        say(f"{task.name}: {undecided_note(count)}")
    return Graded(task, responses, right, count, corrected)


def _ask(judge: Judge, graded: Sequence[Graded], say: Say) -> list[Graded]:
    """Adds the judge's labels.

    They are A, B, C or "" for what the rules refuse, and "" for the rest; None where the judge did not answer.
    """
    labeled = []
    for g in graded:
        candidates = [
            Candidate(problem.question, prompt.answer, r.response, r.finish_reason == "length")
            for problem, prompt, group, marks in zip(
                g.task.problems, g.task.prompts, g.responses, g.rule, strict=True
            )
            for r, right in zip(group, marks, strict=True)
            if not right
        ]
        labels = np.full(g.rule.shape, "", object)
        labels[~g.rule] = judge.labels(candidates)
        labeled.append(dataclasses.replace(g, labels=labels))
    missing = sum(label is None for g in labeled if g.labels is not None for label in g.labels.flat)
    if missing:
        say(
            f"the judge left {missing:,} responses unanswered: {judge.down}. The grades by rule are kept; the same "
            "command asks for the rest"
        )
    return labeled


def _write(
    job: Job, settings: Settings, judge: JudgeSettings | None, graded: Sequence[Graded]
) -> BenchmarksResult:
    """Writes the grades and what they amount to; returns the latter."""
    for g in graded:
        _write_grades(job.file(g.task).with_suffix(".scores.jsonl"), g)
    results: BenchmarksResult = {
        "model": job.model,
        "settings": settings,
        "judge": judge,
        "benchmarks": {g.task.name: _result(g, job.protocol) for g in graded},
        "average": {grading: _average(graded, grading) for grading in tables.GRADINGS},
    }
    titles = {g.task.name: g.task.title for g in graded}
    write_atomically(job.out / "results.json", json.dumps(results, indent=2))
    write_atomically(job.out / "results.md", tables.markdown(results, titles))
    tables.plot(results, titles, job.out / "results.png")
    return results


def _result(g: Graded, protocol: EvalProtocol) -> BenchmarkResult:
    judged, counts = g.judged, None if g.labels is None else Counter(map(_shown, g.labels[~g.rule]))
    result: BenchmarkResult = {
        **measures.describe(g.responses),
        "undecided": g.undecided,
        "rule": measures.measure(g.rule, g.responses),
        "rule+model": None if judged is None else measures.measure(judged, g.responses),
        "corrected": measures.measure(g.corrected, g.responses),
        "judge": None if counts is None else dict(sorted(counts.items())),
    }
    if protocol == "justrl_released":
        result["released"] = measures.released(g.rule if judged is None else judged, g.responses)
    return result


def _shown(label: str | None) -> str:
    return "pending" if label is None else label or "no label"


def _average(graded: Sequence[Graded], grading: Grading) -> Average | None:
    """The average over the benchmarks; None while one of them lacks this grading."""
    right = [g.right(grading) for g in graded]
    complete = [marks.mean(axis=1) for marks in right if marks is not None]
    return measures.average(complete) if len(complete) == len(right) else None


def _write_grades(path: Path, g: Graded) -> None:
    """Writes a row for each response: the grades by both rules and, if there was a judge, its label."""
    lines = []
    for p, s in np.ndindex(*g.rule.shape):
        row = {"problem": p, "sample": s, "rule": bool(g.rule[p, s]), "corrected": bool(g.corrected[p, s])}
        lines.append(json.dumps(row if g.labels is None else row | {"judge": g.labels[p, s]}) + "\n")
    write_atomically(path, "".join(lines))
