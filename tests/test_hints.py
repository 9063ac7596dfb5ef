"""Problems chosen by their length, hints from worked solutions, and the order that prompts are taken in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl import data
from jaxrl.config import Data, Eval, Source
from jaxrl.errors import InputError
from jaxrl.types import JsonObject, Order, Prompt, Tokenizer
from tiny import jsonl

PLAIN = {"problem_column": "problem", "answer_column": "answer", "suffix": ""}
HALF = PLAIN | {"hint_column": "solution", "hint_share": 0.5}


def row(problem: str, answer: str = "4", **more: object) -> JsonObject:
    return {"problem": problem, "answer": answer, **more}


def texts(found: data.PromptSet, tokenizer: Tokenizer) -> list[str]:
    """What stands between the user's and the assistant's tags."""
    decoded = [tokenizer.decode(prompt.tokens) for prompt in found.prompts]
    return [text.removeprefix("<bos><user>").removesuffix("<assistant>") for text in decoded]


def refusal(section: Data, tokenizer: Tokenizer) -> str:
    with pytest.raises(InputError) as caught:
        data.load_prompts(section, tokenizer)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- lengths


@pytest.mark.parametrize(
    ("low", "high", "kept"),
    [(0, 0, "1234"), (2, 0, "234"), (0, 3, "123"), (2, 3, "23"), (3, 3, "3"), (4, 99, "4")],
)
def test_problems_are_kept_from_the_shortest_to_the_longest_wanted(
    tmp_path: Path, tokenizer: Tokenizer, low: int, high: int, kept: str
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [row("é" * n) for n in (1, 2, 3, 4)])  # characters, not bytes
    section = Data(path=path, min_characters=low, max_characters=high, **PLAIN | {"suffix": " Box it."})
    found = data.load_prompts(section, tokenizer)
    assert [prompt.id for prompt in found.prompts] == list(kept)
    assert texts(found, tokenizer) == ["<unk>" * int(n) + " Box it." for n in kept]
    left_out = f"{4 - len(kept)} too short or long in characters, " if len(kept) < 4 else ""
    assert f": {len(kept)} prompts from 4 rows (0 duplicates, {left_out}0 over-long" in found.summary()


def test_a_wrapper_and_a_prefix_are_not_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = jsonl(tmp_path / "a.jsonl", [row(data.DAPO_PREFIX + "2 + 2" + data.DAPO_SUFFIX)])
    five = {"min_characters": 5, "max_characters": 5, "prefix": "Now: "}
    assert texts(data.load_prompts(Data(path=path, **PLAIN, **five), tokenizer), tokenizer) == ["Now: 2 + 2"]
    refusal(Data(path=path, strip_dapo_wrapper=False, **PLAIN, **five), tokenizer)


def test_lengths_that_leave_nothing_are_named_with_those_there_are(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [row("x" * n) for n in (7, 3, 9)])
    said = refusal(Data(path=path, min_characters=10, **PLAIN), tokenizer)
    assert "a.jsonl: data.min_characters = 10 and data.max_characters = 0 leave out all 3 problems" in said
    assert "which have 3 to 9 characters; change them, 0 is no bound" in said


def test_ids_and_duplicates_are_those_without_the_bounds(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [row("long one", id="a"), row("short", id="a"), row("short", id="b"), row("tiny", id="a")]
    path = jsonl(tmp_path / "a.jsonl", rows)
    every = data.load_prompts(Data(path=path, **PLAIN), tokenizer)
    some = data.load_prompts(Data(path=path, max_characters=5, **PLAIN), tokenizer)
    assert [prompt.id for prompt in every.prompts] == ["a", "a#2", "a#4"]
    assert [prompt.id for prompt in some.prompts] == ["a#2", "a#4"]
    assert some.duplicates == every.duplicates == 1


# --- hints

WORKED = "<think>Hm. 5?</think>No, 4.</think>\n\nTwo and two: 2 + 2 = 4."  # 25 characters at the end


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (0.25, "2 + 2\n\n"),  # 6 characters are too few
        (0.39, "2 + 2\n\n"),  # 9.75
        (0.4, "2 + 2\n\n## Hint.\n\nTwo and "),  # 10
        (0.5, "2 + 2\n\n## Hint.\n\nTwo and tw"),  # 12.5
        (1.0, "2 + 2\n\n## Hint.\n\nTwo and two: 2 + 2 = 4."),
    ],
)
def test_a_hint_is_an_exact_share_of_what_follows_the_last_thought(
    tmp_path: Path, tokenizer: Tokenizer, share: float, shown: str
) -> None:
    rows = [row("2 + 2", solution=WORKED)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in (jsonl(tmp_path / "a.jsonl", rows), str(tmp_path / "a.parquet")):
        found = data.load_prompts(Data(path=path, **HALF | {"hint_share": share}), tokenizer)
        assert texts(found, tokenizer) == [shown]
        assert found.prompts[0].answer == "4"


def test_a_hint_of_ten_characters_is_shown_and_one_of_nine_is_not(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    rows = [row("p", solution="The answer here is 4"), row("q", solution="The answer hre is 4")]
    section = Data(path=jsonl(tmp_path / "a.jsonl", rows), **HALF | {"hint_prefix": " - Hint: "})
    assert texts(data.load_prompts(section, tokenizer), tokenizer) == ["p - Hint: The answer", "q "]


def test_a_hint_stands_between_problem_and_suffix(tmp_path: Path, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]
    rows = [row("x", solution=WORKED) | {"problem": [*messages, {"role": "user", "content": "2 + 2"}]}]
    around = {"prefix": "Now: ", "suffix": "\n\nBox it.", "system": "Add."}
    section = Data(path=jsonl(tmp_path / "a.jsonl", rows), **HALF | around)
    (text,) = texts(data.load_prompts(section, tokenizer), tokenizer)
    assert text.endswith("Now: 2 + 2\n\n## Hint.\n\nTwo and tw\n\nBox it.")
    assert text.count("Hint") == 1 and "1 + 1" in text


def test_rows_without_a_solution_that_has_the_answer_are_left_out(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    rows = [
        row("a", solution="It is five, by counting."),
        row("b", solution="So 2 and 2 are 4 in all."),
        row("c", solution=None),
        row("d", solution="4, I think</think> \n "),
        row("e", solution="The 4 is in the thought</think>and nowhere else."),
        row("f", r"\boxed{4}", solution="The box is the answer's: 4"),
    ]
    path = jsonl(tmp_path / "a.jsonl", rows)
    found = data.load_prompts(Data(path=path, **HALF), tokenizer)
    assert [prompt.id for prompt in found.prompts] == ["2", "6"]
    assert "0 duplicates, 4 without a worked solution that has the answer, 0 over-long" in found.summary()
    path = jsonl(tmp_path / "b.jsonl", [rows[0], rows[2]])
    said = refusal(Data(path=path, **HALF), tokenizer)
    assert (
        "b.jsonl: data.hint_column = 'solution' has no worked solution with the row's answer in any of 2"
        in said
    )


def test_a_missing_column_of_solutions_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [row("a", id=3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in (jsonl(tmp_path / "a.jsonl", rows), str(tmp_path / "a.parquet")):
        said = refusal(Data(path=path, **HALF), tokenizer)
        assert said.endswith("no column 'solution'; there are: problem, answer, id. Set data.hint_column")
    lists = jsonl(tmp_path / "b.jsonl", [row("a", solution=["So it is 4."])])
    said = refusal(Data(path=lists, **HALF), tokenizer)
    assert "b.jsonl:1: 'solution' is a list, and a worked solution is text; set data.hint_column" in said


def test_one_column_may_hold_answer_and_solution(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"problem": "2 + 2", "answer": "Two and two are four.\n#### 4"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in (jsonl(tmp_path / "a.jsonl", rows), str(tmp_path / "a.parquet")):
        section = Data(path=path, **HALF | {"hint_column": "answer", "answer_pattern": "#### (.+)"})
        found = data.load_prompts(section, tokenizer)
        assert texts(found, tokenizer) == ["2 + 2\n\n## Hint.Two and two ar"]
        assert found.prompts[0].answer == "4"


def test_ids_and_duplicates_are_those_without_hints(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [
        row("a", solution="no"),
        row("a", solution="It is 4, it is."),
        row("b", solution="It is 4, it is."),
    ]
    path = jsonl(tmp_path / "a.jsonl", rows)
    plain = data.load_prompts(Data(path=path, **PLAIN), tokenizer)
    hinted = data.load_prompts(Data(path=path, **HALF | {"hint_share": 1.0}), tokenizer)
    assert [prompt.id for prompt in plain.prompts] == ["1", "3"]
    assert [prompt.id for prompt in hinted.prompts] == ["3"]  # of copies the first is kept, solution or not
    assert plain.duplicates == hinted.duplicates == 1
    assert plain.digest() != hinted.digest()


def test_held_out_problems_have_any_length_and_no_hint(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = jsonl(tmp_path / "a.jsonl", [row("2 + 2"), row("two and two")])  # without solutions
    section = Data(path="nowhere.jsonl", min_characters=8, max_characters=9, **HALF)
    found = data.load_prompts(section, tokenizer, Eval(path=path))
    assert texts(found, tokenizer) == ["2 + 2", "two and two"]


def test_bounds_and_hints_hold_for_every_source(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [row("x" * n, solution=WORKED if n % 2 else "no") for n in range(1, 7)]
    sources = tuple(Source(jsonl(tmp_path / f"{name}.jsonl", rows), 1.0) for name in "ab")
    section = Data(path="nowhere", sources=sources, min_characters=2, **HALF)
    found = data.load_prompts(section, tokenizer)
    assert [prompt.id for prompt in found.prompts] == ["1:3", "1:5", "2:3", "2:5"]
    assert texts(found, tokenizer)[0] == "xxx\n\n## Hint.\n\nTwo and tw"
    assert (found.counts.outside, found.counts.unhinted) == (2, 6)
    assert found.mixture == (data.Part(2, 1.0), data.Part(2, 1.0))


# --- prompts that are left out later


def keys(found: data.PromptSet, firsts: str) -> list[str]:
    """Of the prompts whose ids begin with one of these characters."""
    return [prompt.key for prompt in found.prompts if prompt.id[0] in firsts]


def test_a_set_without_some_prompts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = jsonl(tmp_path / "a.jsonl", [row(str(n)) for n in range(4)])
    found = data.load_prompts(Data(path=path, **PLAIN), tokenizer)
    some = found.without([*keys(found, "24"), "none of these"])
    assert [prompt.id for prompt in some.prompts] == ["1", "3"]
    assert some.mixture == () and some.counts == found.counts
    assert found.without([]).digest() == found.digest() != some.digest()
    assert found.without(keys(found, "1234")).prompts == []
    assert len(found.prompts) == 4


@pytest.mark.parametrize("order", ["shuffle", "copies", "replacement"])
@pytest.mark.parametrize("gone", ["1", "2", "3", "12", "23", "13"])
def test_a_source_without_prompts_is_not_drawn_from(
    tmp_path: Path, tokenizer: Tokenizer, order: Order, gone: str
) -> None:
    weights = (0.7, 0.1, 0.2)  # whose sum in float64 is below 1
    sources = tuple(
        Source(jsonl(tmp_path / f"{w}.jsonl", [row(f"{w} {n}") for n in range(3)]), w) for w in weights
    )
    found = data.load_prompts(Data(path="nowhere", sources=sources, **PLAIN), tokenizer)
    some = found.without(keys(found, gone))
    assert [part.prompts for part in some.mixture] == [0 if n in gone else 3 for n in "123"]
    drawn = data.batch(some.prompts, 1, 0, 4096, order, some.mixture)
    left = {n: weight for n, weight in zip("123", weights, strict=True) if n not in gone}
    for n, weight in left.items():
        share = np.mean([prompt.id[0] == n for prompt in drawn])
        assert share == pytest.approx(
            weight / sum(left.values()), abs=0.03 if order == "replacement" else 0.001
        )
    assert len({prompt.id for prompt in drawn}) == 3 * len(left)
    shares = [float(line.split("%")[0]) for line in some.summary().splitlines()]
    expected = [100 * left.get(n, 0) / sum(left.values()) for n in "123"]
    assert shares == pytest.approx(expected, rel=0.01)


# --- the order

PROMPTS = [Prompt(str(n), np.array([n], np.int32), "") for n in range(60)]
MIXTURE = (data.Part(7, 1.0), data.Part(40, 2.5), data.Part(13, 0.001))
# Steps 4 of 9 prompts, as batches were before they had a cursor; seeds of one and of two words
BEFORE = [
    (1, "shuffle", (), [32, 18, 13, 38, 0, 36, 4, 5, 2]),
    (1, "copies", (), [14, 20, 30, 9, 4, 0, 13, 7, 33]),
    (1, "replacement", (), [24, 15, 15, 34, 25, 36, 26, 20, 18]),
    (1, "shuffle", MIXTURE, [3, 39, 22, 16, 43, 4, 2, 18, 6]),
    (1, "copies", MIXTURE, [2, 29, 39, 10, 32, 4, 4, 30, 2]),
    (1, "replacement", MIXTURE, [8, 15, 7, 18, 38, 31, 1, 36, 4]),
    (2**32 + 5, "shuffle", (), [33, 38, 3, 17, 34, 3, 10, 8, 13]),
    (2**32 + 5, "copies", (), [2, 34, 36, 12, 37, 14, 20, 24, 5]),
    (2**32 + 5, "replacement", (), [37, 20, 37, 18, 1, 11, 19, 16, 18]),
    (2**32 + 5, "shuffle", MIXTURE, [5, 5, 31, 3, 26, 8, 17, 4, 14]),
    (2**32 + 5, "copies", MIXTURE, [0, 5, 16, 4, 33, 12, 33, 1, 32]),
    (2**32 + 5, "replacement", MIXTURE, [23, 8, 19, 42, 4, 6, 3, 0, 25]),
]


def ids(
    seed: int, first: int, size: int, order: Order, mixture: Sequence[data.Part] = (), restart: int = 0
) -> list[int]:
    prompts = PROMPTS if mixture else PROMPTS[:40]
    return [int(prompt.id) for prompt in data.batch(prompts, seed, first, size, order, mixture, restart)]


@pytest.mark.parametrize(("seed", "order", "mixture", "expected"), BEFORE)
def test_whole_steps_take_what_they_took_before_there_was_a_cursor(
    seed: int, order: Order, mixture: Sequence[data.Part], expected: list[int]
) -> None:
    assert ids(seed, 36, 9, order, mixture) == expected


@given(
    sizes=st.lists(st.integers(1, 700), min_size=1, max_size=6),
    first=st.integers(0, 5000),
    seed=st.integers(0, 2**64 - 1),
    order=st.sampled_from(["shuffle", "copies"]),
    mixture=st.sampled_from([(), MIXTURE]),
    restart=st.integers(0, 3),
)
def test_a_stream_is_the_same_in_batches_of_any_sizes(
    sizes: list[int], first: int, seed: int, order: Order, mixture: Sequence[data.Part], restart: int
) -> None:
    begins = np.cumsum([first, *sizes])[:-1].tolist()
    stream: list[int] = []
    for begin, size in zip(begins, sizes, strict=True):
        stream += ids(seed, begin, size, order, mixture, restart)
    assert stream == ids(seed, first, sum(sizes), order, mixture, restart)


@pytest.mark.parametrize("mixture", [(), MIXTURE])
@pytest.mark.parametrize("order", ["shuffle", "copies", "replacement"])
@pytest.mark.parametrize("seed", [1, 2**40])
def test_an_order_that_begins_anew_is_another_one(
    seed: int, order: Order, mixture: Sequence[data.Part]
) -> None:
    begun = [ids(seed, 80, 40, order, mixture, restart) for restart in range(4)]
    assert len({tuple(each) for each in begun}) == 4
    assert begun == [ids(seed, 80, 40, order, mixture, restart) for restart in range(4)]
    if not mixture and order == "shuffle":
        assert all(sorted(each) == list(range(40)) for each in begun)


@pytest.mark.parametrize("mixture", [(), MIXTURE])
def test_independent_draws_go_on_from_any_place(mixture: Sequence[data.Part]) -> None:
    drawn = [tuple(ids(1, first, 40, "replacement", mixture)) for first in range(0, 400, 7)]
    assert len(set(drawn)) == len(drawn)
