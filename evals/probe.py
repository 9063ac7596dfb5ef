"""`jaxrl probe`: accuracy and diversity over the sampling temperature, and the temperature to train with.

As Polaris does it (https://hkunlp.github.io/blog/2025/Polaris). A hotter sampler is more diverse, until its answers
fall apart: the temperature to train with is the hottest one that costs little accuracy.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np
from blake3 import blake3
from jaxtyping import Float64

from evals.grade import undecided_note
from evals.held_out import right_ones
from evals.sampling import reporter, vllm_options
from evals.statistics import confidence, distinct_4grams
from jaxrl import config, data
from jaxrl.config.sections import COLDEST
from jaxrl.data.prompts import spread
from jaxrl.errors import InputError
from jaxrl.files import set_aside, write_atomically
from jaxrl.marking import columns_for, finished, functions_of, make_marker
from jaxrl.models import hf
from jaxrl.models.tensors import hash_weights
from jaxrl.parallel.mesh import make_mesh
from jaxrl.sampling import servers
from jaxrl.sampling.open import open_own_sampler
from jaxrl.telemetry.progress import Progress
from jaxrl.types import Groups, JsonObject, Marker, OnRollout, Prompt, Rollout, SamplingParams, Say

HOTTEST_OF_VLLM = 2.0  # temperature; its servers refuse hotter ones

Zone = Literal["cold", "robust", "exploration", "collapse"]


class Measured(TypedDict):
    """What was measured at one temperature."""

    temperature: float
    accuracy: float  # mean over problems of the share of their samples that is right
    ci95: list[float]  # low, high: bootstrap over problems
    distinct_4gram: (
        float  # share of distinct ones among the 4-grams of a problem's tokens, mean over problems
    )
    distinct_4gram_ci95: list[float]
    entropy: float  # nats a token, see `measure`
    length_mean: float  # tokens
    truncated_fraction: float
    undecided: int  # responses that count as wrong because comparing the answer is too much work
    right: list[int]  # of each problem's samples


class Placed(TypedDict):
    """The zone of a temperature, and how far its accuracy is below the best one."""

    temperature: float
    zone: Zone
    loss: float  # mean over problems of the best temperature's share of right samples, less this one's
    loss_ci95: list[float]  # low, high: bootstrap over problems


class Probed(TypedDict):
    """probe.json."""

    settings: JsonObject  # all that the results depend on, the temperature aside
    results: list[Measured]  # by temperature
    most_loss: float  # of the zones
    zones: list[Placed]  # of the results


@dataclasses.dataclass(frozen=True)
class Job:
    """A model, and what is asked of it."""

    recipe: config.Recipe  # with [data], [reward], and how to sample; without stages
    folder: Path  # the model's Hugging Face folder
    out: Path  # folder for the results
    temperatures: tuple[float, ...]
    problems: int  # of the training data, at most
    samples: int  # G, responses to each problem
    most_loss: float  # see `zones`

    @property
    def file(self) -> Path:
        return self.out / "probe.json"


@dataclasses.dataclass(frozen=True)
class Asked:
    """What every temperature is asked, and how the responses are marked."""

    prompts: Sequence[Prompt]
    stop_ids: tuple[int, ...]
    mark: Marker
    settings: JsonObject  # of `Probed`


def temperatures_of(text: str) -> tuple[float, ...]:
    """Reads temperatures that are separated by commas; returns them in order.

    Raises:
      InputError: unless they are at least two finite numbers from COLDEST on, each named once.
    """
    found: list[float] = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            raise InputError(
                f"--temperatures: '{part}' is not a number; separate them by commas, as in 0.6,1.0"
            ) from None
        if not (math.isfinite(value) and value >= COLDEST):
            raise InputError(f"--temperatures: {part} cannot be sampled at; use {COLDEST} or more")
        if value in found:
            raise InputError(f"--temperatures: {part} is there twice; name each temperature once")
        found.append(value)
    if len(found) < 2:
        raise InputError(f"--temperatures: {text} is one; give at least two, to compare them")
    return tuple(sorted(found))


def require_possible(temperatures: Sequence[float], recipe: config.Recipe) -> None:
    """Refuses temperatures that the recipe's sampler does not take.

    Raises:
      InputError: naming the first one.
    """
    too_hot = [t for t in temperatures if t > HOTTEST_OF_VLLM]
    if too_hot and recipe.rollout.engine == "vllm":
        raise InputError(
            f"--temperatures: {too_hot[0]:g} is refused by vLLM servers; use {HOTTEST_OF_VLLM:g} or less"
        )


def probe(job: Job, devices: servers.Devices = servers.CPU, say: Say = print) -> Probed:
    """Measures a model at each temperature, and places these in zones.

    It writes probe.json after each temperature, and goes on with those that are missing. All have the same problems and
    the same noise.

    Args:
      job: what is measured.
      devices: where started vLLM servers run.
      say: prints a line.

    Returns:
      what is in probe.json: the results of other temperatures too that were there before.

    Raises:
      InputError: if something cannot be used, or the sampler refuses a problem.
      RunError: if a server stops, does not get ready or does not answer.
    """
    recipe, tokenizer = job.recipe, data.load_tokenizer(str(job.folder))
    vocabulary = data.read_vocabulary(job.folder, tokenizer, hf.read_config(job.folder).vocab_size)
    say(vocabulary.summary)
    verifier, columns = recipe.reward.marked_by, columns_for(recipe.reward)
    every = data.load_prompts(recipe.data, tokenizer, None, verifier, vocabulary, columns)
    say(every.summary())
    chosen = dataclasses.replace(every, prompts=spread(every.prompts, job.problems), mixture=())
    settings = _settings(job, chosen, vocabulary.stop_ids)
    results = _found(job, settings, say)
    missing = [t for t in job.temperatures if t not in {result["temperature"] for result in results}]
    if missing:
        mark = make_marker(recipe, data.detokenizer(tokenizer), functions_of(recipe))
        asked = Asked(chosen.prompts, vocabulary.stop_ids, mark, settings)
        _sample(job, asked, missing, results, devices, say)
    return _write(job, settings, results)


def _settings(job: Job, chosen: data.PromptSet, stop_ids: tuple[int, ...]) -> JsonObject:
    """All that the results depend on, the temperature aside."""
    recipe = job.recipe
    return {
        "weights": hash_weights(job.folder),
        "config": blake3((job.folder / "config.json").read_bytes()).hexdigest(),
        "tokenizer": data.tokenizer_digest(job.folder),
        "stop_ids": list(stop_ids),
        "problems": len(chosen.prompts),
        "prompts": chosen.digest(),
        "samples": job.samples,
        "max_tokens": recipe.rollout.max_tokens,
        "verifier": recipe.reward.verifier,
        "with_prompt": recipe.reward.with_prompt,
        "thoughts": recipe.reward.thoughts,
        "seed": recipe.run.seed,
        "engine": recipe.rollout.engine,
        "dtype": recipe.model.dtype,
        "vllm_options": vllm_options(recipe),
    }


def _found(job: Job, settings: JsonObject, say: Say) -> list[Measured]:
    """The results that are there; a file of other settings is set aside.

    Raises:
      InputError: if the file is none of a probe's.
    """
    path = job.file
    if not path.exists():
        return []
    try:
        before: Probed = json.loads(path.read_text(encoding="utf-8"))
        others, results = before["settings"], before["results"]
        different = [name for name, value in settings.items() if others.get(name) != value]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: not the results of a probe; delete it, or give another --out") from None
    if not different:
        return results
    name, aside = different[0], set_aside(path, job.out / "other")
    say(f"{path} is of {name} = {others.get(name)}, not {settings[name]}, and now {aside}")
    return []


def _sample(
    job: Job,
    asked: Asked,
    missing: Sequence[float],
    results: list[Measured],
    devices: servers.Devices,
    say: Say,
) -> None:
    """Adds the results of the missing temperatures, and writes the file after each."""
    # the logs of servers are in this command's folder, and published weights are named by it: a run may be at work
    run = dataclasses.replace(job.recipe.run, directory=str(job.out))
    recipe, mesh = dataclasses.replace(job.recipe, run=run), make_mesh()
    model, done, total = hf.load(job.folder, mesh=mesh), len(results), len(asked.prompts) * job.samples
    with (
        open_own_sampler(recipe, job.folder, model.config, mesh, say, devices) as sampler,
        Progress(done + len(missing), done, "probe", quiet=not sys.stdout.isatty()) as progress,
    ):
        sampler.publish(model.params, 0)
        for number, temperature in enumerate(missing, done):
            name = f"T = {temperature:g}"
            progress.phase(name, total)
            report = reporter(name, total, 0, progress, say)

            def on_rollout(rollout: Rollout, report: OnRollout = report) -> Rollout:
                return asked.mark(report(rollout))

            params = SamplingParams(temperature, 1.0, 0, recipe.rollout.max_tokens, asked.stop_ids)
            seed = (recipe.run.seed,)
            groups = finished(sampler.generate(asked.prompts, job.samples, params, seed, on_rollout))
            result = measure(groups, temperature)
            results.append(result)
            _write(job, asked.settings, results)
            progress.step_done(number, {})
            low, high = result["ci95"]
            say(
                f"{name}: accuracy {result['accuracy']:.3f} (95% {low:.3f} to {high:.3f}), distinct 4-grams "
                f"{result['distinct_4gram']:.3f}, entropy {result['entropy']:.3f} nats a token"
            )
            if result["undecided"]:
                say(f"{name}: {undecided_note(result['undecided'])}")


def _write(job: Job, settings: JsonObject, results: list[Measured]) -> Probed:
    """Writes probe.json."""
    results.sort(key=lambda result: result["temperature"])
    probed: Probed = {
        "settings": settings,
        "results": results,
        "most_loss": job.most_loss,
        "zones": zones(results, job.samples, job.most_loss),
    }
    write_atomically(job.file, json.dumps(probed, indent=2))
    return probed


def measure(groups: Groups, temperature: float) -> Measured:
    """Measures the marked responses [P][G] to P problems.

    The entropy is the mean over all their tokens of -log p, at the sampling temperature. At each place the expectation
    of that is the policy's entropy there, so it is an estimate without bias.

    Args:
      groups: with log-probabilities (nats) at the sampling temperature.
      temperature: at which they were sampled.

    Raises:
      InputError: if there is a problem without responses.
    """
    right = right_ones(groups)
    share = right.mean(axis=1)
    distinct = np.array([distinct_4grams([r.tokens.tolist() for r in group]) for group in groups])
    flat = [rollout for group in groups for rollout in group]
    logprobs = np.concatenate([r.logprobs for r in flat]).astype(np.float64)
    return {
        "temperature": temperature,
        "accuracy": float(share.mean()),
        "ci95": confidence(share),
        "distinct_4gram": float(distinct.mean()),
        "distinct_4gram_ci95": confidence(distinct),
        "entropy": float(-logprobs.mean()),
        "length_mean": float(np.mean([len(r.tokens) for r in flat])),
        "truncated_fraction": float(np.mean([r.finish_reason == "length" for r in flat])),
        "undecided": sum(r.undecided for r in flat),
        "right": right.sum(axis=1).tolist(),
    }


def zones(results: Sequence[Measured], samples: int, most_loss: float) -> list[Placed]:
    """Places temperatures in zones, by their paired differences over problems from the one with the best accuracy.

    A temperature is measurably below the best where the 95% interval of its loss of accuracy does not reach 0.

    - robust: not measurably below the best, and no temperature between the best and it is.
    - exploration: hotter than these, with a mean loss of at most `most_loss` of the best accuracy, as all between have.
    - collapse: hotter than these.
    - cold: colder than the robust ones. Nothing is gained there.

    Args:
      results: by temperature, of the same problems.
      samples: G, responses to each problem.
      most_loss: share of the best accuracy that exploration may cost.
    """
    shares = [np.array(result["right"]) / samples for result in results]
    best = int(np.argmax([share.mean() for share in shares]))
    losses = [(float((d := shares[best] - share).mean()), _interval(d)) for share in shares]

    def depth(i: int) -> int:
        """0 for what is not measurably below the best, 2 for what is below by more than `most_loss`."""
        loss, (low, _) = losses[i]
        return 0 if low <= 0 else 1 if loss <= most_loss * shares[best].mean() else 2

    hotter = itertools.accumulate(map(depth, range(best, len(results))), max)
    colder = itertools.accumulate(map(depth, range(best - 1, -1, -1)), max)
    names: list[Zone] = ["cold" if d else "robust" for d in colder][::-1]
    by_depth: tuple[Zone, ...] = ("robust", "exploration", "collapse")
    names += [by_depth[d] for d in hotter]
    return [
        {"temperature": result["temperature"], "zone": name, "loss": loss, "loss_ci95": ci95}
        for result, name, (loss, ci95) in zip(results, names, losses, strict=True)
    ]


def _interval(differences: Float64[np.ndarray, " P"]) -> list[float]:
    """The 95% interval of a mean difference; one problem says nothing about others: [-1, 1]."""
    return confidence(differences) if len(differences) > 1 else [-1.0, 1.0]


def hottest(zones: Sequence[Placed], zone: Zone) -> float | None:
    """The hottest temperature of a zone; None where it has none."""
    return max((each["temperature"] for each in zones if each["zone"] == zone), default=None)


def advice(probed: Probed) -> list[str]:
    """Lines for people: the hottest temperatures of the zones, what to write into the recipe, what is uncertain."""
    places, results = probed["zones"], probed["results"]
    best = max(results, key=lambda result: result["accuracy"])
    if not best["accuracy"]:
        return [
            "no response is right at any temperature, so nothing tells them apart; raise --problems, --samples or "
            "--rollout.max-tokens"
        ]
    robust, exploring = hottest(places, "robust"), hottest(places, "exploration")
    ruined = [each["temperature"] for each in places if each["zone"] == "collapse"]
    assert robust is not None  # the best is
    lines = [f"hottest in the robust zone: {robust:g}"]
    most, (_, high) = probed["most_loss"] * best["accuracy"], _of(places, robust)["loss_ci95"]
    unsure = robust > best["temperature"] and high > most
    if exploring is not None:
        lines += [
            f"hottest in the exploration zone: {exploring:g}",
            f"to explore, write into the recipe: rollout.temperature = {exploring:g}",
        ]
    else:
        where = f"between {robust:g} and {ruined[0]:g}" if ruined else f"above {robust:g}"
        lines.append(
            f"none in the exploration zone, which may lie {where}: probe there too, with the same --out"
        )
        if not unsure:
            lines.append(f"until then, write into the recipe: rollout.temperature = {robust:g}")
    if unsure:
        lines.append(
            f"too few problems to be sure of {robust:g}: its accuracy may be lower by {high:.3f}, and the exploration "
            f"zone ends at {most:.3f}; raise --problems"
        )
    return lines


def _of(places: Sequence[Placed], temperature: float) -> Placed:
    return next(each for each in places if each["temperature"] == temperature)
