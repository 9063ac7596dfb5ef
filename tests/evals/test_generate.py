"""Streaming and resuming, with a sampler that answers its own seed and can be stopped anywhere."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from evals.generate import generate, read, runs
from evals.task import Task
from faults import largest_file
from jaxrl.errors import InputError
from jaxrl.sampling.sampler import unchanged
from jaxrl.types import OnRollout, Prompt, Rollout, SamplingParams

PROMPTS = [Prompt(str(p), np.array([p], np.int32), f"answer {p}") for p in range(7)]
SAMPLES = 5


class Interrupted(Exception):
    pass


class Sampler:
    """Ends requests in any order; stops after `limit` of them."""

    def __init__(self, limit: int = 10**9, shuffle: int = 0, refuse: str = "") -> None:
        self.limit, self.order, self.refuse, self.made = limit, random.Random(shuffle), refuse, 0
        self.calls = list[threading.Event]()  # set when a call has ended
        self.lock = threading.Lock()

    def publish(self, params: object, version: int) -> None:
        raise AssertionError

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        params: SamplingParams,
        seed: tuple[int, ...],
        on_rollout: OnRollout = unchanged,
        first: int = 0,
    ) -> list[list[Rollout]]:
        assert samples == 1 and params.max_tokens == 9
        self.calls.append(ended := threading.Event())
        try:
            self._each(prompts, seed, on_rollout, first)
        finally:
            ended.set()
        return []

    def _each(
        self, prompts: Sequence[Prompt], seed: tuple[int, ...], on_rollout: OnRollout, first: int
    ) -> None:
        for p in self.order.sample(range(len(prompts)), len(prompts)):
            with self.lock:
                if self.made == self.limit:
                    raise Interrupted
                self.made += prompts[p].id != self.refuse
            if prompts[p].id != self.refuse:
                ids = np.array([*seed, first + p, *prompts[p].tokens], np.int32)
                on_rollout(Rollout(prompts[p], ids, np.zeros(4, np.float32), "length", 0))

    def close(self) -> None:
        """Waits for the calls in other threads, as the owner of a sampler does after an interruption."""
        for ended in self.calls:
            assert ended.wait(60)


def detokenize(ids: np.ndarray) -> str:
    return " ".join(map(str, ids))


def answers(sampler: Sampler, path: Path, samples: int = SAMPLES, parallel: int = 1) -> list[list[str]]:
    task, params = Task("x", "X", [], PROMPTS, samples), SamplingParams(max_tokens=9)
    groups = generate(task, params, (3, 4), sampler, path, detokenize, parallel=parallel)
    assert [[r.answer for r in g] for g in groups] == [[f"answer {p}"] * samples for p in range(len(PROMPTS))]
    assert all(r.tokens == 4 and r.finish_reason == "length" for g in groups for r in g)
    return [[r.response for r in group] for group in groups]


@pytest.mark.parametrize("parallel", [1, 8])
def test_interrupted_again_and_again_it_ends_the_same_and_makes_nothing_twice(
    tmp_path: Path, parallel: int
) -> None:
    whole = answers(Sampler(), tmp_path / "whole.jsonl")
    assert len({text for group in whole for text in group}) == len(PROMPTS) * SAMPLES  # all seeds differ
    path, made = tmp_path / "parts.jsonl", 0
    for attempt in range(100):
        sampler = Sampler(limit=4, shuffle=attempt)
        try:
            parts = answers(sampler, path, parallel=parallel)
            break
        except Interrupted:
            sampler.close()
            made += sampler.made
            with path.open("a") as file:
                file.write('{"problem": 3, "sam')  # and the process was killed while writing
    assert parts == whole
    assert made + sampler.made == len(path.read_text().splitlines()) == len(PROMPTS) * SAMPLES


class Late(Sampler):
    """Of two calls, that for the first response fails, and the other has an answer only when `failed` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.failed = threading.Barrier(2, timeout=30), threading.Event()

    def _each(
        self, prompts: Sequence[Prompt], seed: tuple[int, ...], on_rollout: OnRollout, first: int
    ) -> None:
        self.both.wait()
        if first == 0:
            raise Interrupted
        assert self.failed.wait(30)
        super()._each(prompts, seed, on_rollout, first)


def test_an_answer_that_comes_after_the_error_of_another_call_is_written(tmp_path: Path) -> None:
    path, sampler = tmp_path / "x.jsonl", Late()
    whole = answers(Sampler(), path)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if pair_of(line) not in ((0, 0), (6, 4))))
    with pytest.raises(Interrupted):
        answers(sampler, path, parallel=2)
    sampler.failed.set()
    sampler.close()
    assert pair_of(path.read_text().splitlines()[-1]) == (6, 4) and sampler.made == 1
    assert answers(Sampler(limit=1), path) == whole


def test_without_room_for_a_row_it_ends_and_with_room_it_goes_on(tmp_path: Path) -> None:
    expected, path = answers(Sampler(), tmp_path / "whole.jsonl"), tmp_path / "full.jsonl"
    for size in range(100, 1500, 77):
        refused = pytest.raises(InputError, match=r"full\.jsonl: cannot be written \(File too large")
        with largest_file(size), refused:
            answers(Sampler(), path)
    assert answers(Sampler(), path) == expected


def test_rows_of_many_calls_are_whole_and_the_callback_needs_no_lock(tmp_path: Path) -> None:
    path, busy, at_once = tmp_path / "x.jsonl", 0, []
    task, params = Task("x", "X", [], PROMPTS * 8, SAMPLES), SamplingParams(max_tokens=9)
    generate(task, params, (3, 4), Sampler(), path, detokenize)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[::2]))  # every gap is a call

    def on_rollout(rollout: Rollout) -> Rollout:
        nonlocal busy
        busy += 1
        at_once.append(busy)
        time.sleep(1e-4)
        busy -= 1
        return rollout

    def long(ids: np.ndarray) -> str:
        return detokenize(ids) * 5000

    generate(task, params, (3, 4), Sampler(), path, long, on_rollout, parallel=64)
    assert at_once == [1] * (task.total // 2)
    pairs = sorted(map(pair_of, path.read_text().splitlines()))
    assert pairs == [(p, g) for p in range(len(PROMPTS) * 8) for g in range(SAMPLES)]


def pair_of(line: str) -> tuple[int, int]:
    row = json.loads(line)
    return row["problem"], row["sample"]


def test_what_is_there_is_read_only(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    whole = answers(Sampler(), path)
    before = path.read_bytes()
    assert answers(Sampler(limit=0), path) == whole
    assert path.read_bytes() == before


def test_more_samples_are_added_to_the_ones_there(tmp_path: Path) -> None:
    few, many = answers(Sampler(), tmp_path / "x.jsonl", 2), answers(Sampler(), tmp_path / "y.jsonl", 6)
    sampler = Sampler()
    assert answers(sampler, tmp_path / "x.jsonl", 6) == many
    assert sampler.made == 4 * len(PROMPTS) and [group[:2] for group in many] == few
    assert answers(Sampler(limit=0), tmp_path / "x.jsonl", 3) == [group[:3] for group in many]


def test_a_refused_prompt_is_not_left_out_of_the_accuracy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"1 of 35 responses are missing"):
        answers(Sampler(refuse="2.1"), tmp_path / "x.jsonl")


def test_a_file_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    answers(Sampler(), path)
    path.write_text(json.dumps({"step": 1}) + "\n" + path.read_text())
    with pytest.raises(InputError, match=r"x\.jsonl:1: not a response"):
        read(path, 7, SAMPLES)


def test_neighboring_numbers_become_one_range() -> None:
    assert runs([]) == []
    assert runs([0, 1, 2, 5, 7, 8]) == [range(3), range(5, 6), range(7, 9)]
