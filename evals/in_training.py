"""Evaluation during training by the run's own sampler.

Responses to held-out problems are marked by the run's verifier. Benchmarks have the run's instruction, and are graded
by rule.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

from blake3 import blake3

from evals import benchmarks, held_out, measures
from evals.generate import Response
from evals.held_out import HeldOut
from evals.task import Task, load_tasks
from jaxrl import config, data
from jaxrl.checkpoint import identity
from jaxrl.errors import InputError
from jaxrl.files import set_aside, write_atomically
from jaxrl.parallel import processes
from jaxrl.results import Average, TaskResult, TrainingResult
from jaxrl.run import Run, Setup
from jaxrl.types import Detokenize, Prompt, Rollout, SamplingParams, Tokenizer


@dataclasses.dataclass(frozen=True)
class InTraining:
    """The evaluations that a recipe wants during training."""

    problems: list[Prompt]  # held out
    tasks: list[Task]  # benchmarks

    def __call__(self, run: Run, steps: int) -> None:
        """Writes eval/step_N.json and eval/benchmarks/step_N.json, unless they exist since before a restart.

        Results of another run, or of another [eval], are kept aside.
        """
        setup, own = run.setup, self._identity(run.setup, steps)
        work = setup.works[setup.stage_at(steps - 1).number]
        params = held_out.evaluation_params(work.recipe, work.sampling.stop_ids)
        for out in self._missing(setup, steps, own):
            if processes.chief() and out.exists():
                aside = set_aside(out, out.parent / "other")
                run.say(f"{out} is of another run or other settings, and now {aside}")
            if out.parent.name == "benchmarks":
                run_benchmarks(run, self.tasks, params, out, steps, own)
            else:
                mark = held_out.marker(work.recipe, run.setup.detokenize)
                problems = HeldOut(work.recipe, self.problems, params, mark)
                problems.measure(run.sampler, run.progress, out, "step", steps, own)

    def missing(self, setup: Setup, steps: int) -> bool:
        """Whether a result of this run after so many steps is missing."""
        return bool(self._missing(setup, steps, self._identity(setup, steps)))

    def _missing(self, setup: Setup, steps: int, own: str) -> list[Path]:
        folder, name = setup.directory / "eval", f"step_{steps:06d}.json"
        wanted = [folder / name] * bool(self.problems) + [folder / "benchmarks" / name] * bool(self.tasks)
        return [out for out in wanted if not _is_of(out, own)]

    def _identity(self, setup: Setup, steps: int) -> str:
        """A digest of the run so far and of how it is evaluated, on what."""
        section = dataclasses.asdict(setup.stage_at(steps - 1).recipe.eval)
        how = {key: section[key] for key in held_out.SAMPLED}
        if section["verifier"]:
            how["verifier"] = section["verifier"]
        prompts = [*self.problems, *(prompt for task in self.tasks for prompt in task.prompts)]
        asked = [(prompt.tokens.tolist(), prompt.answer) for prompt in prompts]
        return blake3(
            json.dumps([identity(setup.recipe, setup.content(steps), steps), how, asked]).encode()
        ).hexdigest()


def _is_of(out: Path, identity: str) -> bool:
    """Whether a file has a result of this identity; those of older versions have none."""
    try:
        found = json.loads(out.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(found, dict) and found.get("identity", identity) == identity


def load(recipe: config.Recipe, tokenizer: Tokenizer, vocabulary: data.Vocabulary) -> InTraining:
    """Loads the problems that `eval.path` and `eval.benchmarks` name.

    Raises:
      InputError: if something cannot be read.
    """
    problems = held_out.load_problems(recipe, tokenizer, vocabulary) if recipe.eval.path else []
    tasks = load_benchmarks(recipe, tokenizer, vocabulary) if recipe.eval.benchmarks else []
    return InTraining(problems, tasks)


def load_benchmarks(
    recipe: config.Recipe, tokenizer: Tokenizer, vocabulary: data.Vocabulary | None = None
) -> list[Task]:
    """Loads the benchmarks of `eval.benchmarks`.

    Raises:
      InputError: if one cannot be read, or has a prompt that is too long for the recipe.
    """
    section, limit = recipe.eval, recipe.data.max_prompt_tokens
    folder = Path(section.benchmark_folder) if section.benchmark_folder else None
    chosen = benchmarks.select(section.benchmarks)
    tasks = load_tasks(chosen, recipe, tokenizer, folder, section.benchmark_samples, vocabulary)
    for task in tasks:
        if task.longest > limit:
            raise InputError(
                f"eval.benchmarks: a prompt of {task.name} has {task.longest} tokens; raise "
                f"data.max_prompt_tokens = {limit}, or leave {task.name} to jaxrl eval"
            )
    return tasks


def run_benchmarks(
    run: Run, tasks: Sequence[Task], params: SamplingParams, out: Path, steps: int, identity: str
) -> None:
    """Evaluates what the sampler holds on benchmarks, by rule, and writes the result to `out` as JSON."""
    progress, sampler = run.progress, run.sampler

    def on_rollout(rollout: Rollout) -> Rollout:
        progress.advance(rollout)
        return rollout

    began = time.monotonic()
    prompts = [prompt for task in tasks for prompt in task.prompts for _ in range(task.samples)]
    progress.phase("benchmarks", total=len(prompts))
    own = sampler.generate(prompts, 1, params, (run.recipe.run.seed,), on_rollout)
    responses = sampler.gather(own, prompts, f"benchmarks after step {steps}")
    if not processes.chief():
        return
    progress.phase("grading")
    if not all(responses):
        refused = responses.count([])
        run.say(
            f"no result after step {steps}: {refused} responses were refused by the sampler; see above why"
        )
        return
    found, average, corrected = measure(tasks, [group[0] for group in responses], run.setup.detokenize)
    result: TrainingResult = {
        "step": steps,
        "benchmarks": found,
        "average": average,
        "corrected": corrected,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "max_tokens": params.max_tokens,
        "seconds": time.monotonic() - began,
        "identity": identity,
    }
    write_atomically(out, json.dumps(result, indent=2))


def measure(
    tasks: Sequence[Task], rollouts: Sequence[Rollout], detokenize: Detokenize
) -> tuple[dict[str, TaskResult], Average, Average]:
    """Grades responses by both rules, and measures each benchmark as `jaxrl eval` does.

    Args:
      tasks: benchmarks, each of P problems with G responses.
      rollouts: the responses to each one's problems in order, those to one problem side by side.
      detokenize: token ids to text.

    Returns:
      the result of each benchmark, by name, and their averages by rule and by the corrected rules.
    """
    texts = [detokenize(r.tokens) for r in rollouts]
    pairs = [(text, r.prompt.answer) for text, r in zip(texts, rollouts, strict=True)]
    marks = measures.grade_by_both(pairs)
    found, per_problem, at = dict[str, TaskResult](), [], 0
    for task in tasks:
        own = slice(at, at + task.total)
        rows = [
            Response(*divmod(i, task.samples), r.prompt.answer, len(r.tokens), r.finish_reason, text)
            for i, (r, text) in enumerate(zip(rollouts[own], texts[own], strict=True))
        ]
        responses = [rows[i : i + task.samples] for i in range(0, task.total, task.samples)]
        shape = len(task.prompts), task.samples
        grades, corrected, undecided = (each[own].reshape(shape) for each in marks)
        found[task.name] = {
            "title": task.title,
            "undecided": int(undecided.sum()),
            **measures.describe(responses),
            **measures.measure(grades, responses),
            "corrected": measures.measure(corrected, responses),
            "right": grades.sum(axis=1).tolist(),
        }
        per_problem.append((grades.mean(axis=1), corrected.mean(axis=1)))
        at += task.total
    by_rule, by_corrected = (measures.average(values) for values in zip(*per_problem, strict=True))
    return found, by_rule, by_corrected
