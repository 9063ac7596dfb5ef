from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evals import benchmarks
from evals.benchmarks import Benchmark, Problem
from jaxrl.errors import InputError
from jaxrl.types import JsonObject

# the two layouts of JustRL's files
CHATS = [
    {
        "prompt": [{"content": f"{i} + {i}?", "role": "user"}],
        "data_source": "X",
        "reward_model": {"ground_truth": truth, "style": "rule"},
        "extra_info": {"index": f"X-{i}", "split": "test"},
    }
    for i, truth in enumerate([r"\boxed{204}", r"\frac{1}{2}", " 7 "])
]
PLAIN = [
    {"problem_idx": i, "problem": f"{i} + {i}?", "answer": truth, "problem_type": ["Algebra"]}
    for i, truth in enumerate(["204", r"\frac{1}{2}", "7"])
]
PROBLEMS = [Problem("0 + 0?", "204"), Problem("1 + 1?", r"\frac{1}{2}"), Problem("2 + 2?", "7")]


def write(path: Path, rows: list[JsonObject]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_nine_of_the_paper() -> None:
    nine = benchmarks.select("all")
    assert len(nine) == 9
    assert sum(b.problems for b in nine.values()) == 1646
    assert sum(b.problems * b.samples for b in nine.values()) == 12184
    assert list(benchmarks.select("math500,aime24")) == ["math500", "aime24"]


@pytest.mark.parametrize("rows", [CHATS, PLAIN])
@pytest.mark.parametrize("file", ["X/test.parquet", "X/test.jsonl", "X.parquet", "X.jsonl"])
def test_released_files(tmp_path: Path, rows: list[JsonObject], file: str) -> None:
    write(tmp_path / file, rows)
    assert benchmarks.load("x", Benchmark("some/where", folder="X", problems=3), tmp_path) == PROBLEMS


def test_layouts_of_the_hub(tmp_path: Path) -> None:
    for rows in (
        [{"question": p.question, "answer": p.answer} for p in PROBLEMS],
        [{"question": p.question, "final_answer": [p.answer]} for p in PROBLEMS],
    ):
        for kind in ("jsonl", "parquet"):
            path = write(tmp_path / f"x.{kind}", rows)
            assert benchmarks.load("x", Benchmark(str(path))) == PROBLEMS
    path = write(tmp_path / "x.jsonl", [{"question": "?", "final_answer": ["1", "2"]}])
    assert benchmarks.load("x", Benchmark(str(path))) == [Problem("?", "1, 2")]


def test_one_of_ones_own(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", [{"frage": "1 + 1?", "antwort": 2}])
    toml = tmp_path / "mine.toml"
    toml.write_text(
        f'[mine]\npath = "{path}"\nsamples = 3\nproblem_column = "frage"\nanswer_column = "antwort"\n'
    )
    chosen = benchmarks.select(f"aime25,{toml}")
    assert list(chosen) == ["aime25", "mine"] and chosen["mine"].samples == 3
    # --data replaces only what would come from the Hub
    assert benchmarks.load("mine", chosen["mine"], tmp_path / "elsewhere") == [Problem("1 + 1?", "2")]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (PLAIN[:2], "has 2 problems where x has 3"),
        ([{"task": "?", "answer": "1"}] * 3, "problem_column"),
        ([], "no rows"),
        ([*PLAIN[:2], PLAIN[2] | {"answer": " "}], "row 3: 'answer' is ' '"),
        ([*PLAIN[:2], PLAIN[2] | {"problem": None}], "row 3: 'problem' is None"),
        ([*PLAIN[:2], PLAIN[2] | {"answer": r"\boxed{1"}], "row 3: the box in 'answer'"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, rows: list[JsonObject], said: str) -> None:
    write(tmp_path / "X" / "test.parquet", rows)
    with pytest.raises(InputError) as error:
        benchmarks.load("x", Benchmark("some/where", folder="X", problems=3), tmp_path)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_set_under_another_name(tmp_path: Path) -> None:
    write(tmp_path / "Y" / "test.parquet", PLAIN)
    with pytest.raises(InputError, match=r"aime24: --data has neither .*/AIME24 nor .*/AIME24\.parquet"):
        benchmarks.load("aime24", benchmarks.select("aime24")["aime24"], tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[x]\nsamples = 3\n", "x.path: field required"),
        ('[x]\npath = "a/b"\nsample = 3\n', "x.sample: unexpected"),
        ('[x]\npath = "a/b"\nsamples = 0\n', "x.samples: input should be greater than 0"),
        ('["../x"]\npath = "a/b"\n', "names a file"),
        ('[x]\npath = "a/b"\nanswer_column = "a"\n', "give both"),
        ("[x", "not valid TOML"),
    ],
)
def test_descriptions_that_cannot_be_used(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(InputError) as error:
        benchmarks.select(str(tmp_path / "x.toml"))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_names_that_are_not_known(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no 'aime23'; take some of aime24, "):
        benchmarks.select("aime24,aime23")
    with pytest.raises(InputError, match="cannot be read"):
        benchmarks.select(str(tmp_path / "none.toml"))
