"""From files to prompts and batches; what cannot be used is named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl import data
from jaxrl.config import Data, Eval
from jaxrl.errors import InputError
from jaxrl.types import JsonObject, Order, Prompt, Tokenizer
from tiny import jsonl, tiny_tokenizer

PLAIN = {"problem_column": "problem", "answer_column": "answer", "suffix": ""}
ROWS = [{"problem": f"{n} + {n}", "answer": str(2 * n)} for n in range(5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return data.load_tokenizer(str(folder))


def parquet(path: Path, rows: list[JsonObject]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def dapo_row(problem: str, answer: str, index: str = "a", wrap: bool = True) -> JsonObject:
    text = data.DAPO_PREFIX + problem + data.DAPO_SUFFIX if wrap else problem
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": text, "role": "user"}],
        "reward_model": {"ground_truth": answer, "style": "rule"},
        "extra_info": {"index": index},
    }


def answers(found: data.PromptSet) -> list[str]:
    return [prompt.answer for prompt in found.prompts]


# --- from rows to prompts


def test_rows_of_a_jsonl_file_become_prompts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    found = data.load_prompts(Data(path=jsonl(tmp_path / "a.jsonl", ROWS), **PLAIN), tokenizer)
    assert answers(found) == ["0", "2", "4", "6", "8"]
    assert [prompt.id for prompt in found.prompts] == ["1", "2", "3", "4", "5"]
    assert (found.rows, found.duplicates, found.overlong) == (5, 0, 0)
    counts = "5 prompts from 5 rows (0 duplicates, 0 over-long left out)"
    assert found.summary() == f"{tmp_path}/a.jsonl: {counts}"
    tokens = found.prompts[3].tokens
    assert tokens.dtype == np.int32
    assert tokenizer.decode(tokens) == "<bos><user>3 + 3<assistant>"


def test_the_template_s_bos_is_the_only_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = jsonl(tmp_path / "a.jsonl", ROWS[:1])
    for chat_template, text in ((True, "<bos><user>0 + 0<assistant>"), (False, "<bos>0 + 0")):
        found = data.load_prompts(Data(path=path, chat_template=chat_template, **PLAIN), tokenizer)
        assert tokenizer.decode(found.prompts[0].tokens) == text


def test_the_generation_prompt_is_asked_for(tmp_path: Path) -> None:
    template = "<bos><user>{{ messages[0]['content'] }}{% if add_generation_prompt %}<assistant>?{% endif %}"
    tokenizer = tiny_tokenizer(tmp_path, template)
    found = data.load_prompts(Data(path=jsonl(tmp_path / "a.jsonl", ROWS[:1]), **PLAIN), tokenizer)
    assert tokenizer.decode(found.prompts[0].tokens) == "<bos><user>0 + 0<assistant>?"


def test_prefix_and_suffix_are_put_around_the_problem(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = jsonl(tmp_path / "a.jsonl", ROWS[:1])
    section = Data(path=path, **PLAIN | {"prefix": "1 + 1<assistant>2<user>", "suffix": "\n\nBox it."})
    text = tokenizer.decode(data.load_prompts(section, tokenizer).prompts[0].tokens)
    assert text == "<bos><user>1 + 1<assistant>2<user>0 + 0\n\nBox it.<assistant>"
    assert text.count("<assistant>") == 2
    ids = data.load_prompts(section, tokenizer).prompts[0].tokens.tolist()
    ((assistant,),) = tokenizer(["<assistant>"], add_special_tokens=False)["input_ids"]
    assert ids.count(assistant) == 2  # turns in a prefix are real turns


def test_parquet_with_structs_in_the_default_recipe(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [dapo_row("What is $1$?", "1", "u7"), dapo_row("What is $2$?", "2", "u8", wrap=False)]
    found = data.load_prompts(Data(path=parquet(tmp_path / "a.parquet", rows)), tokenizer)
    assert [prompt.id for prompt in found.prompts] == ["u7", "u8"]
    assert answers(found) == ["1", "2"]
    assert [tokenizer.decode(prompt.tokens) for prompt in found.prompts] == [
        f"<bos><user>What is ${n}$?\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
        "<assistant>"
        for n in (1, 2)
    ]


def test_jsonl_and_parquet_read_alike(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [dapo_row(f"What is {n}?", str(n), f"u{n}") for n in range(4)]
    one, other = (
        [(p.id, p.tokens.tolist(), p.answer) for p in data.load_prompts(Data(path=path), tokenizer).prompts]
        for path in (jsonl(tmp_path / "a.jsonl", rows), parquet(tmp_path / "a.parquet", rows))
    )
    assert one == other


def test_only_needed_columns_are_taken(tmp_path: Path) -> None:
    path = parquet(tmp_path / "b.parquet", [row | {"unused": "x"} for row in ROWS])
    assert [set(row) for _, row in data.read_rows([Path(path)], ["problem"], ["id"])] == [{"problem"}] * 5


def test_the_wrapper_stays_where_the_recipe_says_so(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = parquet(tmp_path / "a.parquet", [dapo_row("What?", "1")])
    found = data.load_prompts(Data(path=path, strip_dapo_wrapper=False, suffix=""), tokenizer)
    text = data.DAPO_PREFIX + "What?" + data.DAPO_SUFFIX
    assert tokenizer.decode(found.prompts[0].tokens) == f"<bos><user>{text}<assistant>"


def test_the_wrapper_goes_only_from_the_ends(tmp_path: Path, tokenizer: Tokenizer) -> None:
    quoted = "Say" + data.DAPO_SUFFIX + " Why?"
    path = jsonl(tmp_path / "a.jsonl", [{"problem": quoted, "answer": "1"}])
    found = data.load_prompts(Data(path=path, **PLAIN), tokenizer)
    assert tokenizer.decode(found.prompts[0].tokens) == f"<bos><user>{quoted}<assistant>"


def test_a_hundred_copies_are_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [dapo_row(f"What is {n}?", str(n)) for n in range(7)] * 100
    found = data.load_prompts(Data(path=parquet(tmp_path / "a.parquet", rows)), tokenizer)
    assert answers(found) == [str(n) for n in range(7)]
    assert (found.rows, found.duplicates, found.overlong) == (700, 693, 0)
    every = data.load_prompts(Data(path=str(tmp_path / "a.parquet"), deduplicate=False), tokenizer)
    assert (len(every.prompts), every.duplicates) == (700, 0)


def test_duplicates_are_found_under_their_wrappers_and_the_first_wins(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    rows = [dapo_row("What?", "1"), dapo_row("What?", "2", wrap=False), dapo_row("What? ", "3")]
    found = data.load_prompts(Data(path=jsonl(tmp_path / "a.jsonl", rows)), tokenizer)
    assert answers(found) == ["1", "3"]  # the text is compared exactly


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        (34, "34"),
        (-3, "-3"),
        (0, "0"),
        (" 34 ", "34"),
        ("34.0", "34.0"),
        (r"\boxed{204}", "204"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} or \boxed{2}", r"\boxed{1} or \boxed{2}"),
        (r"\boxed{1}.", r"\boxed{1}."),
        (r"x = \boxed{1}", r"x = \boxed{1}"),
        (r" $\frac{1}{2}$ ", r"\frac{1}{2}"),
        (r"\boxed{ $5$ }", "5"),
        ("$1$ or $2$", "$1$ or $2$"),
        (204.0, "204"),
        (0.1, "0.1"),
        (1e16, "10000000000000000"),
        (1e-7, "0.0000001"),
        (-0.0, "0"),
    ],
)
def test_answers_are_kept_but_for_what_is_around_the_whole(
    tmp_path: Path, tokenizer: Tokenizer, value: float | str, answer: str
) -> None:
    rows = [{"problem": "p", "answer": value}]
    for path in (jsonl(tmp_path / "a.jsonl", rows), parquet(tmp_path / "a.parquet", rows)):
        assert answers(data.load_prompts(Data(path=path, **PLAIN), tokenizer)) == [answer]


def test_overlong_prompts_are_dropped_and_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"problem": "x" * n, "answer": "1"} for n in (7, 8, 9)]
    section = Data(path=jsonl(tmp_path / "a.jsonl", rows), max_prompt_tokens=8 + 3, **PLAIN)
    found = data.load_prompts(section, tokenizer)
    assert [len(prompt.tokens) for prompt in found.prompts] == [10, 11]  # with <bos>, <user> and <assistant>
    assert found.overlong == 1


NAMED = [({"id": "m/1"}, "m/1"), ({"index": 12}, "12"), ({"id": None}, "1")]


@pytest.mark.parametrize(("row", "name"), NAMED)
def test_the_row_s_own_id_names_the_prompt(
    tmp_path: Path, tokenizer: Tokenizer, row: JsonObject, name: str
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"problem": "p", "answer": "1"} | row])
    assert data.load_prompts(Data(path=path, **PLAIN), tokenizer).prompts[0].id == name


def test_other_rows_and_a_limit_for_evaluation(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"problem": "x" * 50, "answer": "0"}, *ROWS])
    section = Data(path="nowhere.jsonl", max_prompt_tokens=20, **PLAIN)
    assert answers(data.load_prompts(section, tokenizer, Eval(path=path, problems=2))) == ["0", "2"]
    assert len(data.load_prompts(section, tokenizer, Eval(path=path, problems=99)).prompts) == 5


def test_more_rows_than_are_tokenized_at_once(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxrl.data.tokens.BATCH", 2)
    found = data.load_prompts(Data(path=jsonl(tmp_path / "a.jsonl", ROWS), **PLAIN), tokenizer)
    assert [tokenizer.decode(p.tokens[2:-1]) for p in found.prompts] == [row["problem"] for row in ROWS]


def test_blank_lines_are_no_rows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"problem": "p", "answer": "1"}\r\n\n')
    assert data.load_prompts(Data(path=str(tmp_path / "a.jsonl"), **PLAIN), tokenizer).rows == 1


def test_a_hub_data_set_gives_its_training_files(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    (tmp_path / "data").mkdir()
    parquet(tmp_path / "data/train-0.parquet", ROWS[:2])
    parquet(tmp_path / "data/train-1.parquet", ROWS[2:3])
    parquet(tmp_path / "data/test-0.parquet", ROWS[3:])
    asked: dict[str, object] = {}

    def download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = data.load_prompts(Data(path="org/name", **PLAIN), tokenizer)
    assert answers(found) == ["0", "2", "4"]
    assert [Path(file).name for file in found.files] == ["train-0.parquet", "train-1.parquet"]
    assert f"files read (2) of {tmp_path}/data: train-0.parquet, train-1.parquet" in found.summary()
    assert (asked["name"], asked["repo_type"]) == ("org/name", "dataset")
    for file in (tmp_path / "data").glob("train*"):
        file.unlink()
    # the only split is what is meant
    assert answers(data.load_prompts(Data(path="org/name", **PLAIN), tokenizer)) == ["6", "8"]
    (tmp_path / "data/test-0.parquet").unlink()
    with pytest.raises(InputError, match=r"org/name: the data set has no \.parquet or \.jsonl file"):
        data.load_prompts(Data(path="org/name", **PLAIN), tokenizer)


# --- what cannot be used


def refusal(path: str, tokenizer: Tokenizer, **changes: object) -> str:
    with pytest.raises(InputError) as caught:
        data.load_prompts(Data(path=path, **PLAIN | changes), tokenizer)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_files_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    none = f"{tmp_path}/none.jsonl"
    assert f"{none}: no such file; data.path takes" in refusal(none, tokenizer)
    assert "neither a .jsonl nor a .parquet file nor a Hub id" in refusal("rows.csv", tokenizer)
    assert "no/such-data: no such file, and the Hub did not have it" in refusal("no/such-data", tokenizer)


def test_files_that_are_not_what_they_are_called_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.parquet").write_text("text")
    assert "a.parquet: not a parquet file" in refusal(str(tmp_path / "a.parquet"), tokenizer)
    (tmp_path / "a.jsonl").write_bytes(b'{"problem": "p", "answer": "1"}\n\xff\xfe\xfa\n')
    assert "a.jsonl:2: not JSON" in refusal(str(tmp_path / "a.jsonl"), tokenizer)


def test_empty_files_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert "a.jsonl: no rows in it" in refusal(jsonl(tmp_path / "a.jsonl", []), tokenizer)
    pq.write_table(pa.Table.from_pylist(ROWS)[:0], tmp_path / "a.parquet")
    assert "a.parquet: no rows in it" in refusal(str(tmp_path / "a.parquet"), tokenizer)


def test_invalid_lines_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.jsonl").write_text('{"problem": "p", "answer": "1"}\n{"problem": \n')
    assert "a.jsonl:2: not JSON" in refusal(str(tmp_path / "a.jsonl"), tokenizer)
    assert "a.jsonl:1: a list, not an object" in refusal(jsonl(tmp_path / "a.jsonl", [[1]]), tokenizer)


def test_missing_columns_list_those_there_are(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"question": "p", "truth": {"value": "1", "kind": "int"}}]
    for path in (jsonl(tmp_path / "a.jsonl", rows), parquet(tmp_path / "a.parquet", rows)):
        there = "there are: question, truth.value, truth.kind"
        assert f"no column 'problem'; {there}" in refusal(path, tokenizer)
        said = refusal(path, tokenizer, problem_column="question", answer_column="truth")
        assert f"no column 'truth'; {there}" in said
    said = refusal(jsonl(tmp_path / "a.jsonl", [*ROWS, {"problem": "p"}]), tokenizer)
    assert "a.jsonl:6: no column 'answer'; there are: problem. Set data.problem_column" in said


@pytest.mark.parametrize("answer", [None, "", "  ", r"\boxed{}"])
def test_a_row_without_an_answer_is_named(tmp_path: Path, tokenizer: Tokenizer, answer: object) -> None:
    rows = [*ROWS, {"problem": "p", "answer": answer}]
    assert "a.jsonl:6: 'answer' is empty" in refusal(jsonl(tmp_path / "a.jsonl", rows), tokenizer)
    assert "a.parquet, row 6: 'answer' is empty" in refusal(parquet(tmp_path / "a.parquet", rows), tokenizer)


@pytest.mark.parametrize("answer", [True, ["5"], float("nan"), float("inf"), "nan", " -Inf "])
def test_answers_that_no_response_could_equal_are_named(
    tmp_path: Path, tokenizer: Tokenizer, answer: object
) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"problem": "p", "answer": answer}])
    assert "a.jsonl:1: 'answer' is " in refusal(path, tokenizer)


@pytest.mark.parametrize("problem", [None, "", " ", 3, []])
def test_a_row_without_a_problem_is_named(tmp_path: Path, tokenizer: Tokenizer, problem: object) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"problem": problem, "answer": "1"}])
    assert "a.jsonl:1: 'problem' holds neither text nor chat messages" in refusal(path, tokenizer)


@pytest.mark.parametrize("messages", [[], None, [{"content": None, "role": "user"}]])
def test_a_chat_without_a_message_is_named(tmp_path: Path, tokenizer: Tokenizer, messages: object) -> None:
    rows = [dapo_row("p", "1"), dapo_row("q", "1") | {"prompt": messages}]
    path = parquet(tmp_path / "a.parquet", rows)
    said = refusal(path, tokenizer, problem_column="prompt", answer_column="reward_model.ground_truth")
    assert "a.parquet, row 2: 'prompt' holds neither" in said


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path, None)
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    assert "no chat template; add one" in refusal(path, tokenizer)
    assert "data.chat_template = false" in refusal(path, tokenizer)
    assert len(data.load_prompts(Data(path=path, chat_template=False, **PLAIN), tokenizer).prompts) == 5


def test_a_file_of_overlong_prompts_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    said = refusal(jsonl(tmp_path / "a.jsonl", ROWS), tokenizer, max_prompt_tokens=4)
    assert "all 5 prompts are longer than data.max_prompt_tokens = 4; raise it" in said


def test_folders_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):  # more and more, never enough
        (tmp_path / name).write_text('{"model_type": "llama"}')
        with pytest.raises(InputError, match="tokenizer") as caught:
            data.load_tokenizer(str(tmp_path))
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_tokenizer_comes_back_whole(tmp_path: Path) -> None:
    ours = tiny_tokenizer(tmp_path)
    theirs = data.load_tokenizer(str(tmp_path))
    assert theirs("a+b\n\\boxed{1}<eos>")["input_ids"] == ours("a+b\n\\boxed{1}<eos>")["input_ids"]
    assert (theirs.eos_token, theirs.pad_token) == ("<eos>", "<pad>")
    assert theirs.decode(theirs("a + b\n1<eos>")["input_ids"], skip_special_tokens=True) == "a + b\n1"


def test_addition_problems_are_right_apart_and_the_same_again(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "recipes/addition.py"
    for out in ("a", "b"):
        sizes = ("--digits", "1", "--train", "70", "--heldout", "30")
        subprocess.run([sys.executable, script, tmp_path / out, *sizes], check=True)
    rows = {}
    for name, count in (("train", 70), ("heldout", 30)):
        file = tmp_path / "a" / f"{name}.jsonl"
        assert file.read_bytes() == (tmp_path / "b" / f"{name}.jsonl").read_bytes()
        rows[name] = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(rows[name]) == count
    every = [row["problem"] for row in rows["train"] + rows["heldout"]]
    assert len(set(every)) == 100  # all the sums of two digits, each in one of the files
    for row in rows["train"] + rows["heldout"]:
        assert sum(map(int, row["problem"].split(" + "))) == int(row["answer"])


# --- batch

PROMPTS = [Prompt(str(n), np.array([n], np.int32), "") for n in range(40)]


def ids(prompts: list[Prompt]) -> list[str]:
    return [prompt.id for prompt in prompts]


@given(n=st.integers(1, 40), size=st.integers(1, 100), seed=st.integers(0, 2**32))
def test_every_epoch_visits_every_prompt_once(n: int, size: int, seed: int) -> None:
    steps = -(-3 * n // size)
    stream = [
        i for step in range(steps) for i in ids(data.batch(PROMPTS[:n], seed, step * size, size, "shuffle"))
    ]
    assert len(stream) == steps * size
    for epoch in range(3):
        assert Counter(stream[epoch * n : (epoch + 1) * n]) == Counter(ids(PROMPTS[:n]))


@given(
    size=st.integers(1, 100),
    seed=st.integers(0, 2**32),
    step=st.integers(0, 10_000),
    order=st.sampled_from(["shuffle", "copies", "replacement"]),
)
def test_a_batch_depends_on_its_arguments_alone(size: int, seed: int, step: int, order: Order) -> None:
    first = ids(data.batch(PROMPTS, seed, step * size, size, order))
    np.random.seed(0)
    data.batch(PROMPTS, seed + 1, step * size, size, order)
    assert ids(data.batch(PROMPTS, seed, step * size, size, order)) == first
    assert len(first) == size


@pytest.mark.parametrize("order", ["shuffle", "copies", "replacement"])
def test_steps_epochs_and_seeds_differ(order: Order) -> None:
    batches = [ids(data.batch(PROMPTS, 1, step * len(PROMPTS), len(PROMPTS), order)) for step in range(20)]
    assert len({tuple(chosen) for chosen in batches}) == 20
    assert ids(data.batch(PROMPTS, 2, 0, len(PROMPTS), order)) != batches[0]


def test_an_epoch_of_copies_has_every_prompt_a_hundred_times() -> None:
    drawn = [i for step in range(100) for i in ids(data.batch(PROMPTS, 1, step * 40, 40, "copies"))]
    assert set(Counter(drawn).values()) == {100}
    repeats = [40 - len(set(drawn[first : first + 40])) for first in range(0, 4000, 40)]
    assert np.mean(repeats) == pytest.approx(40 * (1 - 1 / 40) ** 40, abs=1)  # as of independent draws


def test_replacement_draws_evenly_and_with_repeats() -> None:
    drawn = Counter(
        i for step in range(100) for i in ids(data.batch(PROMPTS, 1, step * 40, 40, "replacement"))
    )
    assert len(drawn) == 40
    assert 60 < min(drawn.values()) < max(drawn.values()) < 145  # 100 +- 10
    assert any(len(set(ids(data.batch(PROMPTS, 1, step * 40, 40, "replacement")))) < 40 for step in range(3))
