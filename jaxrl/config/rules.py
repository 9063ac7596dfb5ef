"""Combinations of values that cannot be."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import get_args

from jaxrl.config.sections import COLDEST, Recipe
from jaxrl.config.stages import changeable, stages_of
from jaxrl.types import ByThoughts


def impossible(recipe: Recipe) -> list[str]:
    """A message for each combination of values that cannot be; of every stage, by name, where there are several."""
    stages = stages_of(recipe)
    problems = list(_broken(_stage_rules(recipe)))
    for stage in stages:
        r, title = stage.recipe, f"{stage.title}: " if recipe.stages else ""
        rules = itertools.chain(_packing_rules(r), _training_rules(r), _sampling_rules(r))
        problems += [title + message for message in _broken(rules)]
    return problems


def _broken(rules: Iterable[tuple[bool, str]]) -> Iterator[str]:
    return (message for possible, message in rules if not possible)


def _stage_rules(recipe: Recipe) -> Iterator[tuple[bool, str]]:
    yield (
        bool(recipe.stages) or recipe.data.drop_solved == 1,
        f"data.drop_solved = {recipe.data.drop_solved} is about the stage before, and there is none; leave it out",
    )
    yield (
        not recipe.stages or not recipe.stages[0].restart,
        "stages.0.restart: everything is new in the first stage; leave it out",
    )
    stages, ends = stages_of(recipe), [0, *(entry.until for entry in recipe.stages)]
    for number, entry in enumerate(recipe.stages):
        title = stages[number].title
        yield (
            ends[number + 1] > ends[number],
            f"{title}: until = {entry.until} is not after {ends[number]}, where it begins; stages are in order, and "
            "until counts steps of the whole run",
        )
        for section, keys in entry.changes.items():
            for key in keys:
                yield (
                    changeable(section, key),
                    f"{title}: {section}.{key} cannot change during a run; give it in [{section}]",
                )
    names = [stage.name for stage in stages]
    twice = sorted({name for name in names if names.count(name) > 1})
    yield (
        not twice,
        f"two stages are named '{', '.join(twice)}'; give each a name of its own",
    )


def _packing_rules(r: Recipe) -> Iterator[tuple[bool, str]]:
    longest = r.data.max_prompt_tokens + r.rollout.max_tokens
    stream, bucket, chunk = r.packing.stream_tokens, r.packing.bucket_tokens, r.packing.logprob_chunk
    unit = math.lcm(bucket, chunk)
    yield (
        stream >= longest,
        f"packing.stream_tokens = {stream} cannot hold one sequence of data.max_prompt_tokens + "
        f"rollout.max_tokens = {longest}; raise it to {-(-longest // unit) * unit} or lower those two",
    )
    yield (
        stream % bucket == 0,
        f"packing.stream_tokens = {stream} is not a multiple of packing.bucket_tokens = {bucket}; "
        f"use {-(-stream // unit) * unit}",
    )
    yield (
        stream % chunk == 0,
        f"packing.logprob_chunk = {chunk} does not divide packing.stream_tokens = {stream}; use a divisor",
    )


def _training_rules(r: Recipe) -> Iterator[tuple[bool, str]]:
    yield (
        r.mesh.gather == "step" or r.model.remat != "none",
        'mesh.gather = "layer" with model.remat = "none" keeps every layer whole for the backward pass; set '
        'model.remat to "full" or "attention"',
    )
    yield (
        r.rollout.prompts % r.optimizer.minibatch_prompts == 0,
        f"optimizer.minibatch_prompts = {r.optimizer.minibatch_prompts} does not divide rollout.prompts = "
        f"{r.rollout.prompts}; use a divisor",
    )
    yield (
        r.reward.overlong_tokens <= r.rollout.max_tokens,
        f"reward.overlong_tokens = {r.reward.overlong_tokens} is more than rollout.max_tokens = "
        f"{r.rollout.max_tokens}; lower it",
    )
    yield (
        r.length.truncated_factor == 1 or (r.reward.wrong >= 0 and not r.reward.overlong_tokens),
        f"length.truncated_factor = {r.length.truncated_factor} raises rewards below 0, as reward.wrong = "
        f"{r.reward.wrong} and reward.overlong_tokens = {r.reward.overlong_tokens} give them; set both to 0, or use "
        "length.truncated_penalty",
    )
    yield (
        r.reward.thoughts == "required"
        or bool({r.reward.verifier, r.eval.verifier} & {*get_args(ByThoughts)}),
        f'reward.thoughts = "{r.reward.thoughts}" is a rule of {" and ".join(get_args(ByThoughts))}, and '
        f'reward.verifier = "{r.reward.verifier}" reads the whole response; leave it out',
    )
    titles = [function.title for function in r.reward.named]
    twice = sorted({title for title in titles if titles.count(title) > 1})
    yield (
        not (r.reward.function and r.reward.functions),
        "reward.function and reward.functions are two ways to say the same; give one of them",
    )
    yield (
        not twice,
        f"reward.functions: two are named '{', '.join(twice)}'; give each a name of its own",
    )
    yield (
        bool(titles) or (r.reward.verifier != "none" and r.reward.verifier_weight == 1),
        f'reward.verifier = "{r.reward.verifier}" and reward.verifier_weight = {r.reward.verifier_weight} are about '
        "reward.function, and there is none; give it, or leave them out",
    )
    yield (
        not (titles and r.groups.rescue),
        "groups.rescue rewards an answer of an earlier step again in every process, and reward.function may give "
        "another value each time; leave one of them out",
    )
    gated = bool(r.entropy.quantile)
    yield (
        not gated
        or (r.kl.place == "loss" and r.loss.surrogate != "sigmoid" and "verl" not in r.loss.normalization),
        f"entropy.quantile = {r.entropy.quantile} is about bounds of the ratio and a KL term in the loss, averaged by "
        'token or sequence; use kl.place = "loss", another loss.surrogate than "sigmoid", and another '
        'loss.normalization than "verl_dynamic"',
    )
    groups = r.groups
    possible = any(
        groups.keep[0] < k / r.rollout.samples < groups.keep[1] for k in range(r.rollout.samples + 1)
    )
    yield (
        groups.filter == "none" or possible,
        f"groups.keep = {list(groups.keep)}: no number of right answers of {r.rollout.samples} is a share between; "
        "widen it, to [0.0, 1.0] say",
    )
    yield (
        groups.filter == "none" or r.loss.normalization != "verl_dynamic",
        f'groups.filter = "{groups.filter}" leaves other numbers of answers than loss.normalization = "verl_dynamic" '
        'divides among ranks; use "token_mean"',
    )
    yield (
        not (groups.rescue and groups.rounds and r.sampler.max_staleness),
        f'groups.rescue with groups.filter = "{groups.filter}" looks at answers of the step before, so nothing is '
        "sampled ahead; set sampler.max_staleness = 0",
    )
    yield (
        bool(r.kl.coefficient) or not r.kl.reset_every,
        f"kl.reset_every = {r.kl.reset_every} with kl.coefficient = 0 has no reference to reset; set one of them",
    )
    yield (
        bool(r.data.hint_share) == bool(r.data.hint_column),
        f"data.hint_share = {r.data.hint_share} with data.hint_column = '{r.data.hint_column}'; a hint needs both, a "
        "share above 0 and the column of a worked solution",
    )
    longest = r.data.max_characters or r.data.min_characters
    yield (
        r.data.min_characters <= longest,
        f"data.min_characters = {r.data.min_characters} is above data.max_characters = {r.data.max_characters}, so no "
        "problem is left; lower it",
    )
    yield (
        bool(r.length.cosine_on) or not r.length.cosine_off,
        f"length.cosine_off = {r.length.cosine_off} with length.cosine_on = 0 is never on; set cosine_on, to 100 say",
    )
    yield (
        not r.eval.every or bool(r.eval.path or r.eval.benchmarks),
        f"eval.every = {r.eval.every} with nothing to evaluate on; give eval.path or eval.benchmarks",
    )


def _sampling_rules(r: Recipe) -> Iterator[tuple[bool, str]]:
    yield (
        r.rollout.top_p == 1 and r.rollout.top_k == 0,
        f"rollout.top_p = {r.rollout.top_p}, rollout.top_k = {r.rollout.top_k}: the trainer's log-probs are of the "
        "whole vocabulary, so every ratio would be off; use 1.0 and 0, and eval.top_p for evaluation",
    )
    yield (
        r.rollout.temperature > 0,
        f"rollout.temperature = 0 samples one answer {r.rollout.samples} times over; raise it, to 1.0 say",
    )
    for key, temperature in (("rollout", r.rollout.temperature), ("eval", r.eval.temperature)):
        yield (
            not 0 < temperature < COLDEST,
            f"{key}.temperature = {temperature} is too low to sample at; use {COLDEST} or more",
        )
    yield (
        r.rollout.engine == "local" or bool(r.sampler.urls) != bool(r.sampler.servers),
        'rollout.engine = "vllm" needs either sampler.urls, of servers that run, or sampler.servers, to start so many',
    )
    yield (
        len({*r.sampler.urls}) == len(r.sampler.urls),
        f"sampler.urls = {', '.join(r.sampler.urls)}: a server is named twice; name each once",
    )
    yield (
        r.sampler.max_staleness == 0 or r.rollout.engine == "vllm",
        f"sampler.max_staleness = {r.sampler.max_staleness} needs a sampler on devices of its own; set rollout.engine "
        'to "vllm"',
    )
