"""The in-process sampler: right ids, right log-probs, and neither depends on the company a sequence keeps."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from scipy import stats

from jaxrl.errors import InputError
from jaxrl.models import Config, hf, initialize
from jaxrl.models.decoder import Params
from jaxrl.parallel.mesh import mesh_over
from jaxrl.sampling import local
from jaxrl.sampling.local import LocalSampler
from jaxrl.types import Prompt, Rollout, SamplingParams

SMOLLM2 = Path(os.environ.get("SMOLLM2", "models/smollm2-135m-instruct"))
EOS = 1
SIZES = {"vocab_size": 24, "width": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp_width": 48}
TINY = Config("qwen2", **SIZES, layers=2, rope_theta=1e4, norm_epsilon=1e-6, tied=True, max_positions=512)


@pytest.fixture(scope="module")
def params() -> Params:
    """A model that is neither sure nor indifferent, and ends an answer after twenty tokens or so."""
    return initialize(TINY, 0, scale=0.3)


@pytest.fixture(scope="module")
def sampler(params: Params) -> LocalSampler:
    return make(params, slots=8)


def make(params: Params, slots: int, config: Config = TINY, mesh: Mesh | None = None) -> LocalSampler:
    sampler = LocalSampler(config, dtype="float32", slots=slots, mesh=mesh)
    sampler.publish(params, 7)
    return sampler


def make_mesh(data: int, fsdp: int) -> Mesh:
    return mesh_over(jax.devices()[: data * fsdp], data)


def make_prompts(*lengths: int, vocabulary: int = TINY.vocab_size) -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [Prompt(str(n), rng.integers(2, vocabulary, n).astype(np.int32), "") for n in lengths]


def ids(groups: list[list[Rollout]]) -> list[list[list[int]]]:
    return [[rollout.tokens.tolist() for rollout in group] for group in groups]


PROMPTS = make_prompts(3, 20, 1, 9)
SAMPLING = SamplingParams(max_tokens=40, stop_ids=(EOS,))


def transformers_greedy(folder: Path, prompts: list[Prompt], tokens: int) -> list[list[int]]:
    """One prompt at a time, so that padding cannot matter."""
    import torch
    import transformers

    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config = transformers.GenerationConfig(pad_token_id=0, eos_token_id=EOS)
    answers = []
    for prompt in prompts:
        row = torch.tensor(prompt.tokens[None], dtype=torch.long)
        with torch.inference_mode():
            mask = torch.ones_like(row)
            out = model.generate(row, attention_mask=mask, do_sample=False, max_new_tokens=tokens)
        answers.append(out[0, row.shape[1] :].tolist())
    return answers


def jax_greedy(folder: Path, prompts: list[Prompt], tokens: int, slots: int) -> list[list[int]]:
    model = hf.load(folder)
    sampler = make(model.params, slots, model.config)
    greedy = SamplingParams(temperature=0, max_tokens=tokens, stop_ids=(EOS,))
    return [group[0] for group in ids(sampler.generate(prompts, 1, greedy, (0,)))]


@pytest.mark.parametrize("family", ["Qwen2", "Llama"])
def test_greedy_equals_transformers(family: str, tmp_path: Path) -> None:
    """Across prompts of several buckets, a cache that grows from 64 to 96 tokens, and fewer slots than prompts."""
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 104,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "head_dim": 8,
    }
    sizes |= {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = getattr(transformers, f"{family}Config")(**sizes, initializer_range=0.3)
    transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(tmp_path)
    prompts = make_prompts(5, 40, 1, 17, 33, vocabulary=104)
    expected = transformers_greedy(tmp_path, prompts, 48)
    assert jax_greedy(tmp_path, prompts, 48, slots=3) == expected
    assert len({token for answer in expected for token in answer}) > 10


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason=f"no {SMOLLM2}; recipes/smollm2_from_gguf.py makes it")
def test_greedy_equals_transformers_on_a_real_model() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    questions = ["Hi", "What is 17 + 25?", "Name the three largest cities of France, and a fact about each."]
    chats = [[{"role": "user", "content": question}] for question in questions]
    rows = [tokenizer.apply_chat_template(c, add_generation_prompt=True)["input_ids"] for c in chats]
    prompts = [Prompt(str(i), np.array(row, np.int32), "") for i, row in enumerate(rows)]
    assert jax_greedy(SMOLLM2, prompts, 48, slots=2) == transformers_greedy(SMOLLM2, prompts, 48)


@pytest.mark.parametrize(
    "sampling",
    [
        SAMPLING,
        SamplingParams(temperature=0.6, top_p=0.7, top_k=5, max_tokens=30, stop_ids=(EOS,)),
        SamplingParams(temperature=0, max_tokens=30, stop_ids=(EOS,)),
    ],
    ids=["plain", "filtered", "greedy"],
)
def test_logprobs_are_of_the_whole_vocabulary_at_the_temperature(
    params: Params, sampling: SamplingParams
) -> None:
    model = hf.Model(TINY, params)
    for group in make(params, slots=5).generate(PROMPTS, 2, sampling, (3,)):
        for rollout in group:
            tokens = np.concatenate([rollout.prompt.tokens, rollout.tokens])
            logits = model.logits(params, tokens) / (sampling.temperature or 1.0)
            expected = jax.nn.log_softmax(logits)[np.arange(len(tokens) - 1), tokens[1:]]
            assert rollout.logprobs.dtype == np.float32
            completion = expected[len(rollout.prompt.tokens) - 1 :]
            np.testing.assert_allclose(rollout.logprobs, completion, atol=1e-4)


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_ids_do_not_depend_on_the_slots(params: Params, sampler: LocalSampler, slots: int) -> None:
    expected = sampler.generate(PROMPTS, 3, SAMPLING, (5, 2))
    assert len({len(r.tokens) for group in expected for r in group}) > 4  # so slots are refilled at odd times
    assert ids(make(params, slots).generate(PROMPTS, 3, SAMPLING, (5, 2))) == ids(expected)


def test_ids_do_not_depend_on_the_other_prompts(sampler: LocalSampler) -> None:
    """What counts is the prompt's own position in the list, and the number of the sample."""
    expected = ids(sampler.generate(PROMPTS, 3, SAMPLING, (5, 2)))
    others = make_prompts(31, 2, 12, 9)
    assert ids(sampler.generate([*PROMPTS[:2], *others], 3, SAMPLING, (5, 2)))[:2] == expected[:2]
    swapped = [others[0], PROMPTS[1], others[1], PROMPTS[3]]
    few = ids(sampler.generate(swapped, 2, SAMPLING, (5, 2)))
    assert [few[1], few[3]] == [expected[1][:2], expected[3][:2]]


def test_prompts_that_are_asked_for_on_the_way_get_the_same_answers(params: Params) -> None:
    """Those of their places in the list; a group is told of once, when its last answer is there."""
    sampler, told = make(params, slots=4), list[int]()
    expected = ids(sampler.generate(PROMPTS, 3, SAMPLING, (5, 2)))

    def more(place: int, group: Sequence[Rollout]) -> Sequence[Prompt]:
        assert len(group) == 3 and {r.prompt.id for r in group} == {PROMPTS[place].id}
        told.append(place)
        return PROMPTS[2:] if len(told) == 1 else ()

    assert ids(sampler.generate(PROMPTS[:2], 3, SAMPLING, (5, 2), on_group=more)) == expected
    assert sorted(told) == [0, 1, 2, 3] and told[0] < 2


def test_every_part_of_the_seed_counts(sampler: LocalSampler) -> None:
    same = [PROMPTS[0], PROMPTS[0]]
    runs = [ids(sampler.generate(same, 2, SAMPLING, seed)) for seed in [(0, 0), (0, 1), (1, 0)]]
    answers = [tuple(answer) for run in runs for group in run for answer in group]
    assert len(set(answers)) == 12  # nor do two samples of a prompt, or two places in the list, agree


def test_the_mesh_changes_nothing(params: Params, sampler: LocalSampler) -> None:
    """Two devices, and eight with one slot each; both leave devices idle at the end."""
    expected = ids(sampler.generate(PROMPTS, 3, SAMPLING, (5, 2)))
    for mesh, slots in [(make_mesh(1, 2), 4), (make_mesh(2, 4), 3)]:
        assert ids(make(params, slots, mesh=mesh).generate(PROMPTS, 3, SAMPLING, (5, 2))) == expected


@pytest.mark.parametrize("devices", [1, 2])
def test_the_last_long_answers_move_to_fewer_slots(
    params: Params, devices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 slots become 4 and then 1, or of each device's 8 become 2: other rows, the same ids."""
    sizes = []

    def keep(table: local._Table, devices: int) -> np.ndarray:
        rows = before(table, devices)
        sizes.append(rows.size)
        return rows

    before = local._Table.keep
    monkeypatch.setattr(local._Table, "keep", keep)
    monkeypatch.setattr(local, "BLOCK", 16)
    prompts, sampling = make_prompts(*[4] * 16), SamplingParams(max_tokens=64, stop_ids=(EOS,))
    sharded = make(params, 16, mesh=make_mesh(1, devices))
    answers = ids(sharded.generate(prompts, 1, sampling, (1,)))
    assert min(sizes) < 16, sizes
    assert answers == ids(make(params, 3).generate(prompts, 1, sampling, (1,)))


def filtered(logits: np.ndarray, temperature: float, top_p: float, top_k: int) -> np.ndarray:
    """The distribution to sample from, by sorting."""
    probs = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-probs)
    if top_k:
        probs[order[top_k:]] = 0
    probs /= probs.sum()
    enough = int(np.searchsorted(np.cumsum(probs[order]), top_p)) + 1 if top_p < 1 else len(probs)
    probs[order[enough:]] = 0
    return probs / probs.sum()


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [
        (1.0, 1.0, 0),
        (0.7, 1.0, 0),
        (1.5, 0.8, 0),
        (1.0, 1.0, 5),
        (2.0, 0.7, 9),
        (1.0, 1e-6, 0),
        (1.0, 0.5, 1),
    ],
)
def test_tokens_follow_the_filtered_distribution(temperature: float, top_p: float, top_k: int) -> None:
    logits = np.random.default_rng(1).normal(0, 2, 12).astype(np.float32)
    n = 20_000
    sampling = SamplingParams(temperature, top_p, top_k)
    noise = jax.random.split(jax.random.key(0), n)
    token, logprob = jax.jit(local.sample_tokens, static_argnums=2)(jnp.tile(logits, (n, 1)), noise, sampling)
    expected = filtered(logits.astype(np.float64), temperature, top_p, top_k)
    seen = np.bincount(token, minlength=12)
    kept = expected > 0
    assert seen[~kept].sum() == 0
    assert (seen[kept] > 0).all() or expected[kept].min() * n < 10
    if kept.sum() > 1:
        assert stats.chisquare(seen[kept], n * expected[kept]).pvalue > 1e-3
    np.testing.assert_allclose(logprob, jax.nn.log_softmax(logits / temperature)[token], atol=1e-5)


def test_first_tokens_follow_the_filtered_distribution(params: Params) -> None:
    """The same, through prefill, slots and seeds: 3,000 samples of one prompt."""
    logits = np.asarray(hf.Model(TINY, params).logits(params, PROMPTS[1].tokens))[-1]
    sampling = SamplingParams(temperature=1.3, top_p=0.9, top_k=8, max_tokens=1)
    (group,) = make(params, slots=500).generate(PROMPTS[1:2], 3000, sampling, (0,))
    expected = filtered(logits.astype(np.float64), 1.3, 0.9, 8)
    seen = np.bincount([int(r.tokens[0]) for r in group], minlength=24)
    assert seen[expected == 0].sum() == 0
    assert stats.chisquare(seen[expected > 0], 3000 * expected[expected > 0]).pvalue > 1e-3


def test_the_smallest_nucleus_is_kept_whole_vocabulary_or_not() -> None:
    """Against sorting, on many random rows of a large vocabulary."""
    logits = np.random.default_rng(0).normal(0, 3, (20, 5000)).astype(np.float32)
    probs = jax.nn.softmax(logits)
    for top_p, top_k in [(0.95, 0), (0.5, 50), (0.999, 20), (1.0, 20)]:
        kept = np.asarray(local._likeliest(probs, SamplingParams(top_p=top_p, top_k=top_k)))
        expected = [filtered(row.astype(np.float64), 1.0, top_p, top_k) > 0 for row in logits]
        assert (kept != np.array(expected)).sum() <= 2  # a sum that rounding moves over top_p


def test_eos_is_kept_and_the_budget_respected(sampler: LocalSampler) -> None:
    seen = []

    def on_rollout(rollout: Rollout) -> Rollout:
        seen.append(rollout)
        return rollout

    groups = sampler.generate(PROMPTS, 4, SAMPLING, (0,), on_rollout)
    rollouts = [rollout for group in groups for rollout in group]
    for rollout in rollouts:
        stopped = np.isin(rollout.tokens, SAMPLING.stop_ids)
        assert not stopped[:-1].any()
        assert rollout.finish_reason == ("stop" if stopped[-1] else "length")
        assert stopped[-1] or len(rollout.tokens) == 40
        assert len(rollout.logprobs) == len(rollout.tokens)
        assert rollout.tokens.dtype == np.int32
        assert rollout.version == 7
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}
    assert [r.prompt for r in rollouts] == [p for p in PROMPTS for _ in range(4)]
    assert sorted(map(id, seen)) == sorted(map(id, rollouts))


def test_a_free_slot_is_refilled(params: Params) -> None:
    """One answer of the full length does not hold the short ones: they pass through the other slots meanwhile."""
    sampler = make(params, slots=4)
    sampling = SamplingParams(max_tokens=200, stop_ids=(EOS, 2, 3, 4))
    prompts = make_prompts(*range(1, 41))
    lengths = [len(group[0].tokens) for group in sampler.generate(prompts, 1, sampling, (2,))]
    batch_by_batch = sum(max(lengths[i : i + 4]) - 1 for i in range(0, len(lengths), 4))
    ideal = max(max(lengths) - 1, sum(n - 1 for n in lengths) / 4)
    assert ideal <= sampler.steps < 1.25 * ideal < 0.75 * batch_by_batch


def test_parameters_are_a_copy_in_the_compute_dtype(params: Params) -> None:
    """The update donates the trainer's parameters; the sampler must not lose its own with them."""
    mine = jax.tree.map(jnp.copy, params)
    sampler = make(mine, slots=2)
    expected = ids(sampler.generate(PROMPTS, 1, SAMPLING, (0,)))
    jax.tree.map(lambda p: p.delete(), mine)
    assert ids(sampler.generate(PROMPTS, 1, SAMPLING, (0,))) == expected
    half = LocalSampler(TINY, dtype="bfloat16", slots=2)
    half.publish(params, 0)
    assert {str(p.dtype) for p in jax.tree.leaves(half._params)} == {"bfloat16"}
    assert half.generate(PROMPTS, 1, SAMPLING, (0,))[0][0].logprobs.dtype == np.float32


def test_decoding_never_copies_the_cache() -> None:
    """At most two layers' slices of it are in flight; the cache itself is updated in place."""
    deep = dataclasses.replace(TINY, layers=16)
    sampler = LocalSampler(deep, dtype="float32", slots=8)
    _, decode = local._sampling_programs(deep, "float32", sampler._mesh, SAMPLING)
    slots = sampler._programs.empty(8, 384, 40)
    memory = decode.lower(slots, initialize(deep, 0), np.int32(8), np.int32(64)).compile().memory_analysis()
    cache = 2 * slots.keys.nbytes
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < cache / 4


def test_a_second_call_compiles_nothing(params: Params, caplog: pytest.LogCaptureFixture) -> None:
    sampler = make(params, slots=8)
    sampler.generate(PROMPTS, 2, SAMPLING, (0,))
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        sampler.generate(PROMPTS, 2, SAMPLING, (1,))
    assert not [message for message in caplog.messages if "Compiling" in message]


def test_nothing_to_do(sampler: LocalSampler) -> None:
    assert sampler.generate([], 4, SAMPLING, (0,)) == []
    assert sampler.generate(PROMPTS, 0, SAMPLING, (0,)) == [[], [], [], []]
    one = sampler.generate(PROMPTS[:1], 1, SamplingParams(max_tokens=1), (0,))
    assert len(one[0][0].tokens) == 1


@pytest.mark.parametrize(
    ("prompts", "budget", "words"),
    [
        (make_prompts(4, 0), 8, ["prompt 0 ", "empty"]),
        (make_prompts(4, 500), 13, ["prompt 500 ", "512", "max_tokens"]),
    ],
)
def test_a_bad_prompt_is_named(
    sampler: LocalSampler, prompts: list[Prompt], budget: int, words: list[str]
) -> None:
    with pytest.raises(InputError) as error:
        sampler.generate(prompts, 1, SamplingParams(max_tokens=budget), (0,))
    assert all(word in str(error.value) for word in words)


def test_parameters_come_first() -> None:
    with pytest.raises(InputError, match="publish"):
        LocalSampler(TINY, dtype="float32", slots=2).generate(PROMPTS, 1, SAMPLING, (0,))


def test_a_prompt_may_fill_the_positions_to_the_last(sampler: LocalSampler) -> None:
    (group,) = sampler.generate(make_prompts(500), 1, SamplingParams(max_tokens=12), (0,))
    assert len(group[0].tokens) == 12
