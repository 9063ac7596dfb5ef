"""Rollout files."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from jaxrl.telemetry.rollouts import (
    read_rollouts,
    read_vocabulary,
    rollout_files,
    write_rollouts,
)
from jaxrl.types import Prompt, Rollout


def test_rollouts_keep_everything_a_reader_needs(tmp_path: Path) -> None:
    prompt = Prompt("p7", np.array([1, 2], np.int32), "42")
    rollout = Rollout(prompt, np.array([3, 4], np.int32), np.array([-0.5, -1.5], np.float32), "stop", 9, -1.0)
    write_rollouts(tmp_path, 12, [[rollout, rollout]], lambda ids: "é".join(map(str, ids)))
    rows = [
        json.loads(line) for line in (tmp_path / "rollouts" / "step_000012.jsonl").read_text().splitlines()
    ]
    assert [row["sample"] for row in rows] == [0, 1]
    expected = {
        "step": 12,
        "prompt_id": "p7",
        "prompt": "1é2",
        "answer": "42",
        "completion": "3é4",
        "score": -1.0,
    }
    expected |= {
        "finish_reason": "stop",
        "tokens": 2,
        "version": 9,
        "logprob_mean": -1.0,
        "token_ids": [3, 4],
    }
    assert expected.items() <= rows[0].items() and rows[0]["logprobs"] == [-0.5, -1.5]


def test_the_vocabulary_has_every_token_of_every_file(tmp_path: Path) -> None:
    asked = []

    def decode(ids: np.ndarray) -> str:
        asked.append(ids.tolist())
        return "".join(chr(64 + i) for i in ids)

    for step, tokens in enumerate(([3, 4, 3], [4, 5])):
        prompt = Prompt("p", np.array([9], np.int32), "42")
        rollout = Rollout(
            prompt, np.array(tokens, np.int32), np.zeros(len(tokens), np.float32), "stop", 0, 1.0
        )
        write_rollouts(tmp_path, step, [[rollout]], decode)
    known = json.loads((tmp_path / "rollouts" / "vocabulary.json").read_text())
    assert known == {"3": "C", "4": "D", "5": "E"}
    assert asked.count([4]) == 1  # a token is decoded once a run


def long_groups(prompts: int, samples: int, tokens: int) -> list[list[Rollout]]:
    rng = np.random.default_rng(0)

    def rollout(prompt: Prompt) -> Rollout:
        ids = rng.integers(0, 50, tokens).astype(np.int32)
        return Rollout(prompt, ids, -rng.exponential(0.5, tokens).astype(np.float32), "stop", 0, 1.0, 1.0)

    asked = [Prompt(str(p), np.arange(3, dtype=np.int32), "42") for p in range(prompts)]
    return [[rollout(prompt) for _ in range(samples)] for prompt in asked]


def test_a_step_is_never_in_memory_as_text(tmp_path: Path) -> None:
    """A step may have gigabytes of it."""
    groups = long_groups(prompts=64, samples=4, tokens=1000)
    tracemalloc.start()
    try:
        write_rollouts(tmp_path, 0, groups, lambda ids: " ".join(map(str, ids)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    (file,) = rollout_files(tmp_path)
    of_group = file.stat().st_size / len(groups)
    # the lists of one row take more than its text
    assert peak < 8 * of_group


def test_logprobs_are_rounded_as_python_rounds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ties = -rng.integers(0, 2**20, 4000) / 2.0 ** rng.integers(5, 20, 4000)
    values = np.concatenate([-rng.exponential(0.5, 4000), ties, [0.0, -0.0, -1e-5, -9998.0, np.nan]])
    values = values.astype(np.float32)
    rollout = Rollout(
        Prompt("a", np.zeros(1, np.int32), "1"), np.zeros(len(values), np.int32), values, "stop", 0
    )
    write_rollouts(tmp_path, 0, [[rollout]], str)
    (file,) = rollout_files(tmp_path)
    assert json.dumps([round(float(x), 4) for x in values]) in file.read_text()


def test_old_rollouts_go(tmp_path: Path) -> None:
    prompt = Prompt("a", np.zeros(1, np.int32), "1")
    rollout = Rollout(prompt, np.zeros(2, np.int32), np.zeros(2, np.float32), "stop", 0)
    for step in range(5):
        write_rollouts(tmp_path, step, [[rollout]], str, keep=2)
    kept = sorted(path.name for path in (tmp_path / "rollouts").glob("step_*"))
    assert kept == ["step_000003.jsonl", "step_000004.jsonl"]


def test_reading_stops_after_so_many_bytes(tmp_path: Path) -> None:
    prompt = Prompt("a", np.zeros(1, np.int32), "1")
    rollout = Rollout(prompt, np.zeros(2, np.int32), np.zeros(2, np.float32), "stop", 0, 1.0)
    write_rollouts(tmp_path, 0, [[rollout] * 5], str)
    (file,) = rollout_files(tmp_path)
    line = file.stat().st_size // 5
    assert [row["sample"] for row in read_rollouts(file, 0)] == [0]
    assert len(list(read_rollouts(file, 2 * line))) == 2
    assert len(list(read_rollouts(file, 10**9))) == 5
    assert read_vocabulary(tmp_path) == {"0": "[0]"} and read_vocabulary(tmp_path / "none") == {}


@pytest.mark.parametrize("damage", [b'{"1": "a', b"\xff", b"[]", b""])
def test_a_damaged_vocabulary_is_made_again(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "vocabulary.json").write_bytes(damage)
    assert read_vocabulary(tmp_path) == {}


@pytest.mark.parametrize("damage", [b"\xff\n", b'{"step": \n', b"[]\n", b'{"step": 1}\n'])
def test_a_damaged_rollout_is_left_out_and_counted(tmp_path: Path, damage: bytes) -> None:
    prompt = Prompt("a", np.zeros(1, np.int32), "1")
    rollout = Rollout(prompt, np.zeros(2, np.int32), np.zeros(2, np.float32), "stop", 0)
    write_rollouts(tmp_path, 0, [[rollout, rollout]], str)
    (file,) = rollout_files(tmp_path)
    whole = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(whole[0] + damage + whole[1])
    assert [row and row["sample"] for row in read_rollouts(file, 10**9)] == [0, None, 1]
