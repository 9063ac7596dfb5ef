"""Rollout files."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from faults import largest_file
from jaxrl.errors import InputError
from jaxrl.telemetry import rollouts
from jaxrl.telemetry.rollouts import (
    RolloutRow,
    read_answers,
    read_rollouts,
    read_vocabulary,
    rollout_files,
    step_of,
    write_rollouts,
)
from jaxrl.types import Prompt, Rollout


def test_rollouts_keep_everything_a_reader_needs(tmp_path: Path) -> None:
    prompt = Prompt("p7", np.array([1, 2], np.int32), "42")
    rollout = Rollout(prompt, np.array([3, 4], np.int32), np.array([-0.5, -1.5], np.float32), "stop", 9, -1.0)
    write_rollouts(tmp_path, 12, [[rollout, rollout]], lambda ids: "é".join(map(str, ids)))
    rows = pq.read_table(tmp_path / "rollouts" / "step_000012.parquet").to_pylist()
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
    assert rows[0].keys() == RolloutRow.__required_keys__  # without parts of a reward, no column of them


@pytest.mark.parametrize("lengths", [[1], [3, 1, 700, 2], [5] * 1000])
def test_every_bit_of_every_rollout_comes_back_in_order(tmp_path: Path, lengths: list[int]) -> None:
    rng = np.random.default_rng(0)
    prompts = [Prompt(str(p), rng.integers(0, 9, p + 1, np.int32), f"é{p}") for p in range(len(lengths))]
    groups = [
        [
            Rollout(
                prompt,
                rng.integers(0, 2**31 - 1, length, np.int32),
                # any bits: NaNs and infinities too
                rng.integers(0, 2**32, length, np.uint32).view(np.float32),
                "length",
                2**40,
                float(rng.normal()),
                float(rng.normal()),
            )
            for _ in range(1 + length % 3)
        ]
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    with np.errstate(all="ignore"):
        write_rollouts(tmp_path, 3, groups, lambda ids: f"{ids[0]}")
    (file,) = rollout_files(tmp_path)
    table, flat = pq.read_table(file), [(g, r) for group in groups for g, r in enumerate(group)]
    assert pq.ParquetFile(file).num_row_groups == -(-len(flat) // rollouts.ROW_GROUP)
    for name in ("token_ids", "logprobs"):
        found = table[name].combine_chunks()
        arrays = [r.tokens if name == "token_ids" else r.logprobs for _, r in flat]
        assert found.values.to_numpy().tobytes() == np.concatenate(arrays).tobytes()
        assert found.value_lengths().to_pylist() == list(map(len, arrays))
    columns = {
        "sample": [g for g, _ in flat],
        "prompt_id": [r.prompt.id for _, r in flat],
        "prompt": [str(r.prompt.tokens[0]) for _, r in flat],
        "answer": [r.prompt.answer for _, r in flat],
        "completion": [str(r.tokens[0]) for _, r in flat],
        "score": [r.score for _, r in flat],
        "reward": [r.reward for _, r in flat],
        "version": [2**40] * len(flat),
    }
    assert {name: table[name].to_pylist() for name in columns} == columns


def test_the_same_rollouts_give_the_same_bytes(tmp_path: Path) -> None:
    groups = long_groups(prompts=3, samples=4, tokens=50)
    for run in ("one", "two"):
        write_rollouts(tmp_path / run, 0, groups, str)
    one, two = (rollout_files(tmp_path / run)[0].read_bytes() for run in ("one", "two"))
    assert one == two


def with_parts(group: Sequence[Rollout], parts: Sequence[dict[str, float]]) -> list[Rollout]:
    """The rollouts, with the parts of their rewards by name."""
    found = []
    for r, each in zip(group, parts, strict=True):
        found.append(dataclasses.replace(r))
        object.__setattr__(found[-1], "rewards", each)
    return found


def test_parts_of_a_reward_are_a_struct_with_the_names_of_the_step(tmp_path: Path) -> None:
    (group,) = long_groups(prompts=1, samples=3, tokens=4)
    parts = ({"right": 1.0, "format": 0.5}, {"right": 0.0}, {})
    write_rollouts(tmp_path, 0, [with_parts(group, parts)], str)
    (file,) = rollout_files(tmp_path)
    expected = [{"format": each.get("format"), "right": each.get("right")} for each in parts]
    assert pq.read_table(file)["rewards"].to_pylist() == expected
    assert [row and row.get("rewards") for row in read_answers(file)] == expected


def test_datasets_loads_the_files_of_a_run(tmp_path: Path) -> None:
    import datasets

    parts = [{"right": 1.0}] * 4
    groups = [with_parts(group, parts) for group in long_groups(prompts=3, samples=4, tokens=50)]
    for step in (0, 1):
        write_rollouts(tmp_path, step, groups, str)
    files, cache = [str(file) for file in rollout_files(tmp_path)], str(tmp_path / "cache")
    found = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
    assert found["step"][:] == [0] * 12 + [1] * 12
    flat = [r for group in groups for r in group] * 2
    for row, r in zip(found, flat, strict=True):
        assert row["token_ids"] == r.tokens.tolist() and row["logprobs"] == r.logprobs.tolist()
        assert row["rewards"] == {"right": 1.0} and row["score"] == r.score


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


def test_a_step_is_never_in_memory_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step may have gigabytes of text, ids and log-probs."""
    monkeypatch.setattr(rollouts, "ROW_GROUP", 4)
    groups, before = long_groups(prompts=64, samples=4, tokens=1000), pa.default_memory_pool()
    arrow = pa.proxy_memory_pool(before)
    pa.set_memory_pool(arrow)
    tracemalloc.start()
    try:
        write_rollouts(tmp_path, 0, groups, lambda ids: " ".join(map(str, ids)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
    (file,) = rollout_files(tmp_path)
    stored = pq.ParquetFile(file).metadata
    uncompressed = sum(stored.row_group(i).total_byte_size for i in range(stored.num_row_groups))
    assert stored.num_row_groups == 64 and uncompressed > 64 * 4 * 10_000
    assert peak + arrow.max_memory() < uncompressed / 5
    assert arrow.max_memory() > 0


def test_old_rollouts_go(tmp_path: Path) -> None:
    prompt = Prompt("a", np.zeros(1, np.int32), "1")
    rollout = Rollout(prompt, np.zeros(2, np.int32), np.zeros(2, np.float32), "stop", 0)
    for step in range(5):
        write_rollouts(tmp_path, step, [[rollout]], str, keep=2)
    kept = sorted(path.name for path in (tmp_path / "rollouts").glob("step_*"))
    assert kept == ["step_000003.parquet", "step_000004.parquet"]


def as_lines(file: Path) -> Path:
    """The same rollouts as older versions wrote them, in place of the file."""
    lines = [json.dumps(row) + "\n" for row in read_rollouts(file, 10**9)]
    file.unlink()
    file.with_suffix(".jsonl").write_text("".join(lines))
    return file.with_suffix(".jsonl")


@pytest.mark.parametrize("form", [".parquet", ".jsonl"])
def test_reading_stops_after_so_many_bytes(tmp_path: Path, form: str) -> None:
    prompt = Prompt("a", np.zeros(1, np.int32), "1")
    rollout = Rollout(prompt, np.zeros(2, np.int32), np.zeros(2, np.float32), "stop", 0, 1.0)
    write_rollouts(tmp_path, 0, [[rollout] * 5], str)
    (file,) = rollout_files(tmp_path)
    file = as_lines(file) if form == ".jsonl" else file
    row = file.stat().st_size // 5
    assert [row and row["sample"] for row in read_rollouts(file, 0)] == [0]
    assert len(list(read_rollouts(file, 2 * row))) == 2
    assert len(list(read_rollouts(file, 10**9))) == 5
    assert read_vocabulary(tmp_path) == {"0": "[0]"} and read_vocabulary(tmp_path / "none") == {}


def test_a_run_that_began_with_lines_goes_on_in_parquet(tmp_path: Path) -> None:
    groups = long_groups(prompts=1, samples=2, tokens=3)
    for step in range(4):
        write_rollouts(tmp_path, step, groups, str)
        as_lines(rollout_files(tmp_path)[-1])
    old = rollout_files(tmp_path)
    assert [file.suffix for file in old] == [".jsonl"] * 4
    for step in (2, 3, 4):  # from a checkpoint after the second step
        write_rollouts(tmp_path, step, groups, str, keep=4)
    files = rollout_files(tmp_path)
    assert [step_of(file) for file in files] == [1, 2, 3, 4]
    assert [file.suffix for file in files] == [".jsonl", *[".parquet"] * 3]
    assert sorted((tmp_path / "rollouts").glob("step_*")) == files
    lines, parquet = (list(read_rollouts(file, 10**9)) for file in files[:2])
    for a, b in zip(lines, parquet, strict=True):
        assert a and b and a | {"step": 2} == b
    shutil.copy(old[1], files[1].with_suffix(".jsonl"))  # killed before it could be deleted
    assert rollout_files(tmp_path) == files


def test_without_room_the_line_names_the_file_and_the_old_one_stays(tmp_path: Path) -> None:
    write_rollouts(tmp_path, 0, long_groups(prompts=1, samples=1, tokens=9), str)
    (file,) = rollout_files(tmp_path)
    before = file.read_bytes()
    full = pytest.raises(
        InputError, match=r"step_000000\.parquet: cannot be written \(File too large\); make"
    )
    with largest_file(5000), full:
        write_rollouts(tmp_path, 0, long_groups(prompts=1, samples=8, tokens=1000), str)
    assert file.read_bytes() == before


@pytest.mark.parametrize("damage", [b'{"1": "a', b"\xff", b"[]", b""])
def test_a_damaged_vocabulary_is_made_again(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "vocabulary.json").write_bytes(damage)
    assert read_vocabulary(tmp_path) == {}


@pytest.mark.parametrize("damage", [b"\xff\n", b'{"step": \n', b"[]\n", b'{"step": 1}\n'])
def test_a_damaged_line_is_left_out_and_counted(tmp_path: Path, damage: bytes) -> None:
    write_rollouts(tmp_path, 0, long_groups(prompts=1, samples=2, tokens=2), str)
    file = as_lines(*rollout_files(tmp_path))
    whole = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(whole[0] + damage + whole[1])
    assert [row and row["sample"] for row in read_rollouts(file, 10**9)] == [0, None, 1]
    assert [row and row["sample"] for row in read_answers(file)] == [0, None, 1]


def test_a_damaged_file_is_read_up_to_the_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "ROW_GROUP", 4)
    write_rollouts(tmp_path, 0, long_groups(prompts=3, samples=4, tokens=50), str)
    (file,) = rollout_files(tmp_path)
    whole, rng = file.read_bytes(), np.random.default_rng(0)
    last = pq.ParquetFile(file).metadata.row_group(2)
    ids, logprobs = (last.column(n).data_page_offset for n in (last.num_columns - 2, last.num_columns - 1))
    expected = list(read_rollouts(file, 10**9))
    for at in [*rng.integers(0, len(whole), 100), ids + 50, logprobs + 50]:
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        found = list(read_rollouts(file, 10**9))
        # what the checksums do not cover: the names in the footer
        assert found == expected or [*expected[: len(found) - 1], None] == found, at
        assert at not in (ids + 50, logprobs + 50) or len(found) == 9
    for part in (b"", whole[:100], whole[: len(whole) // 2], whole[:-1]):
        file.write_bytes(part)
        assert list(read_rollouts(file, 10**9)) == list(read_answers(file)) == [None]


def test_a_file_with_other_columns_is_damaged(tmp_path: Path) -> None:
    write_rollouts(tmp_path, 0, long_groups(prompts=1, samples=2, tokens=2), str)
    (file,) = rollout_files(tmp_path)
    pq.write_table(pq.read_table(file).drop_columns(["score"]), file)
    assert list(read_rollouts(file, 10**9)) == [None]
    file.unlink()
    file.mkdir()
    with pytest.raises(IsADirectoryError):
        list(read_rollouts(file, 10**9))
