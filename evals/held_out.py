"""Accuracy on held-out problems with the training verifier: the before and after of a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from evals.statistics import confidence
from jaxrl import config, data
from jaxrl.errors import InputError
from jaxrl.files import write_atomically
from jaxrl.marking import make_marker
from jaxrl.models import hf
from jaxrl.parallel import processes
from jaxrl.parallel.mesh import make_mesh
from jaxrl.results import HeldOutResult
from jaxrl.sampling import servers
from jaxrl.sampling.across_processes import Shared
from jaxrl.sampling.open import open_sampler
from jaxrl.telemetry.progress import Progress
from jaxrl.types import Groups, OnRollout, Prompt, Rollout, SamplingParams, Say, Tokenizer


def load_problems(recipe: config.Recipe, tokenizer: Tokenizer) -> list[Prompt]:
    """The problems of `eval.path`.

    Raises:
      InputError: if it is empty or cannot be read.
    """
    if not recipe.eval.path:
        raise InputError("eval.path is empty; name a .parquet or .jsonl file of held-out problems")
    section = recipe.eval
    return data.load_prompts(recipe.data, tokenizer, path=section.path, limit=section.problems).prompts


def evaluate(
    recipe: config.Recipe,
    model: str | Path,
    out: Path,
    name: str,
    step: int,
    devices: servers.Devices = servers.CPU,
    say: Say = print,
) -> HeldOutResult:
    """Evaluates a model on a recipe's held-out problems.

    Args:
      recipe: with [data], [reward], [eval], and how to sample.
      model: Hugging Face folder or Hub id.
      out: the JSON file to write.
      name: what the result is called.
      step: steps that the model was trained.
      devices: where started vLLM servers run.
      say: prints a line.

    Raises:
      InputError: for what cannot be used; if the sampler refuses a problem.
    """
    folder = hf.resolve(model)
    mesh = make_mesh()  # of what this process uses, which may be less than training did
    loaded = hf.load(folder, mesh=mesh)
    tokenizer = data.load_tokenizer(str(folder))
    mark = make_marker(recipe, data.detokenizer(tokenizer))
    problems = load_problems(recipe, tokenizer)
    sampling = SamplingParams(max_tokens=recipe.rollout.max_tokens, stop_ids=hf.stop_ids(folder))
    with (
        open_sampler(recipe, folder, loaded.config, mesh, say, devices) as sampler,
        Progress(1, 0, title=f"eval {name}") as progress,
    ):
        sampler.publish(loaded.params, 0)
        result = measure(recipe, sampler, problems, sampling, mark, progress, out, name, step)
    low, high = result["ci95"]
    say(
        f"{name}: accuracy {result['accuracy']:.3f} (95% {low:.3f} to {high:.3f}) on {result['problems']} "
        f"problems x {result['samples']}, mean length {result['length_mean']:.1f} tokens -> {out}"
    )
    return result


def measure(
    recipe: config.Recipe,
    sampler: Shared,
    problems: Sequence[Prompt],
    sampling: SamplingParams,
    mark: OnRollout,
    progress: Progress,
    out: Path,
    name: str,
    step: int,
) -> HeldOutResult:
    """Measures the held-out accuracy of what the sampler holds, and writes it to `out` as JSON."""
    samples = recipe.eval.samples
    progress.phase("eval", total=len(problems) * samples)

    def on_rollout(rollout: Rollout) -> Rollout:
        progress.advance(rollout)
        return mark(rollout)

    params = evaluation_params(recipe, sampling)
    own = sampler.generate(problems, samples, params, (recipe.run.seed,), on_rollout)
    groups = sampler.gather(own, problems, f"evaluation {name} {step}")
    result = summary(groups, params, name, step)
    if processes.chief():
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, json.dumps(result, indent=2))
    return result


def evaluation_params(recipe: config.Recipe, sampling: SamplingParams) -> SamplingParams:
    """How an evaluation samples: training's stop tokens with the settings of [eval]."""
    e = recipe.eval
    longest = e.max_tokens or recipe.rollout.max_tokens
    return dataclasses.replace(
        sampling, temperature=e.temperature, top_p=e.top_p, top_k=0, max_tokens=longest
    )


def summary(groups: Groups, params: SamplingParams, name: str, step: int) -> HeldOutResult:
    """Summarizes marked responses [P][G] to held-out problems.

    Raises:
      InputError: if there is a problem without responses.
    """
    if not all(groups):
        refused = sum(not group for group in groups)
        raise InputError(f"{refused} of {len(groups)} problems were refused by the sampler; see above why")
    samples = len(groups[0])
    right = np.array([[rollout.score for rollout in group] for group in groups]) > 0  # [P, G]
    per_problem = right.mean(axis=1)
    flat = [rollout for group in groups for rollout in group]
    result: HeldOutResult = {
        "name": name,
        "step": step,
        "accuracy": float(per_problem.mean()),
        "ci95": confidence(per_problem),
        f"pass@{samples}": float(right.any(axis=1).mean()),  # type: ignore[misc]  # one key for each N
        "problems": len(groups),
        "samples": samples,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "length_mean": float(np.mean([len(r.tokens) for r in flat])),
        "truncated_fraction": float(np.mean([r.finish_reason == "length" for r in flat])),
    }
    return result
