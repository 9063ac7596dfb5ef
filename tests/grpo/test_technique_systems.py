"""One optimizer step of every recipe equals the gradient of the system's released code, from answers to the update.

The vectors have logits and no model. Here the model is one whose every token says what comes next: each position of
each answer has tokens of its own, its hidden state is a unit vector, and the row of the LM head is the vector's logits.
So the gradient of the head is that of the logits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl import config, prepare
from jaxrl.grpo.packing import PackedBatch
from jaxrl.grpo.update import Likelihoods, TrainState
from jaxrl.marking import make_marker
from jaxrl.models import decoder
from jaxrl.parallel.mesh import make_mesh
from jaxrl.programs import Programs, build_programs
from jaxrl.types import JsonObject, Prompt, Rollout
from vectors import cases, covered, near

CHOICES, LONGEST, MOST = 4, 8, 6  # logits, tokens and sequences of a case


class System(NamedTuple):
    """A system of the vectors: a recipe, one of its stages, and in what the vector's code differs from the run."""

    recipe: str
    stage: int = 0
    changes: dict[str, Any] = {}  # noqa: RUF012


# ProRL v2's scripts of 2026: IcePop, another clip, and no reward for an answer that was cut off
SCRIPTS_OF_2026 = {
    "loss.clip_high": 0.27,
    "length.truncated_factor": 0.0,
    "length.cosine": 0.0,
    "sampler.correction": "masked",
    "sampler.correction_floor": 0.5,
    "sampler.correction_cap": 5.0,
}
SYSTEMS = {
    "justrl": System("justrl-deepseek-1.5b"),
    "still3": System("still-3-1.5b"),
    "deepscaler": System("deepscaler-1.5b", 1),
    "fastcurl_v3_stage5": System("fastcurl-1.5b-v3", 4),
    "prorl_v1_kl_1e-4_assumed": System("prorl-1.5b-v1"),
    "e3_stage1_assembled": System("e3-1.7b"),
    "e3_stage2_assembled": System("e3-1.7b", 1),
    "polaris": System("polaris-1.7b", 1),
    "prorl_v2_openrlhf": System("prorl-1.5b-v2", changes=SCRIPTS_OF_2026),
    "brorl": System("brorl-1.5b", changes=SCRIPTS_OF_2026),
    "archer": System("archer-math-1.5b"),
    "questa": System("questa-nemotron-1.5b", changes={"advantage.epsilon": 1e-5 / 5}),  # rewards times 5
}
OF_CASE = {"brorl": "prorl_v2_openrlhf"}  # whose objective it has


@pytest.fixture(scope="module", autouse=True)
def forgotten() -> Iterator[None]:
    """Two dozen programs are not kept for the rest of the tests."""
    yield
    programs_of.cache_clear()
    jax.clear_caches()


def small(system: System, groups: int, samples: int) -> config.Recipe:
    """The recipe of the stage, all of whose sizes are the case's: its techniques are as they are."""
    stage = config.stages_of(config.load(system.recipe))[system.stage]
    values = config.to_dict(stage.recipe)
    ours: dict[str, Any] = {
        "run.steps": 1,
        "model.dtype": "float32",
        "model.remat": "none",
        "data.max_prompt_tokens": 1,
        "data.drop_solved": 1.0,
        "rollout.engine": "local",
        "rollout.prompts": groups,
        "rollout.samples": samples,
        "rollout.max_tokens": LONGEST,
        "sampler.servers": 0,
        "sampler.max_staleness": 0,
        "optimizer.minibatch_prompts": groups,
        "optimizer.max_grad_norm": 1e9,
        "loss.skip_first_old_logprobs": False,  # the vectors' old policy is another
        "packing.stream_tokens": 64,
        "packing.bucket_tokens": 16,
        "packing.logprob_chunk": 16,
        "eval.every": 0,
    }
    for key, value in (ours | system.changes).items():
        section, name = key.split(".")
        values[section][name] = value
    return config.from_dict(values)


@functools.lru_cache(maxsize=2)  # of a system, for both sizes of a case
def programs_of(name: str, groups: int, samples: int) -> tuple[config.Recipe, Programs]:
    recipe = small(SYSTEMS[name], groups, samples)
    vocabulary = MOST * LONGEST * CHOICES + MOST
    sizes = {"width": MOST * LONGEST, "heads": 2, "kv_heads": 2, "head_dim": 8, "mlp_width": 16, "layers": 1}
    model = decoder.Config(
        family="qwen2", vocab_size=vocabulary, **sizes, rope_theta=1e4, norm_epsilon=1e-12, tied=False,
        max_positions=16,
    )  # fmt: skip
    return recipe, build_programs(recipe, model, make_mesh())


def token(sequence: int, position: int, choice: int) -> int:
    return (sequence * LONGEST + position) * CHOICES + choice


def params_of(
    logits: np.ndarray, targets: np.ndarray, model: decoder.Config, temperature: float
) -> decoder.Params:
    """Layers add nothing, so the state at a token is its embedding: the unit vector of the next position."""
    params = decoder.initialize(model, 0, scale=0.0)
    size = math.sqrt(model.width)  # of a unit vector after the norm
    embed = np.zeros((model.vocab_size, model.width), np.float32)
    head = np.full((model.vocab_size, model.width), -1e4 * temperature / size, np.float32)
    for b, row in enumerate(logits):
        for t, values in enumerate(row):
            unit = b * LONGEST + t
            before = token(b, t - 1, targets[b, t - 1]) if t else MOST * LONGEST * CHOICES + b
            embed[before, unit] = 1.0
            head[token(b, t, 0) : token(b, t, CHOICES), unit] = values * temperature / size
    return params | {"embed": jnp.asarray(embed), "head": jnp.asarray(head)}


def rollouts_of(case: JsonObject, recipe: config.Recipe, cut_has_no_box: bool) -> list[list[Rollout]]:
    """The answers of each group, marked by the recipe's verifier from their texts."""
    texts: dict[int, str] = {}

    def detokenize(ids: np.ndarray) -> str:
        return texts.get(int(ids[0]), "<think>")

    mark, groups = make_marker(recipe, detokenize), [list[Rollout]() for _ in set(case["group"])]
    for b, (row, mask, logprobs) in enumerate(
        zip(case["targets"], case["mask"], case["rollout_logprob"], strict=True)
    ):
        n, cut = int(sum(mask)), case["truncated"][b]
        ids = np.array([token(b, t, row[t]) for t in range(n)], np.int32)
        answer = "" if cut and cut_has_no_box else f"\\boxed{{{34 if case['rewards'][b] > 0 else 35}}}"
        texts[int(ids[0])] = f"<think></think>{answer}"
        prompt = Prompt("", np.array([MOST * LONGEST * CHOICES + b], np.int32), "34")
        found = np.array(logprobs[:n], np.float32)
        rollout = Rollout(prompt, ids, found, "length" if cut else "stop", 0)
        groups[case["group"][b]].append(mark(rollout))
    return groups


def table(values: list[list[float]], targets: np.ndarray, vocabulary: int) -> np.ndarray:
    """A token's log-probability by its id, of a [B, T] array."""
    found = np.zeros(vocabulary, np.float32)
    for b, row in enumerate(values):
        for t, value in enumerate(row):
            found[token(b, t, targets[b, t])] = value
    return found


def one_step(name: str, case: JsonObject) -> tuple[float, np.ndarray]:
    """(loss, gradient of the logits [B, T, V]) of a system's first update, by Adam's first moment."""
    targets, groups = np.array(case["targets"]), len(set(case["group"]))
    recipe, programs = programs_of(name, groups, len(targets) // groups)
    logits, temperature = np.array(case["logits"]), recipe.rollout.temperature
    model = programs.model
    params = params_of(logits, targets, model, temperature)
    state = programs.init_state(params)
    old, reference = (table(case[key], targets, model.vocab_size) for key in ("old_logprob", "ref_logprob"))

    def logprobs(params: decoder.Params, batch: PackedBatch) -> Likelihoods:
        entropies = programs.logprobs(params, batch).entropies if recipe.entropy.quantile else None
        return Likelihoods(jnp.asarray(old)[batch.tokens], entropies)

    def of_reference(batch: PackedBatch) -> Likelihoods:
        return Likelihoods(jnp.asarray(reference)[batch.tokens], None)

    (batch,) = prepare.minibatches(
        recipe,
        prepare.make_method(recipe),
        dataclasses.replace(programs, logprobs=logprobs),  # type: ignore[arg-type]
        rollouts_of(case, recipe, cut_has_no_box=name == "still3"),
        1e-3,
        state.params,
        of_reference,
    )
    after, metrics = programs.update(state, batch)
    return float(metrics["loss"]), gradient(after, recipe, logits.shape)


def gradient(state: TrainState, recipe: config.Recipe, shape: tuple[int, ...]) -> np.ndarray:
    moment = np.asarray(optax.tree_utils.tree_get(state.opt_state, "mu")["head"], np.float64)
    of_head = moment / (1 - recipe.optimizer.beta1)
    scale = recipe.rollout.temperature / math.sqrt(of_head.shape[1])
    found = np.zeros(shape)
    for b, t in np.ndindex(shape[:2]):
        found[b, t] = of_head[token(b, t, 0) : token(b, t, CHOICES), b * LONGEST + t] * scale
    return found


@pytest.mark.parametrize("case", cases("systems"))
@pytest.mark.parametrize("name", SYSTEMS)
def test_technique_systems_from_their_recipes(name: str, case: JsonObject) -> None:
    of = OF_CASE.get(name, name)
    assert of in covered("systems", case["systems"])
    expected = case["systems"][of]
    loss, found = one_step(name, case)
    near(found, expected["grad_logits"], 2e-6, name)
    np.testing.assert_allclose(loss, expected["loss"], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("case", cases("systems")[:1])
def test_technique_systems_are_all_there(case: JsonObject) -> None:
    assert set(covered("systems", case["systems"])) == SYSTEMS.keys() - OF_CASE.keys()
