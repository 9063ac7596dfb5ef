"""Which files a path names, and what rows they hold; whatever cannot be read ends in one line."""

from __future__ import annotations

import gzip
import json
import os
import random
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evals import benchmarks
from jaxrl import data
from jaxrl.config import Data, Eval, Source
from jaxrl.errors import InputError
from jaxrl.types import Tokenizer

PLAIN = {"problem_column": "problem", "answer_column": "answer", "suffix": ""}


def folder(base: Path, *names: str) -> Path:
    """Files of one row each, whose answer is the file's name."""
    for name in names:
        file = base / name
        file.parent.mkdir(parents=True, exist_ok=True)
        row = {"problem": f"of {name}", "answer": name}
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist([row]), file)
        else:
            file.write_text(json.dumps(row) + "\n")
    return base


def names(base: Path, **choice: object) -> list[str]:
    return [str(file.relative_to(base)) for file in data.find_files(data.Choice(str(base), **choice))]


def refusal(base: Path, **choice: object) -> str:
    with pytest.raises(InputError) as caught:
        data.find_files(data.Choice(str(base), **choice))
    assert "\n" not in str(caught.value) and str(base) in str(caught.value)
    return str(caught.value)


def answers(path: Path) -> list[object]:
    return [row["answer"] for _, row in data.read_rows([path], ("problem", "answer"))]


def unreadable(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        list(data.read_rows([path], ("problem", "answer"), ("id",)))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


# --- splits


@pytest.mark.parametrize(
    ("there", "training", "evaluation"),
    [
        ("train.jsonl test.jsonl validation.jsonl", "train.jsonl", "test.jsonl"),
        ("train.jsonl dev.jsonl", "train.jsonl", "dev.jsonl"),
        ("train.jsonl", "train.jsonl", "train.jsonl"),
        ("training/0.jsonl eval/0.jsonl", "training/0.jsonl", "eval/0.jsonl"),
        ("data/train-0.parquet data/val-0.parquet", "data/train-0.parquet", "data/val-0.parquet"),
        ("gsm8k_train.jsonl gsm8k_test.jsonl", "gsm8k_train.jsonl", "gsm8k_test.jsonl"),
        ("math.jsonl math_test.jsonl", "math.jsonl", "math_test.jsonl"),
        ("constrained_test.jsonl train.jsonl", "train.jsonl", None),
        ("strained.jsonl latest.jsonl", None, None),  # words, not letters
        ("test.jsonl", "test.jsonl", "test.jsonl"),  # the only one is what is meant
        ("test.jsonl validation.jsonl", None, "test.jsonl"),
    ],
)
def test_training_and_evaluation_read_their_own_splits(
    tmp_path: Path, there: str, training: str | None, evaluation: str | None
) -> None:
    folder(tmp_path, *there.split())
    for evaluates, expected in ((False, training), (True, evaluation)):
        if expected:
            assert names(tmp_path, evaluation=evaluates) == [expected]
        else:
            assert "; set data." in refusal(tmp_path, evaluation=evaluates)


def test_a_folder_above_names_no_split(tmp_path: Path) -> None:
    assert names(folder(tmp_path / "train", "a_test.jsonl", "a.jsonl")) == ["a.jsonl"]


def test_a_data_set_of_other_splits_is_refused_with_their_names(tmp_path: Path) -> None:
    said = refusal(folder(tmp_path, "test.jsonl", "validation.jsonl"))
    assert said.endswith("has no training split; set data.split to one of: test, validation")


def test_a_split_is_chosen_by_name_or_by_meaning(tmp_path: Path) -> None:
    folder(tmp_path, "train.jsonl", "dev.jsonl")
    assert names(tmp_path, split="dev") == names(tmp_path, split="validation") == ["dev.jsonl"]
    assert "has no split 'dev_2' (data.split); there are: dev, train" in refusal(tmp_path, split="dev_2")


def test_a_numbered_file_names_its_split_whatever_that_is(tmp_path: Path) -> None:
    """As `datasets` has it; d1shs0ap/math has these splits."""
    there = [f"data/{name}-00000-of-00001.parquet" for name in ("easy", "hard", "medium", "test")]
    assert names(folder(tmp_path, *there), split="medium") == [there[2]]
    assert "set data.split to one of them" in (said := refusal(tmp_path)) and "easy, hard, medium" in said


def test_shards_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    there = [f"part-{n}.jsonl" for n in range(12)]
    assert names(folder(tmp_path / "a", *there)) == there
    hashed = [f"data/train-{n:05}-of-00003-{n + 15:016x}.parquet" for n in range(3)]
    assert names(folder(tmp_path / "c", *hashed)) == hashed
    assert names(folder(tmp_path / "d", "0.jsonl", "1.jsonl", "test/0.jsonl")) == ["0.jsonl", "1.jsonl"]
    assert names(folder(tmp_path / "e", "x/0000.parquet", "x/0001.parquet")) == [
        "x/0000.parquet",
        "x/0001.parquet",
    ]
    there = [f"data/train-{n:05}-of-00003.parquet" for n in range(3)]
    assert names(folder(tmp_path / "b", *there, "data/test-00000-of-00001.parquet")) == there


# --- configurations


@pytest.mark.parametrize(
    "there",
    [
        "main/train-0.parquet socratic/train-0.parquet",
        "gsm8k_train.jsonl math_train.jsonl",
        "aime_2024.jsonl aime_2025.jsonl",
        "aime.jsonl aime_2025.jsonl",
        "train_sft.jsonl train_gen.jsonl",
    ],
)
@pytest.mark.parametrize("evaluation", [False, True])
def test_several_configurations_are_a_choice_and_no_mixture(
    tmp_path: Path, there: str, evaluation: bool
) -> None:
    first, second = sorted(there.split())
    folder(tmp_path, first, second)
    said = refusal(tmp_path, evaluation=evaluation)
    listed = said.partition("has several configurations: ")[2].partition(";")[0].split(", ")
    assert [names(tmp_path, config=one, evaluation=evaluation) for one in listed] == [[first], [second]]
    assert names(tmp_path, files=(first,)) == [first]
    assert f"has no configuration 'x' (data.config); there are: {', '.join(listed)}" in refusal(
        tmp_path, config="x"
    )


CARD = """---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: a/one*
  - split: test
    path: [a/two.jsonl]
- config_name: socratic
  data_dir: b
  data_files: {train: "*.jsonl"}
---
# A data set
"""


def test_the_card_of_a_data_set_names_its_configurations(tmp_path: Path) -> None:
    folder(tmp_path, "a/one-1.jsonl", "a/one-2.jsonl", "a/two.jsonl", "b/x.jsonl", "c.jsonl")
    card = tmp_path / "README.md"
    card.write_text(CARD)
    assert "has several configurations: main, socratic; set data.config" in refusal(tmp_path)
    assert names(tmp_path, config="main") == ["a/one-1.jsonl", "a/one-2.jsonl"]
    assert names(tmp_path, config="main", evaluation=True) == ["a/two.jsonl"]
    assert (
        names(tmp_path, config="socratic")
        == names(tmp_path, config="socratic", evaluation=True)
        == ["b/x.jsonl"]
    )
    card.write_text(CARD.replace("- config_name: main", "- config_name: main\n  default: true"))
    assert names(tmp_path) == ["a/one-1.jsonl", "a/one-2.jsonl"]
    card.write_text(CARD.replace("split: test", "split: train_2"))
    assert names(tmp_path, config="main") == ["a/one-1.jsonl", "a/one-2.jsonl"]  # just "train" goes first
    card.write_text(
        CARD.replace("split: test", "split: train_2").replace("split: train\n", "split: train_1\n")
    )
    assert "has several such splits: train_1, train_2; set data.split" in refusal(tmp_path, config="main")
    assert names(tmp_path, config="main", split="train_2") == ["a/two.jsonl"]


@pytest.mark.parametrize("card", ["---\nconfigs: [\n---\n", "---\nconfigs:\n- data_files: none/*\n---\n"])
def test_a_card_that_cannot_be_followed_is_refused(tmp_path: Path, card: str) -> None:
    folder(tmp_path, "a.jsonl")
    (tmp_path / "README.md").write_text(card)
    assert "README.md" in refusal(tmp_path)


@pytest.mark.parametrize("card", ["", "# Rows\n", "---\nlicense: mit\n---\n", "---\nconfigs: yes\n---\n"])
def test_a_card_without_configurations_changes_nothing(tmp_path: Path, card: str) -> None:
    folder(tmp_path, "a.jsonl")
    (tmp_path / "README.md").write_text(card)
    assert names(tmp_path) == ["a.jsonl"]


def test_files_are_chosen_by_globs(tmp_path: Path) -> None:
    folder(tmp_path, "a/1.jsonl", "a/2.jsonl", "b/1.jsonl", "b/c/1.jsonl")
    (tmp_path / "notes.txt").write_text("")
    assert names(tmp_path, files=("a/",)) == ["a/1.jsonl", "a/2.jsonl"]
    assert names(tmp_path, files=("b/*", "a/2*")) == ["a/2.jsonl", "b/1.jsonl", "b/c/1.jsonl"]
    assert names(tmp_path, files=("**/1.jsonl",)) == ["a/1.jsonl", "b/1.jsonl", "b/c/1.jsonl"]
    assert "data.files: no file fits 'x*'; there are: a/1.jsonl" in refusal(tmp_path, files=("x*",))
    assert "'n*' takes in notes.txt" in refusal(tmp_path, files=("n*",))
    assert "leave config and split of [data] out" in refusal(tmp_path, files=("a/",), split="train")
    assert "where data.split chooses among several" in refusal(tmp_path / "a/1.jsonl", split="train")


def test_formats_are_not_mixed_and_json_beside_rows_is_none(tmp_path: Path) -> None:
    folder(tmp_path, "train.parquet", "dataset_info.json", "stats.json", ".hidden.jsonl")
    assert names(tmp_path) == ["train.parquet"]
    folder(tmp_path, "train.jsonl")
    assert "may hold the same rows; set data.files" in refusal(tmp_path)


# --- who chooses


def test_recipes_sources_evaluations_and_benchmarks_choose_for_themselves(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = str(folder(tmp_path, *(f"{c}/{s}.jsonl" for c in ("x", "y") for s in ("train", "test"))))

    def read(section: Data, held_out: Eval | None = None) -> list[str]:
        return [prompt.answer for prompt in data.load_prompts(section, tokenizer, held_out).prompts]

    assert read(Data(path=path, config="x", **PLAIN)) == ["x/train.jsonl"]
    assert read(Data(path=path, config="x", split="test", **PLAIN)) == ["x/test.jsonl"]
    assert read(Data(path=path, files=("x/*",), **PLAIN)) == ["x/test.jsonl", "x/train.jsonl"]
    section = Data(config="x", split="train", **PLAIN)  # chooses for data.path alone
    assert read(section, Eval(path=path, config="y")) == ["y/test.jsonl"]
    assert read(section, Eval(path=path, files=("y/train*",))) == ["y/train.jsonl"]
    sources = (Source(path, config="x"), Source(path, files=("y/test*",)), Source(f"{path}/y/train.jsonl"))
    mixed = Data(config="x", split="train", sources=sources, **PLAIN)
    assert read(mixed) == ["x/train.jsonl", "y/test.jsonl", "y/train.jsonl"]
    for field, section, held_out in (
        ("data.config", Data(path=path, **PLAIN), None),
        ("data.sources.1.config", Data(sources=(sources[0], Source(path)), **PLAIN), None),
        ("eval.config", Data(**PLAIN), Eval(path=path)),
    ):
        with pytest.raises(InputError, match=f"has several configurations: x, y; set {field} to one"):
            read(section, held_out)


def test_benchmarks_read_the_test_split_of_the_chosen_configuration(tmp_path: Path) -> None:
    local = tmp_path / "local"
    folder(local / "mine", "x/test.jsonl", "x/train.jsonl", "y/test.jsonl")
    (tmp_path / "b.toml").write_text(
        '[mine]\npath = "org/name"\nconfig = "x"\n[other]\npath = "org/name"\nfolder = "mine"\n'
    )
    chosen = benchmarks.select(str(tmp_path / "b.toml"))
    assert [p.answer for p in benchmarks.load("mine", chosen["mine"], local)] == ["x/test.jsonl"]
    with pytest.raises(InputError, match=r"has several configurations: x, y; set other\.config to one"):
        benchmarks.load("other", chosen["other"], local)
    folder(local, "mine.ndjson")
    (local / "mine").rename(local / "elsewhere")
    assert [p.answer for p in benchmarks.load("mine", chosen["mine"], local)] == ["mine.ndjson"]


def test_the_files_that_are_read_are_printed_and_many_are_shortened(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    folder(tmp_path, *(f"train-{n}.jsonl" for n in range(12)), "test.jsonl")
    summary = data.load_prompts(Data(path=str(tmp_path), **PLAIN), tokenizer).summary()
    shown = ", ".join(f"train-{n}.jsonl" for n in range(10))
    assert f"\nfiles read (12) of {tmp_path}: {shown} and 2 more" in summary


# --- what files hold


ROWS = [{"problem": "é", "answer": n} for n in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", LINES),
        ("a.NDJSON", LINES),
        ("a.jsonl", "\ufeff" + LINES),
        ("a.jsonl", LINES.replace("\n", "\r\n")),
        ("a.json", json.dumps(ROWS)),
        ("a.json", "\ufeff" + json.dumps(ROWS, indent=2)),
        ("a.json", json.dumps({"version": "1", "data": ROWS})),
        ("a.json", LINES),
    ],
)
def test_rows_of_every_format(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert answers(tmp_path / name) == [0, 1, 2]
    with gzip.open(tmp_path / f"{name}.gz", "wt") as file:
        file.write(text)
    assert answers(tmp_path / f"{name}.gz") == [0, 1, 2]
    assert data.find_files(data.Choice(f"{tmp_path}/{name}.gz")) == [tmp_path / f"{name}.gz"]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([5.0, 0.5, 1e16], pa.float64()), ["5", "0.5", "10000000000000000"]),
        (pa.array([5.0, 0.1, 1e10], pa.float32()), ["5", "0.1", "10000000000"]),
        (pa.array([Decimal("5.00"), Decimal("0.50"), Decimal("100")]), ["5", "0.5", "100"]),
        (pa.array([5, -7, 0], pa.int8()), ["5", "-7", "0"]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
    ],
)
def test_numbers_of_parquet_are_answers(
    tmp_path: Path, tokenizer: Tokenizer, column: pa.Array, expected: list[str]
) -> None:
    pq.write_table(pa.table({"problem": ["p", "q", "r"], "answer": column}), tmp_path / "a.parquet")
    found = data.load_prompts(Data(path=str(tmp_path / "a.parquet"), **PLAIN), tokenizer)
    assert [prompt.answer for prompt in found.prompts] == expected


GOOD = b'{"problem": "p", "answer": "1"}\n'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (rb'{"problem": "a\ud835 b", "answer": "1"}', ":2: has \\ud835, half of a character"),
        (rb'{"problem": [{"content": "\uDC00"}], "answer": "1"}', ":2: has \\udc00, half of a character"),
        (b"[" * 100_000, ":2: nested too deeply"),
        (b'{"a":' * 950 + b"1" + b"}" * 950, ":2: "),
        (b'{"problem": "p", "answer": ' + b"1" * 5000 + b"}", ":2: not JSON"),
        (b'{"problem": "\x00", "answer": "1"}', ":2: not JSON"),
        (
            b'{"problem": "\xff", "answer": "1"}',
            ":2: not JSON ('utf-8' codec can't decode byte 0xff in position 13",
        ),
        (b'"text"', ":2: a str, not an object"),
        (b'{"problem": "p"}', ":2: no column 'answer'"),
    ],
)
def test_lines_that_cannot_be_read_are_named(tmp_path: Path, line: bytes, said: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD + line + b"\n")
    assert f"a.jsonl{said}" in unreadable(tmp_path / "a.jsonl")


def test_whole_characters_and_halves_in_other_columns_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        rb'{"problem": "\ud835\udc00", "answer": "\ud83d\ude00", "x": "\ud835"}'
    )
    assert answers(tmp_path / "a.jsonl") == ["😀"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_other_encodings_are_refused(tmp_path: Path, encoding: str, name: str) -> None:
    (tmp_path / name).write_bytes(GOOD.decode().encode(encoding))
    assert "write one object a line, in UTF-8" in unreadable(tmp_path / name)


@pytest.mark.parametrize("text", ["3", "{}", '{"train": [], "test": []}', "[[1]]", '["a"]', "{"])
def test_json_that_is_no_list_of_objects_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    unreadable(tmp_path / "a.json")


def test_damaged_gzip_files_are_refused(tmp_path: Path) -> None:
    path, whole = tmp_path / "a.jsonl.gz", gzip.compress(GOOD * 1000, mtime=0)
    for damaged in (whole[: len(whole) // 2], whole[:5], GOOD, whole[:-8] + bytes(8), whole + b"x"):
        path.write_bytes(damaged)
        assert "cannot be read" in unreadable(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet"])
def test_files_without_rows_are_refused(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"a\.\S+: (no rows in it|not a parquet file)"):
        data.load_prompts(Data(path=str(tmp_path / name), **PLAIN), tokenizer)


@pytest.mark.parametrize("name", ["pipe", "pipe.jsonl", "pipe.parquet", "pipe.json.gz"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    refusal(tmp_path / name)
    if name != "pipe":
        assert f"{name}: not a regular file" in refusal(tmp_path)


def test_paths_that_name_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no such file" in refusal(tmp_path / "none.jsonl")
    assert "no .parquet or .jsonl file" in refusal(tmp_path / "empty")
    for path in ("", "a\0b", "/" + "x" * 5000 + ".jsonl"):
        with pytest.raises(InputError) as caught:
            data.find_files(data.Choice(path))
        assert "\n" not in str(caught.value)


# --- damaged parquet


def test_damaged_parquet_reads_right_or_ends_in_one_line(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"problem": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(40)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, write_page_checksum=True)
    whole, rng, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 2, 8])):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged if rng.random() < 0.9 else damaged[: rng.randrange(len(damaged))])
        try:
            found = data.load_prompts(Data(path=str(path), **PLAIN), tokenizer).prompts
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            read = [{"problem": tokenizer.decode(p.tokens[2:-1]), "answer": p.answer} for p in found]
            assert read == rows
    assert refused > 150


def test_text_that_is_no_text_is_refused_behind_the_last_good_row(tmp_path: Path) -> None:
    offsets, text = pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"a\xff")
    problem = pa.Array.from_buffers(pa.string(), 2, [None, offsets, text])
    pq.write_table(pa.table({"problem": problem, "answer": ["1", "2"]}), tmp_path / "a.parquet")
    assert "not a parquet file, or damaged ('utf-8' codec" in unreadable(tmp_path / "a.parquet")


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["p"])] * 3, names=["problem", "answer", "answer"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert "answer" in unreadable(tmp_path / "a.parquet")
