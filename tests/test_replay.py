"""Steps executed again, and what is found where somebody has changed what a run has kept."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import staged
import tiny_run
from jaxrl import config
from jaxrl.checkpoint import Checkpoints
from jaxrl.commands import replay as command
from jaxrl.errors import InputError
from jaxrl.exports import export
from jaxrl.loop import train
from jaxrl.replay import AUDIT
from jaxrl.run import load
from jaxrl.types import silent
from tiny import rollout_rows

STEP = 4  # 0 for the first: there is a checkpoint before it, and one after the next


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(config.load(tiny_run.write_recipe(folder, base)), say=silent, quiet=True)
    return folder / "run"


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(whole, tmp_path / "run")


def replayed(run: Path, *args: object) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(*parser.parse_known_args([str(run), *map(str, args)]))


def findings(run: Path, capsys: pytest.CaptureFixture[str], *args: object) -> list[str]:
    """What a replay finds that has to find something."""
    capsys.readouterr()
    with pytest.raises(InputError, match=r"are not what .* says; the first is step"):
        replayed(run, *args)
    return [line[4:] for line in capsys.readouterr().out.splitlines() if line.startswith("  ! ")]


def change(run: Path, place: int, **columns: Callable[[Any], Any]) -> dict[str, Any]:
    """Changes columns of a row of a step's answers, and writes the file as it should be; returns the row before."""
    path = run / "rollouts" / f"step_{STEP:06d}.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    before = dict(rows[place])
    rows[place] |= {name: new(before[name]) for name, new in columns.items()}
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
    return before


def test_a_step_gives_the_same_bits(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replayed(run, 5)
    said = capsys.readouterr().out
    assert "step 4:" not in said  # a checkpoint is before it
    assert "checkpoint 6: the same bits" in said
    assert not (run / AUDIT).exists()


def test_an_audit_is_recorded_and_can_be_repeated(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replayed(run, "--all")
    record = json.loads((run / AUDIT).read_text())
    assert [step["step"] for step in record["steps"]] == [1, 2, 3, 4, 5, 6]
    assert [step["checkpoint"] for step in record["steps"]] == [False] * 3 + [True, False, True]
    assert record["content"].keys() >= {"model.path", "data.path"}
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "lock"}
    replayed(run, "--all")
    assert before == {path: path.read_bytes() for path in before}
    # the same answers written anew are another file
    change(run, 0)
    assert findings(run, capsys, "--all") == [
        f"{run}/rollouts/step_000004.parquet is not the file of which {AUDIT} has the digest"
    ]
    record["steps"][0]["weights"] = "0" * 64
    (run / AUDIT).write_text(json.dumps(record))
    with pytest.raises(InputError, match=f"{AUDIT} is not as an audit has written it"):
        replayed(run, "--all")


@pytest.mark.slow
def test_a_run_of_stages_references_and_rescued_groups_gives_the_same_bits(
    base: Path, tmp_path: Path
) -> None:
    train(config.load(staged.write_recipe(tmp_path, base)), say=silent, quiet=True)
    replayed(tmp_path / "run", "--all")
    assert len(json.loads((tmp_path / "run" / AUDIT).read_text())["steps"]) == 9


def test_a_changed_token_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its text; and where that was changed too, by its probability."""
    place = next(k for k, row in enumerate(rollout_rows(run, STEP)) if row["completion"] == "\\boxed{1}<eos>")
    row = change(run, place, token_ids=lambda ids: [ids[0], 8, *ids[2:]])
    name = f"prompt {row['prompt_id']}, sample {row['sample']}"
    found = findings(run, capsys, 5)
    assert f"{name}: the text of the completion is not that of its tokens" in found
    assert any(line.startswith(f"{name}, token 1 (8): its log-prob is") for line in found)
    change(run, place, completion=lambda text: text.replace("1", "2"))
    found = findings(run, capsys, 5)
    assert not any("the text of" in line for line in found)
    assert any(line.startswith(f"{name}, token 1 (8): its log-prob is") for line in found)
    assert any(" does not follow from these answers: " in line for line in found)


@pytest.mark.parametrize("column", ["score", "reward"])
def test_a_changed_mark_is_named(run: Path, capsys: pytest.CaptureFixture[str], column: str) -> None:
    row = change(run, 9, **{column: lambda mark: -mark})
    name = f"prompt {row['prompt_id']}, sample {row['sample']}"
    wanted = f"{name}: its {column} is {-row[column]:g}, and the recipe gives {row[column]:g}"
    assert wanted in findings(run, capsys, 5)


def test_a_changed_log_prob_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Though this recipe's update does not use it."""
    row = change(run, 9, logprobs=lambda values: [values[0] - 0.5, *values[1:]])
    name = f"prompt {row['prompt_id']}, sample {row['sample']}"
    assert any(line.startswith(f"{name}, token 0 ") for line in findings(run, capsys, 5))


def test_a_changed_metric_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[STEP]["policy/entropy"] *= 0.99
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found,) = findings(run, capsys, 5)
    assert found.startswith("policy/entropy is ")


def test_changed_weights_are_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a checkpoint that is whole in itself: it was written with other weights."""
    recipe = config.load(run / "recipe.toml")
    setup = load(recipe, None, silent)
    like = setup.programs(setup.stage_at(0)).abstract_state()
    checkpoints = Checkpoints(run / "checkpoints")
    found = checkpoints.at(6, recipe, like, setup.content(6))
    params = dict(found.state.params)
    params["norm"] = jax.block_until_ready(params["norm"] * 1.001)
    shutil.rmtree(run / "checkpoints" / "6")
    checkpoints = Checkpoints(run / "checkpoints")
    checkpoints.save(6, found.state.replace(params=params), recipe, setup.content(6))
    checkpoints.close()
    (line,) = findings(run, capsys, 6)
    assert line.startswith(f"{run}/checkpoints/6 does not follow from these answers: 1 of ")
    assert "the first is params.norm, and parameters by up to 0.00" in line


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_published_folder_has_the_weights_or_is_named(
    run: Path, dtype: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "hf"
    export(run, folder, dtype, silent)
    replayed(run, 6, "--published", folder)
    assert f"{folder} has the weights after step 6" in capsys.readouterr().out
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # of an exponent
    file.write_bytes(content)
    (line,) = findings(run, capsys, 6, "--published", folder)
    assert line.startswith(f"{folder} has not the weights after step 6: 1 tensors, first ")


def test_on_another_mesh_it_is_the_same_within_rounding(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert jax.device_count() == 8
    other = ("--mesh.data", 2, "--mesh.fsdp", 4)
    assert any("does not follow" in line for line in findings(run, capsys, 5, *other))
    replayed(run, 5, "--within", 1e-5, *other)
    assert "checkpoint 6: parameters differ by up to" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"run\.seed"):
        replayed(run, 5, "--run.seed", 2)


def test_what_is_missing_is_named(run: Path) -> None:
    for args, said in (((), "give a step, or --all"), ((7,), "has steps 1 to 6, and no step 7")):
        with pytest.raises(InputError, match=said):
            replayed(run, *args)
    path = run / "rollouts" / f"step_{STEP:06d}.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:2000] + bytes(8) + content[2008:])
    with pytest.raises(InputError, match=r"step_000004\.parquet is damaged"):
        replayed(run, 5)
    path.unlink()
    with pytest.raises(InputError, match="the answers of 1 steps, of which 5 is the first, are not kept"):
        replayed(run, 5)
    replayed(run, 4)
    np.testing.assert_equal(len(rollout_rows(run, 3)), 64)
