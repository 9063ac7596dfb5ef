"""Packing, read back: every token where it belongs, once, with what belongs to it."""

from __future__ import annotations

import dataclasses
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.grpo.advantages import sequence_weights
from jaxrl.grpo.packing import (
    WORTHWHILE,
    Layout,
    PackedBatch,
    Place,
    Terms,
    bucket_lengths,
    pack,
    place_sequences,
    stream_lengths,
)
from jaxrl.types import Normalization, Prompt, Rollout

LONGEST = 20


@dataclasses.dataclass
class Case:
    rollouts: list[Rollout]
    advantages: np.ndarray
    devices: int
    streams: tuple[int, ...]
    buckets: tuple[int, ...]
    segments: int = 64
    normalization: Normalization = "token_mean"
    attention_cost: float = 0.0
    skip_zero_advantage: bool = True
    on_policy: bool = False

    def pack(self) -> PackedBatch:
        weights = sequence_weights(np.array([len(r.tokens) for r in self.rollouts]), self.normalization, 16)
        layout = Layout(self.streams, self.buckets, self.segments, self.attention_cost)
        return pack(
            self.rollouts,
            self.advantages,
            self.devices,
            layout,
            learning_rate=0.01,
            weights=weights,
            on_policy=self.on_policy,
            skip_zero_advantage=self.skip_zero_advantage,
        )

    def kept(self) -> list[int]:
        return [i for i, a in enumerate(self.advantages) if a or not self.skip_zero_advantage]


def rollouts_of(sizes: list[tuple[int, int]]) -> list[Rollout]:
    """From (prompt tokens, completion tokens): every token id and every log-prob is the only one of its kind."""
    rollouts, last = [], 0
    for i, (prompt, completion) in enumerate(sizes):
        ids = np.arange(last + 1, last + prompt + completion + 1, dtype=np.int32)
        last = ids[-1]
        logprobs = -ids[prompt:].astype(np.float32) / 8
        rollouts.append(Rollout(Prompt(str(i), ids[:prompt], ""), ids[prompt:], logprobs, "stop", 0))
    return rollouts


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, LONGEST - 6)), min_size=1, max_size=24))
    count = len(sizes)
    advantages = draw(st.lists(st.sampled_from([0.0, 0.0, 0.7, -1.1]), min_size=count, max_size=count))
    buckets = bucket_lengths(draw(st.sampled_from([1, 4, 7, 20])), LONGEST)
    return Case(
        rollouts_of(sizes),
        np.array(advantages, np.float32),
        devices=draw(st.integers(1, 5)),
        streams=tuple(sorted({buckets[-1] + draw(st.integers(0, 40)) for _ in range(3)})),
        buckets=buckets,
        segments=draw(st.sampled_from([1, 2, 64])),
        normalization=draw(st.sampled_from(get_args(Normalization))),
        attention_cost=draw(st.sampled_from([0.0, 0.05, 1.0])),
        skip_zero_advantage=draw(st.booleans()),
        on_policy=draw(st.booleans()),
    )


@settings(deadline=None)
@given(cases())
def test_streams_read_back_are_the_rollouts(case: Case) -> None:
    batch, kept = case.pack(), case.kept()
    owner = {int(t): i for i, r in enumerate(case.rollouts) for t in np.append(r.prompt.tokens, r.tokens)}
    responses = [len(r.tokens) for r in case.rollouts]
    weights = sequence_weights(np.array(responses), case.normalization, 16)
    seen = []
    stream = batch.tokens.shape[2]
    for device, row in np.ndindex(batch.tokens.shape[:2]):
        at = (device, row)
        count = int((batch.buckets[at] >= 0).sum())
        assert (batch.buckets[at][count:] == -1).all() and (batch.buckets[at][:count] >= 0).all()
        assert (count > 0) == (row < batch.micro_batches[device])
        covered = np.zeros(stream, bool)
        before = -1
        for start, bucket in zip(batch.starts[at][:count], batch.buckets[at][:count], strict=True):
            i = owner[int(batch.tokens[at][start])]
            rollout, prompt = case.rollouts[i], len(case.rollouts[i].prompt.tokens)
            length = prompt + responses[i]
            assert before < start and start + case.buckets[bucket] <= stream
            assert length <= case.buckets[bucket] and (bucket == 0 or case.buckets[bucket - 1] < length)
            whole, completion = slice(start, start + length), slice(start + prompt, start + length)
            assert not covered[whole].any()
            covered[whole], before = True, start
            np.testing.assert_array_equal(batch.tokens[at][whole], [*rollout.prompt.tokens, *rollout.tokens])
            np.testing.assert_array_equal(batch.positions[at][whole], np.arange(length))
            np.testing.assert_array_equal(batch.sampler_logprobs[at][completion], rollout.logprobs)
            np.testing.assert_array_equal(batch.advantages[at][completion], case.advantages[i])
            np.testing.assert_array_equal(batch.weights[at][completion], np.float32(weights[i]))
            for field in (batch.weights, batch.advantages, batch.sampler_logprobs):
                assert not field[at][start : start + prompt].any()
            seen.append(i)
        for field in (batch.tokens, batch.positions, batch.weights, batch.advantages, batch.sampler_logprobs):
            assert not field[at][~covered].any()
    assert sorted(seen) == kept
    assert not batch.old_logprobs.any()
    assert stream in case.streams and len(batch.tokens) == case.devices
    assert batch.tokens.shape[1] >= max(batch.micro_batches.max(), 1)
    assert batch.starts.shape == batch.buckets.shape == (*batch.tokens.shape[:2], case.segments)
    np.testing.assert_array_equal(batch.response_tokens, [sum(responses)] * case.devices)
    np.testing.assert_array_equal(batch.on_policy, [case.on_policy] * case.devices)


@settings(deadline=None, max_examples=20)
@given(cases())
def test_dtypes_and_determinism(case: Case) -> None:
    batch, again = vars(case.pack()), vars(case.pack())
    floats = {"weights", "advantages", "old_logprobs", "sampler_logprobs", "response_tokens", "learning_rate"}
    assert not [
        name for name in Terms._fields if batch.pop(name) is not None
    ]  # what a recipe lacks is absent
    for name, value in batch.items():
        assert value.dtype == (np.float32 if name in floats else bool if name == "on_policy" else np.int32)
        np.testing.assert_array_equal(value, again[name])


@settings(deadline=None, max_examples=30)
@given(cases())
def test_denominators_count_what_is_left_out(case: Case) -> None:
    """Keeping or dropping sequences of zero advantage changes no other sequence's weights."""
    totals = []
    for skip in (True, False):
        batch = dataclasses.replace(case, skip_zero_advantage=skip).pack()
        totals.append(np.sort((batch.weights * batch.advantages).reshape(-1)))
        totals[-1] = totals[-1][totals[-1] != 0]
    np.testing.assert_array_equal(*totals)


def test_a_batch_of_which_nothing_is_kept() -> None:
    case = Case(rollouts_of([(2, 3)] * 8), np.zeros(8, np.float32), devices=2, streams=(16,), buckets=(8,))
    batch = case.pack()
    assert not batch.micro_batches.any() and (batch.buckets == -1).all() and not batch.weights.any()
    assert batch.tokens.shape == (2, 2, 16)  # the shape of every batch of 8 on 2 devices
    np.testing.assert_array_equal(batch.response_tokens, [24, 24])


def test_not_a_number_is_kept_and_seen() -> None:
    advantages = np.array([np.nan, 0], np.float32)
    case = Case(rollouts_of([(2, 3)] * 2), advantages, devices=1, streams=(8,), buckets=(8,))
    batch = case.pack()
    assert np.isnan(batch.advantages).any() and batch.micro_batches[0] == 1


def test_too_long_for_every_bucket() -> None:
    case = Case(rollouts_of([(5, 4)]), np.ones(1, np.float32), devices=1, streams=(16,), buckets=(4, 8))
    with pytest.raises(IndexError):
        case.pack()


@given(st.integers(1, 600), st.integers(1, 20_000))
def test_bucket_lengths_are_few_multiples_that_hold_the_longest(bucket: int, longest: int) -> None:
    lengths = bucket_lengths(bucket, longest)
    assert 1 <= len(lengths) <= 32 and lengths[-1] >= longest > lengths[-1] - bucket
    assert not np.any(np.array(lengths) % bucket)
    steps = np.diff([0, *lengths])
    assert (steps[:-1] == steps[0]).all() and 0 < steps[-1] <= steps[0]


def test_bucket_lengths_of_justrl() -> None:
    assert bucket_lengths(512, 1024 + 15_360) == tuple(range(512, 16_385, 512))


@given(st.integers(1, 64), st.integers(1, 300), st.integers(0, 300))
def test_stream_lengths_are_few_multiples_that_hold_the_longest(unit: int, longest: int, rest: int) -> None:
    stream = unit * -(-(longest + rest) // unit)
    lengths = stream_lengths(stream, longest, unit)
    assert 1 <= len(lengths) <= 9 and list(lengths) == sorted(set(lengths)) and lengths[-1] == stream
    assert all(n % unit == 0 and n >= longest and 2 * n >= stream for n in lengths)


def test_a_segment_that_fits_no_stream() -> None:
    with pytest.raises(ValueError, match="streams of 16 tokens cannot hold attention over 32"):
        place_sequences([20], 1, Layout((16, 32), (16, 32), 8))


@pytest.mark.parametrize(("sequences", "devices"), [(16, 1), (16, 4), (15, 4), (3, 8)])
def test_shapes_do_not_depend_on_lengths(sequences: int, devices: int) -> None:
    """Whatever the sequences are, a stream length has one shape: that of the longest there can be."""

    def rows(sizes: tuple[int, int], advantage: float) -> int:
        advantages = np.full(sequences, advantage, np.float32)
        case = Case(rollouts_of([sizes] * sequences), advantages, devices, streams=(48,), buckets=(4, 20))
        return case.pack().tokens.shape[1]

    assert rows((1, 1), advantage=0) == rows((6, 14), advantage=1)


@pytest.mark.parametrize("seed", range(8))
def test_little_is_computed_for_nothing(seed: int) -> None:
    """512 sequences as R1-Distill-Qwen-1.5B writes them, on 16 devices, costs in FLOPs of that model."""
    rng = np.random.default_rng(seed)
    prompts, sigma = rng.integers(60, 240, 512), np.sqrt(np.log(1 + 0.8**2))
    answers = np.minimum(rng.lognormal(np.log(5_000) - sigma**2 / 2, sigma, 512), 15_360)
    lengths = prompts + answers.astype(int)
    # of a forward pass: a token, and a token and one that it sees
    dense, attended = 2 * (1_310_195_712 + 233_373_696), 172_032
    devices, buckets = 16, bucket_lengths(512, 16_384)
    streams = stream_lengths(32_768, 16_384, 1024)
    assert streams == tuple(range(16_384, 32_769, 2048))
    layout = Layout(streams, buckets, 64, attended / dense)
    stream, places = place_sequences(lengths.tolist(), devices, layout)
    attention, count = np.zeros(devices), np.zeros(devices, int)
    for place, length in zip(places, lengths, strict=True):
        attention[place.device] += attended * buckets[np.searchsorted(buckets, length)] ** 2 / 2
        count[place.device] = max(count[place.device], place.micro_batch + 1)
    executed = dense * stream * count + attention
    needed = (dense * lengths + attended * lengths**2 / 2).sum()
    spread = np.ptp(executed) / executed.mean()
    print(f"streams {count} of {stream}, executed {executed.sum() / needed:.3f}, {spread:.4f}")
    assert executed.sum() < 1.10 * needed
    assert executed.max() < 1.02 * executed.min()


def placed_by_looking_at_every_stream(
    lengths: list[int], devices: int, layout: Layout
) -> tuple[int, list[Place]]:
    """`place_sequences` by its description, with all streams looked at for every sequence."""
    rooms = [next(b for b in layout.buckets if b >= length) for length in lengths]
    attention = [layout.attention_cost * room**2 / 2 for room in rooms]
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))

    def into(count: int, n: int) -> list[Place] | None:
        streams = [[[0, 0] for _ in range(count)] for _ in range(devices)]  # tokens, sequences
        work, places = [0.0] * devices, [Place(0, 0, 0)] * len(lengths)
        for i in order:
            fits = [
                [m for m, (used, held) in enumerate(own) if used + rooms[i] <= n and held < layout.segments]
                for own in streams
            ]
            if not any(fits):
                return None
            d = min((d for d in range(devices) if fits[d]), key=lambda d: (work[d], d))
            m = max(fits[d], key=lambda m: (streams[d][m][0], -m))
            places[i] = Place(d, m, streams[d][m][0])
            streams[d][m] = [streams[d][m][0] + lengths[i], streams[d][m][1] + 1]
            work[d] += lengths[i] + attention[i]
        return places

    best_cost, best = np.inf, (layout.streams[-1], list[Place]())
    for n in layout.streams[::-1]:
        count = -(-sum(lengths) // (devices * n))
        while (places := into(count, n)) is None:
            count += 1
        busiest = max(
            sum(a for a, p in zip(attention, places, strict=True) if p.device == d) for d in range(devices)
        )
        if count * n + busiest < WORTHWHILE * best_cost:
            best_cost, best = count * n + busiest, (n, places)
    return best


def test_places_are_those_of_the_description() -> None:
    rng = np.random.default_rng(0)
    for _ in range(150):
        longest = int(rng.integers(1, 40))
        buckets = bucket_lengths(int(rng.integers(1, 9)), longest)
        streams = stream_lengths(max(buckets[-1], int(rng.integers(1, 200))), buckets[-1], 1)
        segments, cost = int(rng.integers(1, 6)), float(rng.choice([0.0, 0.01, 0.1]))
        layout = Layout(streams=streams, buckets=buckets, segments=segments, attention_cost=cost)
        lengths = rng.integers(1, longest + 1, int(rng.integers(0, 60))).tolist()
        devices = int(rng.integers(1, 7))
        found = place_sequences(lengths, devices, layout)
        assert found == placed_by_looking_at_every_stream(lengths, devices, layout)


def test_a_mini_batch_of_a_step_of_65536_answers_is_placed() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(8.3, 0.7, 16_384), 1, 15_360).astype(int)
    layout = Layout(streams=stream_lengths(32_768, 15_872, 512), buckets=bucket_lengths(512, 15_872))
    n, places = place_sequences(lengths.tolist(), 64, layout)
    used = np.bincount([p.device for p in places], lengths, 64)
    assert used.max() / used.mean() < 1.001
    streams = {(p.device, p.micro_batch) for p in places}
    assert lengths.sum() / (len(streams) * n) > 0.95
