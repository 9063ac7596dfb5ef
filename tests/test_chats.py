"""Chats, answers and mixtures: rows as templates, verifiers and batches get them."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrl import data
from jaxrl.config import Data, Eval, Source
from jaxrl.data.chats import answer_of, arguments_of, chat_of
from jaxrl.errors import InputError
from jaxrl.rewards import VERIFIERS, WINNING, can_win
from jaxrl.types import JsonObject, Order, Prompt, Tokenizer, Verifier
from tiny import jsonl, tiny_tokenizer

PLAIN = {"problem_column": "problem", "answer_column": "answer", "suffix": ""}
USER = {"role": "user", "content": "q"}
SYSTEM = {"role": "system", "content": "s"}
SHOT = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]


def load(
    path: str, tokenizer: Tokenizer, verifier: Verifier | None = None, **changes: object
) -> data.PromptSet:
    return data.load_prompts(Data(path=path, **PLAIN | changes), tokenizer, verifier=verifier)


def refusal(path: str, tokenizer: Tokenizer, verifier: Verifier | None = None, **changes: object) -> str:
    with pytest.raises(InputError) as caught:
        load(path, tokenizer, verifier, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- chats


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("chat", "text"),
    [
        ([SYSTEM, USER], "<bos><system>s<user>q!<assistant>"),
        ([*SHOT, USER], "<bos><user>1 + 1<assistant>2<user>q!<assistant>"),
        ([USER, USER], "<bos><user>q<user>q!<assistant>"),
        ([SYSTEM, *SHOT, USER], "<bos><system>s<user>1 + 1<assistant>2<user>q!<assistant>"),
        ([{"role": "user", "content": [{"type": "text", "text": "q"}]}], "<bos><user>q!<assistant>"),
        (
            [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}],
            "<bos><system>s<user>q!<assistant>",
        ),
    ],
)
def test_a_chat_goes_to_the_template_whole(
    tmp_path: Path, tokenizer: Tokenizer, chat: list[JsonObject], text: str, kind: str
) -> None:
    path = str(tmp_path / f"a.{kind}")
    rows = [{"problem": chat, "answer": "1"}]
    if kind == "jsonl":
        jsonl(Path(path), rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    (prompt,) = load(path, tokenizer, suffix="!").prompts
    assert tokenizer.decode(prompt.tokens) == text


def test_chats_with_the_same_first_message_are_different_prompts(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    rows = [{"problem": [SYSTEM, USER | {"content": str(n % 3)}], "answer": "1"} for n in range(6)]
    found = load(jsonl(tmp_path / "a.jsonl", rows), tokenizer)
    assert (len(found.prompts), found.duplicates) == (3, 3)


def test_the_wrapper_goes_and_prefix_and_suffix_come_at_the_last_message() -> None:
    wrapped = data.DAPO_PREFIX + "q" + data.DAPO_SUFFIX
    chat = chat_of([SYSTEM, USER | {"content": wrapped}], Data(prefix="<", suffix=">"), "row")
    assert chat.messages == [SYSTEM, USER | {"content": "<q>"}]
    assert chat.problem == "q"


def test_the_recipe_s_system_message_comes_first(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"problem": "q", "answer": "1"}])
    (prompt,) = load(path, tokenizer, system="Be brief.").prompts
    assert tokenizer.decode(prompt.tokens) == "<bos><system>Be brief.<user>q<assistant>"


@pytest.mark.parametrize(
    ("chat", "changes", "message"),
    [
        ([*SHOT], {}, "ends in a message of 'assistant'"),
        ([SYSTEM], {}, "ends in a message of 'system'"),
        ([SYSTEM, SYSTEM, USER], {}, "a system message that is not the first"),
        ([USER, SYSTEM, USER], {}, "a system message that is not the first"),
        ([{"role": "tool", "content": "x"}, USER], {}, "message 1: 'role' is 'tool'; known roles are"),
        ([{"content": "x"}], {}, "message 1: 'role' is None"),
        ([{"role": ["user"], "content": "x"}], {}, "message 1: 'role' is ['user']"),
        ([{"from": "bot", "value": "x"}], {}, "message 1: 'from' is 'bot'"),
        ([SYSTEM, {"role": "user", "content": " "}], {}, "message 2: 'content' is no text, or empty"),
        ([SYSTEM, {"role": "user"}], {}, "message 2: 'content' is no text, or empty"),
        ([USER, "x"], {}, "message 2 holds neither text nor chat messages"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, "a part of type 'image_url'"),
        ([{"role": "user", "content": ["x"]}], {}, "a part of type 'str'"),
        (
            [{"role": "assistant", "content": "x", "tool_calls": [1]}, USER],
            {},
            "'tool_calls', which is not supported",
        ),
        ([SYSTEM, USER], {"system": "t"}, "has a system message of its own"),
        ([SYSTEM, USER], {"chat_template": False}, "a chat of 2 messages"),
        ("q", {"chat_template": False, "system": "t"}, "a chat of 2 messages, data.system included"),
        (data.DAPO_PREFIX, {}, "holds neither text nor chat messages"),
    ],
)
def test_a_chat_that_cannot_be_continued_is_named(
    tmp_path: Path, tokenizer: Tokenizer, chat: object, changes: dict[str, object], message: str
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"problem": chat, "answer": "1"}])
    said = refusal(path, tokenizer, **changes)
    assert message in said
    assert "a.jsonl:1: 'problem'" in said


@pytest.mark.parametrize(
    ("value", "found"),
    [(None, {}), ("", {}), ({"a": 1, "b": None}, {"a": 1}), ('{"think": false}', {"think": False})],
)
def test_a_row_s_template_arguments(value: object, found: JsonObject) -> None:
    assert arguments_of(value, Data(template_column="extra"), "row") == found


@pytest.mark.parametrize("value", ["{", "[1]", [1], 3, {"a": [1]}, "[" * 100_000])
def test_template_arguments_that_are_none_are_named(value: object) -> None:
    with pytest.raises(InputError, match=r"row 7: 'extra'"):
        arguments_of(value, Data(template_column="extra"), "row 7")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_that_differ_in_template_arguments_are_no_duplicates(tmp_path: Path, kind: str) -> None:
    template = "<bos><user>{{ messages[0]['content'] }}<assistant>{% if think %}?{% endif %}"
    path = str(tmp_path / f"a.{kind}")
    rows = [{"problem": "q", "answer": "1", "extra": {"think": think}} for think in (True, False, True)]
    if kind == "jsonl":
        jsonl(Path(path), rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    found = load(path, tiny_tokenizer(tmp_path, template), template_column="extra")
    assert found.duplicates == 1
    assert [found_arguments(problem) for problem in rows_of(path, template_column="extra")] == [
        {"think": True},
        {"think": False},
    ]


def rows_of(path: str, **changes: object) -> list[data.prompts.Problem]:
    section = Data(path=path, **PLAIN | changes)
    return list(data.prompts._problems([Path(path)], section, data.prompts.Counts()))


def found_arguments(problem: data.prompts.Problem) -> JsonObject:
    return dict(problem.chat.arguments)


# --- answers


@pytest.mark.parametrize(
    ("value", "answer"), [(Decimal("204.00"), "204"), (Decimal("1E+3"), "1000"), (2**60, str(2**60))]
)
def test_numbers_become_their_digits(value: object, answer: str) -> None:
    assert answer_of(value, Data(), "row") == answer


def test_the_answer_pattern_takes_the_part_after_the_solution(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"problem": "q", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"}]
    path = jsonl(tmp_path / "a.jsonl", rows)
    assert load(path, tokenizer, "strict_boxed", answer_pattern="#### (.+)").prompts[0].answer == "7"
    for verifier in VERIFIERS:
        said = refusal(path, tokenizer, verifier)
        assert f"1 of 1 answers cannot be matched by {verifier}, the first in {path}:1" in said
        assert "data.answer_pattern = '#### (.+)'" in said
    said = refusal(path, tokenizer, answer_pattern="A: (.+)")
    assert "a.jsonl:1: 'answer' does not match data.answer_pattern = 'A: (.+)'" in said


def test_answers_that_the_verifier_cannot_match_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"problem": str(n), "answer": "5"} for n in range(3)] + [{"problem": "q", "answer": "9" * 93}]
    path = jsonl(tmp_path / "a.jsonl", rows)
    found = load(path, tokenizer, "strict_boxed")
    assert len(found.prompts) == 4
    assert (
        f"1 of 4 answers cannot be matched by strict_boxed, the first in {path}:4: '9999" in found.summary()
    )
    assert load(path, tokenizer, "minerva").counts.unmatched == 0


@pytest.mark.parametrize(
    ("verifier", "answer", "possible"),
    [
        ("strict_boxed", "9" * 92, True),
        ("strict_boxed", "9" * 93, False),
        ("strict_boxed", "}{", False),
        ("minerva", "5", True),
        ("minerva", "square units", False),  # normalized to nothing, so that an empty answer would win
        ("minerva", "a\nb", False),
        ("equivalent", r"\frac{1}{2}", True),
    ],
)
def test_an_answer_can_win_if_the_verifier_takes_it_and_nothing_else(
    verifier: Verifier, answer: str, possible: bool
) -> None:
    assert can_win(verifier, answer) == possible


def test_every_verifier_has_its_winning_form() -> None:
    assert set(WINNING) == set(VERIFIERS)
    assert all(can_win(verifier, "204") for verifier in VERIFIERS)


def test_rows_without_an_answer_are_left_out_on_request(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [
        {"problem": "a", "answer": "1"},
        {"problem": "b", "answer": None},
        {"problem": "c", "answer": " "},
    ]
    path = jsonl(tmp_path / "a.jsonl", rows)
    found = load(path, tokenizer, skip_unanswered=True)
    assert (len(found.prompts), found.counts.unanswered, found.duplicates) == (1, 2, 0)
    assert "2 unanswered" in found.summary()
    assert "data.skip_unanswered = true" in refusal(path, tokenizer)


def test_another_answer_to_the_same_problem_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"problem": p, "answer": a} for p, a in (("q", "1"), ("q ", "1"), ("q", "1"), ("q", "2"))]
    found = load(jsonl(tmp_path / "a.jsonl", rows), tokenizer)
    assert (len(found.prompts), found.duplicates, found.counts.conflicts) == (2, 2, 1)
    assert f"the first in {tmp_path}/a.jsonl:4" in found.summary()
    assert "more than half" not in found.summary()
    many = load(jsonl(tmp_path / "b.jsonl", rows[:1] * 3), tokenizer)
    assert "more than half of the rows are duplicates" in many.summary()


def test_ids_are_unique_where_the_column_is_not(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"problem": str(n), "answer": "1", "id": "same"} for n in range(3)]
    assert len({p.id for p in load(jsonl(tmp_path / "a.jsonl", rows), tokenizer).prompts}) == 3


# --- mixtures


def test_sources_are_mixed_by_weight_with_fields_of_their_own(tmp_path: Path, tokenizer: Tokenizer) -> None:
    one = jsonl(tmp_path / "a.jsonl", [{"problem": f"a{n}", "answer": "1"} for n in range(3)])
    other = jsonl(tmp_path / "b.jsonl", [{"q": f"b{n}", "a": "so #### 2"} for n in range(5)])
    sources = (
        Source(one, 3.0),
        Source(other, 1.0, problem_column="q", answer_column="a", answer_pattern="#### (.+)"),
    )
    found = data.load_prompts(
        Data(path="nowhere", sources=sources, **PLAIN), tokenizer, verifier="strict_boxed"
    )
    assert [p.id for p in found.prompts] == ["1:1", "1:2", "1:3", "2:1", "2:2", "2:3", "2:4", "2:5"]
    assert {p.answer for p in found.prompts} == {"1", "2"}
    assert found.rows == 8
    texts = data.problem_texts(Data(sources=sources, **PLAIN))
    assert [*texts] == [p.key for p in found.prompts] and [*texts.values()][2:4] == ["a2", "b0"]
    assert f"75% of the prompts from {one}: 3 prompts" in found.summary()
    drawn = Counter(p.id[0] for p in data.batch(found.prompts, 1, 0, 1024, "shuffle", found.mixture))
    assert drawn == {"1": 768, "2": 256}
    held_out = data.load_prompts(Data(sources=sources, **PLAIN), tokenizer, Eval(path=one))
    assert [p.id for p in held_out.prompts] == ["1", "2", "3"]


PROMPTS = [Prompt(str(n), np.array([n], np.int32), "") for n in range(60)]
MIXTURE = (data.Part(7, 1.0), data.Part(40, 2.5), data.Part(13, 0.001))


@pytest.mark.parametrize("size", [1, 100, 1024, 3000])
def test_every_source_goes_through_its_own_epochs(size: int) -> None:
    steps = -(-6000 // size) if size > 1 else 300
    stream = [
        int(p.id)
        for step in range(steps)
        for p in data.batch(PROMPTS, 3, step * size, size, "shuffle", MIXTURE)
    ]
    assert len(stream) == steps * size
    for first, last in ((0, 7), (7, 47), (47, 60)):
        own = [i for i in stream if first <= i < last]
        for epoch in range(len(own) // (last - first)):
            chosen = own[epoch * (last - first) : (epoch + 1) * (last - first)]
            assert sorted(chosen) == list(range(first, last))


def test_a_stream_does_not_depend_on_the_batch_size() -> None:
    whole = data.batch(PROMPTS, 3, 0, 6000, "shuffle", MIXTURE)
    assert [
        p for step in range(60) for p in data.batch(PROMPTS, 3, step * 100, 100, "shuffle", MIXTURE)
    ] == whole
    assert data.batch(PROMPTS, 4, 0, 6000, "shuffle", MIXTURE) != whole


@pytest.mark.parametrize("order", ["shuffle", "copies", "replacement"])
def test_shares_are_those_of_the_weights(order: Order) -> None:
    mixture = (
        data.Part(7, 1.0),
        data.Part(40, 2.998),
        data.Part(13, 0.002),
    )  # the last is less than one a block
    drawn = Counter(
        0 if int(p.id) < 7 else 1 if int(p.id) < 47 else 2
        for p in data.batch(PROMPTS, 3, 0, 100_000, order, mixture)
    )
    slack = 600 if order == "replacement" else 3
    assert [drawn[k] for k in range(3)] == pytest.approx([25_000, 74_950, 50], abs=slack)
    assert abs(drawn[2] - 50) < 30


GOLDEN = {
    "shuffle": [32, 18, 13, 38, 0, 36, 4, 5, 2],
    "copies": [14, 20, 30, 9, 4, 0, 13, 7, 33],
    "replacement": [24, 15, 15, 34, 25, 36, 26, 20, 18],
}


@pytest.mark.parametrize(("order", "expected"), GOLDEN.items())
def test_one_source_is_drawn_as_before_there_were_several(order: Order, expected: list[int]) -> None:
    assert [int(p.id) for p in data.batch(PROMPTS[:40], 1, 4 * 9, 9, order)] == expected
