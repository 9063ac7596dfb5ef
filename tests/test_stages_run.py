"""A run of three stages: each mechanism shows in what the run leaves, and a run in parts is the same run."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import staged
import tiny_run
from jaxrl import config, run
from jaxrl.cli import main
from jaxrl.errors import InputError
from jaxrl.types import silent
from tiny import lines, rollout_rows

ONE_UPDATE = {
    "optimizer.minibatch_prompts": 8,
    "optimizer.warmup_steps": 0,
    "optimizer.learning_rate": 2e-3,
    "checkpoint.every": 3,
}


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    said = tiny_run.finish("train", staged.write_recipe(folder, base, **ONE_UPDATE))
    assert "stage 'hot' begins: steps 4 to 6, with a restart of optimizer, reference" in said
    assert "step 9/9 [rest]" in said and "trained on 8 of" in said
    return folder / "run"


def test_the_reference_is_the_policy_where_it_begins_anew(whole: Path) -> None:
    kl = [row["policy/kl_reference"] for row in lines(whole / "metrics.jsonl")]
    anew = {0, 2, 3, 5, 8}  # every 2 steps of a stage, and with the second one
    assert all(abs(kl[step]) < 1e-7 for step in anew), kl
    assert all(kl[step] > 1e-5 for step in set(range(9)) - anew), kl
    assert sorted(folder.name for folder in (whole / "reference").iterdir()) == [
        "5",
        "8",
    ]  # of checkpoints 6 and 9


def test_every_trained_group_is_in_the_band_and_all_are_counted(whole: Path) -> None:
    for step, row in enumerate(lines(whole / "metrics.jsonl")):
        found = rollout_rows(whole, step)
        groups = [found[i : i + 8] for i in range(0, len(found), 8)]
        right = [sum(r["score"] > 0 for r in group) for group in groups]
        assert len(groups) == row["groups/sampled"] >= row["groups/trained"] == 8
        mixed = sum(0 < n < 8 for n in right)
        assert mixed >= 8 if step < 3 else mixed > 0
        assert row["reward/accuracy"] == pytest.approx(sum(right) / len(found))
        assert row["sampler/tokens"] == sum(r["tokens"] for r in found)
    assert max(len(rollout_rows(whole, step)) for step in range(9)) > 64  # some step took more than a round


def test_prompts_that_were_solved_are_left_out(whole: Path) -> None:
    right, shown = Counter[str](), Counter[str]()
    history = lines(whole / "prompts.jsonl")
    for row in history[3:6]:
        for name, (good, count) in row["prompts"].items():
            right[name] += good
            shown[name] += count
    solved = {name for name in shown if right[name] / shown[name] > 0.65}
    assert solved and solved < shown.keys()
    after = {name for row in history[6:] for name in row["prompts"]}
    assert not solved & after and after


def test_limits_and_temperature_are_the_stage_s(whole: Path) -> None:
    assert all(r["tokens"] <= 6 for step in range(3) for r in rollout_rows(whole, step))
    hot = [row["policy/entropy"] for row in lines(whole / "metrics.jsonl")]
    assert min(hot[3:5]) > max(hot[:3])
    assert {row["run/stage"] for row in lines(whole / "metrics.jsonl")} == {1, 2, 3}


@pytest.mark.slow
def test_a_run_whose_end_is_moved_is_the_same_run(whole: Path, base: Path, tmp_path: Path) -> None:
    shorter = [*staged.STAGES[:2], staged.STAGES[2] | {"until": 7}]
    tiny_run.finish("train", staged.write_recipe(tmp_path, base, shorter, **ONE_UPDATE))
    said = tiny_run.finish("train", staged.write_recipe(tmp_path, base, **ONE_UPDATE))
    assert "going on from step 7" in said and "begins" not in said
    assert staged.manifest(tmp_path / "run", 9) == staged.manifest(whole, 9)
    assert tiny_run.metrics(tmp_path / "run") == tiny_run.metrics(whole)


def resumed(whole: Path, base: Path, tmp_path: Path, stages: list[dict[str, Any]], **more: Any) -> run.Carry:
    """What a copy of the run would go on with."""
    shutil.copytree(whole, tmp_path / "run", dirs_exist_ok=True)
    recipe = config.load(staged.write_recipe(tmp_path, base, stages, **ONE_UPDATE | more))
    setup, checkpoints = run.load(recipe, None, silent), run.open_checkpoints(recipe)
    try:
        carry = run.resume(setup, checkpoints, silent)
        return run.with_reference(setup, checkpoints, carry)
    finally:
        checkpoints.close()


def test_a_finished_run_goes_on_with_another_stage(whole: Path, base: Path, tmp_path: Path) -> None:
    cooler = {"until": 12, "optimizer": {"learning_rate": 1e-5}, "kl": {"coefficient": 0.5, "reset_every": 0}}
    carry = resumed(whole, base, tmp_path, [*staged.STAGES, cooler])
    assert carry.step == 9 and carry.reference and carry.reference.step == 8  # the last stage's, kept
    assert carry.ledger.dropped and carry.ledger.cursor >= 24


def test_what_is_past_cannot_change(whole: Path, base: Path, tmp_path: Path) -> None:
    other = staged.STAGES[1] | {"rollout": {"temperature": 1.5}}
    with pytest.raises(
        InputError, match=r"stage 'hot': rollout.temperature: 1.25 -> 1.5\); put these back"
    ) as caught:
        resumed(whole, base, tmp_path, [staged.STAGES[0], other, staged.STAGES[2]])
    assert "by a stage that begins at step 9" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["reference/8", "checkpoints/9/ledger"])
def test_a_damaged_reference_or_ledger_is_noticed(part: str, whole: Path, base: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    files = [path for path in (tmp_path / "run" / part).rglob("*") if path.is_file()]
    for path in files:
        data = bytearray(path.read_bytes())
        if len(data) > 20:
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6", ignore_errors=True)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    with pytest.raises(InputError, match=r"no checkpoint is whole \(9: "):
        resumed(tmp_path / "other", base, tmp_path, staged.STAGES)


def test_check_reads_the_reference_and_the_ledger(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["check", str(whole)])
    assert capsys.readouterr().out.count("are what was written") == 2
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "reference" / "8")
    ledger = tmp_path / "run" / "checkpoints" / "6" / "ledger" / "metadata"
    ledger.write_text(ledger.read_text().replace('"cursor": ', '"cursor": 1'))
    with pytest.raises(SystemExit) as end:
        main(["check", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert end.value.code == 2 and "reference/8" in said and "6 is damaged (its ledger has changed" in said, (
        said
    )


def test_files_of_a_later_stage_are_missed_before_anything_begins(base: Path, tmp_path: Path) -> None:
    later = {"until": 9, "data": {"path": str(tmp_path / "absent.jsonl")}}
    recipe = config.load(staged.write_recipe(tmp_path, base, [staged.STAGES[0], later]))
    with pytest.raises(InputError, match=r"absent.jsonl"):
        run.load(recipe, None, silent)
    assert not (tmp_path / "run").exists()
