"""The recipes of the systems read data sets as they are published: file names, columns and types of the real ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrl import config, data
from jaxrl.errors import InputError
from jaxrl.types import JsonObject, Tokenizer
from tiny import jsonl

R1 = "<think>\nSix. No, seven.\n</think>\nFirst 3 + 4 is counted out: 4, 5, 6, 7. So it is $\\boxed{7}$."
LONG = "Ann has apples. " * 20  # characters: more than the mean of DeepScaleR's problems
# indices of the rows of agentica-org/DeepScaleR-Preview-Dataset whose answer is empty, of 40,315
EMPTY = (6328, 6336, 6408, 6415, 38209, 38211)


def deepscaler(rows: int) -> list[JsonObject]:
    found = [
        {
            "problem": f"What is {n} + 1?" if n % 3 else f"{LONG}And {n}?",
            "answer": str(n + 1),
            "solution": "Add.",
        }
        for n in range(rows)
    ]
    return [row | {"answer": ""} if n in EMPTY else row for n, row in enumerate(found)]


def verl(rows: Sequence[JsonObject]) -> list[JsonObject]:
    return [
        {
            "data_source": "",
            "prompt": [{"role": "user", "content": row["problem"]}],
            "ability": "math",
            "reward_model": {"ground_truth": row["answer"], "style": "rule"},
            "extra_info": {"index": n, "split": "train"},
        }
        for n, row in enumerate(rows)
    ]


# by recipe: files by name, as the Hub has them, with rows
TWO = [{"problem": "What is 3 + 4?", "answer": "7"}, {"problem": "What is 1 + 1?", "answer": "2"}]
LAYOUTS: dict[str, dict[str, list[JsonObject]]] = {
    "still-3-1.5b": {
        "data/train-00000-of-00001.parquet": [
            {"messages": [{"role": "user", "content": q}], "question": q, "answer": row["answer"]}
            for row in TWO
            for q in [row["problem"]]
        ]
    },
    "e3-1.7b": {
        f"data/{split}-00000-of-00001.parquet": [
            {"problem": f"{split}: {row['problem']}", "answer": row["answer"], "difficulty": 0.5} for row in TWO
        ]
        for split in ("train", "test", "easy", "medium", "hard")
    },
    "polaris-1.7b": {
        "polaris-data-53K-indexed.jsonl": [row | {"difficulty": "3/8", "index": 0} for row in TWO]
    },
    "questa-nemotron-1.5b": {
        "data/train-00000-of-00001.parquet": [
            {"problem": "What is 3 + 4?", "answer": "7", "solution": "7.", "generation": R1, "uuid": "a"},
            {"problem": "What is 1 + 1?", "answer": "2", "solution": "2.", "generation": R1, "uuid": "b"},
        ]
    },
}  # fmt: skip


def write(folder: Path, files: dict[str, list[JsonObject]]) -> str:
    for name, rows in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(rows), folder / name)
        elif name.endswith(".json"):
            (folder / name).write_text(json.dumps(rows))
        else:
            jsonl(folder / name, rows)
    return str(folder)


def sections(name: str, path: str) -> list[config.Data]:
    """[data] of every stage of a recipe, of another path."""
    stages = config.stages_of(config.load(name))
    return [dataclasses.replace(s.recipe.data, path=path, drop_solved=1.0) for s in stages]


def texts(section: config.Data, tokenizer: Tokenizer) -> list[str]:
    found = data.load_prompts(section, tokenizer)
    return ["".join(tokenizer.convert_ids_to_tokens(list(p.tokens))) for p in found.prompts]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", LAYOUTS)
def test_its_published_columns_are_read(name: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path, LAYOUTS[name])
    shown = [texts(section, tokenizer) for section in sections(name, path)]
    user, assistant = "<bos><user>", "<assistant>"
    if name == "e3-1.7b":
        assert [{text.removeprefix(user).partition(":")[0] for text in stage} for stage in shown] == [
            {"easy"},
            {"medium"},
        ]
    elif name == "questa-nemotron-1.5b":  # the second row's answer is not in its solution
        solution = R1.rpartition("</think>")[2]
        for (text,), share in zip(shown, (0.5, 0.25), strict=True):
            hint = solution[: int(len(solution) * share)]
            assert text == f"{user}What is 3 + 4?\n\n## Hint.{hint}{assistant}"
    else:
        suffix = sections(name, path)[0].suffix
        assert shown == [[f"{user}{row['problem']}{suffix}{assistant}" for row in TWO]] * len(shown)


@pytest.mark.parametrize(
    "name", ["deepscaler-1.5b", "fastcurl-1.5b-v3", "prorl-1.5b-v1", "prorl-1.5b-v2", "brorl-1.5b"]
)
def test_deepscalers_file_loads_in_spite_of_six_empty_answers(
    name: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    kept = [row for n, row in enumerate(deepscaler(40_315)) if n in EMPTY or n % 50 == 0]
    path = write(tmp_path, {"deepscaler.json": kept})
    for section in sections(name, path):
        found = data.load_prompts(section, tokenizer)
        assert "6 unanswered" in found.summary()
        low, high = section.min_characters, section.max_characters or 10**6
        expected = [row for row in kept if row["answer"] and low <= len(row["problem"]) <= high]
        assert sorted(p.answer for p in found.prompts) == sorted(row["answer"] for row in expected)
        assert len({p.id for p in found.prompts}) == len(expected) > 100
    with pytest.raises(InputError, match=r"'answer' is empty.*data\.skip_unanswered") as caught:
        data.load_prompts(dataclasses.replace(section, skip_unanswered=False), tokenizer)
    assert "\n" not in str(caught.value)


def test_fastcurls_two_files_are_the_two_sides_of_the_bound(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Its copies are in verl's layout, with the instruction in the problem."""
    suffix = sections("fastcurl-1.5b-v3", "")[0].suffix
    rows = [row for row in deepscaler(600) if row["answer"]]
    parts = [[row for row in rows if (len(row["problem"]) <= 247) == short] for short in (True, False)]
    files = {
        f"train_{name}.parquet": verl([row | {"problem": row["problem"] + suffix} for row in part])
        for name, part in zip(("L1", "L3"), parts, strict=True)
    }
    bare = write(tmp_path / "hub", {"deepscaler.json": rows})
    first, _, third, *_ = sections("fastcurl-1.5b-v3", bare)
    for section, name in ((first, "train_L1.parquet"), (third, "train_L3.parquet")):
        path = write(tmp_path / name, {name: files[name]})
        theirs = config.Data(
            path=f"{path}/{name}", suffix="", strip_dapo_wrapper=False, deduplicate=False,
            problem_column="prompt", answer_column="reward_model.ground_truth",
        )  # fmt: skip
        assert texts(section, tokenizer) == texts(theirs, tokenizer)
