"""prompts.jsonl, and what follows from it, against counts made by hand and in another way."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from faults import largest_file
from jaxrl.errors import InputError
from jaxrl.telemetry.history import (
    History,
    HistoryRow,
    Totals,
    hardest,
    last_outcomes,
    read_history,
    totals,
)
from jaxrl.types import Prompt, Rollout


def group(name: str, *scores: float) -> list[Rollout]:
    prompt = Prompt(name, np.zeros(1, np.int32), "1")
    return [Rollout(prompt, np.zeros(2, np.int32), np.zeros(2, np.float32), "stop", 0, s) for s in scores]


def row(step: int, **prompts: tuple[int, int]) -> HistoryRow:
    return {"step": step, "prompts": prompts}


# a is solved and lost; b is never solved; c is lost and solved again; d is seen once, all right
ROWS = [
    row(0, a=(2, 4), b=(0, 4), c=(4, 4)),
    row(1, b=(0, 4), c=(0, 4)),
    row(2, a=(4, 4), d=(8, 8)),
    row(3, a=(0, 4), c=(1, 4)),
]


def test_a_step_s_line_counts_right_answers_and_all(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    groups = [group("a", 1, -1, 1), group("b", -1, np.nan), group('ü"', np.float32(1)), group("a", -1, 1), []]
    with closing(History(path, 0, print)) as history:
        history.log(0, groups)
        assert json.loads(path.read_text()) == {
            "step": 0,
            "prompts": {"a": [3, 5], "b": [0, 2], 'ü"': [1, 1]},
        }
        history.log(1, [])
    assert read_history(path) == [row(0, **{"a": (3, 5), "b": (0, 2), 'ü"': (1, 1)}), row(1)]


def test_the_history_survives_a_restart_without_the_steps_to_be_repeated(tmp_path: Path) -> None:
    path, lines = tmp_path / "prompts.jsonl", list[str]()
    with closing(History(path, 0, lines.append)) as history:
        for step in range(4):
            history.log(step, [group("a", *[1] * step, -1)])
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole) + '{"step": 4, "prom')  # killed while writing
    with closing(History(path, 2, lines.append)) as history:
        assert path.read_text() == "".join(whole[:2])
        for step in (2, 3):
            history.log(step, [group("a", *[1] * step, -1)])
    assert path.read_text() == "".join(whole)
    assert not lines


@pytest.mark.parametrize(
    "damage",
    [
        b"\xff\n",
        b"[]\n",
        b'{"step": 1}\n',
        b'{"step": 1.0, "prompts": {}}\n',
        b'{"step": 1, "prompts": []}\n',
        b'{"step": 1, "prompts": {"a": 1}}\n',
        b'{"step": 1, "prompts": {"a": [1]}}\n',
        b'{"step": 1, "prompts": {"a": [true, 2]}}\n',
        b'{"step": 1, "prompts": {"a": [3, 2]}}\n',
        b'{"step": 1, "prompts": {"a": [-1, 2]}}\n',
        b'{"step": 1, "prompts": {"a": [0, 0]}}\n',
    ],
)
def test_a_damaged_line_costs_no_other_one(tmp_path: Path, damage: bytes) -> None:
    path, lines = tmp_path / "prompts.jsonl", list[str]()
    good = b'{"step": 0, "prompts": {"a": [1, 2]}}\n'
    path.write_bytes(good + damage)
    assert read_history(path) == [row(0, a=(1, 2))]
    History(path, 2, lines.append).close()
    assert path.read_bytes() == good
    assert (tmp_path / "prompts.damaged.jsonl").read_bytes() == damage
    assert "prompts.jsonl: 1 lines were damaged and are now in" in lines[0]
    assert "prompts.jsonl: 1 of the 2 steps before have no row" in lines[1]


def test_a_run_without_the_file_has_no_history(tmp_path: Path) -> None:
    assert read_history(tmp_path / "prompts.jsonl") == []
    assert totals([]) == hardest([]) == []
    assert last_outcomes([]).shape == (0, 3)


def test_a_full_disk_ends_the_run(tmp_path: Path) -> None:
    full = pytest.raises(InputError, match=r"prompts\.jsonl: cannot be written \(File")
    with closing(History(tmp_path / "prompts.jsonl", 0, print)) as history, largest_file(100), full:
        for step in range(30):
            history.log(step, [group("a", 1)])


def test_totals_of_prompts() -> None:
    found = totals(ROWS)
    assert found == [
        Totals("a", shown=12, right=6, last_step=3, last_right=0),
        Totals("b", shown=8, right=0, last_step=1, last_right=0),
        Totals("c", shown=12, right=5, last_step=3, last_right=1),
        Totals("d", shown=8, right=8, last_step=2, last_right=8),
    ]
    assert [prompt.id for prompt in found if prompt.lost] == ["a"]


def test_the_hardest_have_enough_answers_and_the_lowest_shares() -> None:
    def names(count: int, least: int) -> list[str]:
        return [prompt.id for prompt in hardest(totals(ROWS), count, least)]

    assert names(10, 1) == names(10, 8) == ["b", "c", "a", "d"]
    assert names(2, 8) == ["b", "c"]
    assert names(10, 9) == ["c", "a"]
    assert names(10, 16) == ["c", "a"]  # none has 16, and these have the most
    equal = [Totals("x", 8, 0, 0, 0), Totals("y", 16, 0, 0, 0), Totals("z", 8, 0, 0, 0)]
    assert [prompt.id for prompt in hardest(equal, least=8)] == ["y", "x", "z"]


def test_outcomes_are_those_of_the_last_showing() -> None:
    expected = [
        [1 / 3, 1 / 3, 1 / 3],  # c, a, b
        [0, 1 / 3, 2 / 3],  # -, a, b and c
        [2 / 4, 0, 2 / 4],  # a and d, -, b and c
        [1 / 4, 1 / 4, 2 / 4],  # d, c, a and b
    ]
    np.testing.assert_allclose(last_outcomes(ROWS), expected)
    np.testing.assert_array_equal(last_outcomes([row(0)]), np.zeros((1, 3)))


STEPS = st.lists(
    st.dictionaries(st.sampled_from("abcdef"), st.sampled_from([(0, 2), (1, 2), (2, 2)]), min_size=1),
    max_size=12,
)


@given(STEPS)
def test_outcomes_agree_with_a_look_back_from_every_step(steps: list[dict[str, tuple[int, int]]]) -> None:
    found = last_outcomes([{"step": n, "prompts": prompts} for n, prompts in enumerate(steps)])
    for n in range(len(steps)):
        last = {name: counts for prompts in steps[: n + 1] for name, counts in prompts.items()}
        rights = [right for right, _ in last.values()]
        np.testing.assert_allclose(found[n], [rights.count(k) / len(last) for k in (2, 1, 0)])
