"""The comparison of variants: numbers of runs made by hand, and runs that it trains itself."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from scipy import stats

import tiny_run
from evals import compare, compare_command, compare_page, held_out, matrix
from jaxrl import cli, config
from jaxrl.errors import InputError, RunError
from jaxrl.types import Prompt, Rollout
from tiny import lines

SECONDS, TOKENS = 2.0, 100.0  # of a step of the runs that are made up


def write_matrix(folder: Path, **values: Any) -> Path:
    """A matrix of the tiny recipe, a baseline and one variant with seeds 1 and 2, in `folder`."""
    table: dict[str, Any] = {
        "baseline": str(folder / "recipe.toml"),
        "directory": str(folder / "compare"),
        "seeds": [1, 2],
        "budget": {"steps": 4},
        "accuracies": [0.5],
        "eval": {"path": str(folder / "problems.jsonl"), "every": 2, "samples": 4},
        "variants": [{"name": "Dr. GRPO", "advantage": {"scale": "none"}}],
    }
    path = folder / "matrix.toml"
    path.write_text(tomli_w.dumps(table | values))
    return path


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    tiny_run.write_recipe(tmp_path, base)
    return tmp_path


def make_up(
    cell: matrix.Cell, right: Sequence[Sequence[int]], steps: int = 4, tokens: float = TOKENS
) -> None:
    """A run whose evaluations, spread evenly over its steps, have these numbers of right answers of 4."""
    (cell.folder / "eval").mkdir(parents=True)
    (cell.folder / "recipe.toml").write_text(config.to_toml(cell.recipe))
    rows = [
        {
            "step": step, "sampler/tokens": tokens, "update/tokens": tokens / 2,
            "time/step": SECONDS / 2, "perf/devices": 2.0, "policy/entropy": 0.5,
            "response/length_mean": 5.0, "response/truncated_fraction": 0.25,
        }
        for step in range(steps)
    ]  # fmt: skip
    (cell.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for place, counts in enumerate(right):
        step = place * steps // (len(right) - 1)
        result = {"name": "step", "step": step, "accuracy": np.mean(counts) / 4, "ci95": [0, 1]}
        result |= {"problems": len(counts), "samples": 4, "right": counts}
        (cell.folder / "eval" / f"step_{step:06d}.json").write_text(json.dumps(result))


def compared(path: Path) -> tuple[matrix.Matrix, list[matrix.Cell], list[compare.Finished]]:
    table = matrix.load(path)
    cells = matrix.cells(table, 4)
    return table, cells, compare.finished(compare.find(cells, table.budget), table.budget)


def test_differences_are_those_of_the_same_seed_and_problem(folder: Path) -> None:
    path = write_matrix(folder)
    right = {
        ("baseline", 1): [[0, 0], [2, 0], [2, 2]],
        ("baseline", 2): [[0, 0], [0, 2], [4, 2]],
        ("Dr. GRPO", 1): [[0, 0], [2, 2], [4, 2]],
        ("Dr. GRPO", 2): [[0, 0], [4, 2], [4, 4]],
    }
    for cell in matrix.cells(matrix.load(path), 4):
        make_up(cell, right[cell.variant, cell.seed])
    table, cells, runs = compared(path)
    base, ours = compare.compare(table, runs)
    assert (base.accuracy, ours.accuracy) == (0.625, 0.875)
    found = ours.differences["budget"]
    assert found.mean == pytest.approx(np.mean([[2, 0], [0, 2]]) / 4)
    half = found.error * stats.t.ppf(0.975, 1)
    assert (found.low, found.high) == pytest.approx((0.25 - half, 0.25 + half))
    assert ours.verdict().startswith("no difference seen with 2 seeds")
    assert base.reached[0.5] == (2, 350.0, 7.0)  # after 4 steps, and half-way between 2 and 4 steps
    assert ours.reached[0.5] == pytest.approx((2, 500 / 3, 10 / 3))
    assert base.totals["tokens sampled"] == 400 and base.totals["truncated"] == 0.25
    for written in compare_page.write(table, cells, [base, ours], runs):
        assert "Dr. GRPO" in written.read_text()
    [row] = [line for line in (folder / "compare" / "compare.md").read_text().splitlines() if "+25.0" in line]
    assert row.startswith("| Dr. GRPO | 2 | 87.5 | +25.0 (")
    numbers = json.loads((folder / "compare" / "compare.json").read_text())["variants"]
    assert [each["variant"] for each in numbers] == ["baseline", "Dr. GRPO"]
    assert numbers[1]["differences"]["budget"]["mean"] == pytest.approx(0.25)


def test_equal_tokens_are_those_of_the_run_that_took_least(folder: Path) -> None:
    path = write_matrix(folder, seeds=[1])
    cells = matrix.cells(matrix.load(path), 4)
    make_up(cells[0], [[0], [4]], tokens=200)
    make_up(cells[1], [[0], [3]], tokens=100)
    table, _, runs = compared(path)
    _, ours = compare.compare(table, runs)
    assert ours.differences["budget"].mean == -0.25
    assert ours.differences["tokens"].mean == 0.25  # after 400 tokens, where the baseline is half-way
    assert ours.differences["seconds"].mean == -0.25
    assert ours.verdict() == "no verdict: one seed"


def test_a_run_that_is_longer_counts_as_far_as_the_budget(folder: Path) -> None:
    path = write_matrix(folder, seeds=[1])
    for cell in matrix.cells(matrix.load(path), 4):
        make_up(cell, [[0], [1], [4]], steps=8)
    table, _, runs = compared(path)
    assert [each.accuracy for each in compare.compare(table, runs)] == [0.25, 0.25]
    assert len(runs[0].run.rows) == 4


def test_benchmarks_count_the_same_whatever_their_size() -> None:
    tasks = {"a": {"right": [2, 2, 2], "samples": 2}, "b": {"right": [0], "samples": 4}}
    assert np.mean(compare._scores({"step": 1, "benchmarks": tasks})) == 0.5  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("budget", "steps", "wanted"),
    [({"steps": 4}, 2, 4), ({"tokens": 500}, 2, 5), ({"seconds": 7.0}, 2, 4), ({"tokens": 400}, 4, None)],
)
def test_a_run_goes_on_until_its_budget_is_used(
    folder: Path, budget: dict[str, float], steps: int, wanted: int | None
) -> None:
    table = matrix.load(write_matrix(folder, budget=budget, seeds=[1]))
    cells = matrix.cells(table, 3)
    assert [
        compare.steps_wanted(cell, table.budget, run) for cell, run in compare.find(cells, table.budget)
    ] == [3, 3]
    make_up(cells[0], [[0], [1]], steps=steps)
    [(_, run), _] = compare.find(cells, table.budget)
    assert compare.steps_wanted(cells[0], table.budget, run) == wanted
    for result in (cells[0].folder / "eval").glob(f"*{steps}.json"):
        result.unlink()
    [(_, run), _] = compare.find(cells, table.budget)
    assert compare.steps_wanted(cells[0], table.budget, run) == (wanted or steps)  # to be evaluated


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"sedes": [1]}, "unknown key 'sedes'"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "has one twice"),
        ({"budget": {}}, "give one of budget.steps"),
        ({"budget": {"steps": 1, "tokens": 1}}, "give one of budget.steps"),
        ({"budget": {"steps": "many"}}, "budget.steps"),
        ({"variants": [{"name": "a b"}, {"name": "A-b"}]}, "two variants are called a-b"),
        ({"variants": [{"name": "baseline"}]}, "two variants are called baseline"),
        ({"variants": [{"loss": {"clip_high": 0.3}}]}, "variants.0.name"),
        ({"variants": [{"name": "a", "lost": {"clip_high": 0.3}}]}, "unknown key 'lost'"),
        ({"variants": [{"name": "a", "loss": {"clip_hi": 0.3}}]}, "variant 'a': .*clip_hi"),
        ({"variants": [{"name": "a", "recipe": "nowhere.toml"}]}, "variant 'a': nowhere.toml: cannot read"),
        (
            {"variants": [{"name": "a", "eval": {"temperature": 0.5}}]},
            "variant 'a': eval.temperature: held-out",
        ),
        (
            {"variants": [{"name": "a", "rollout": {"max_tokens": 4}}]},
            "variant 'a': eval.max_tokens: held-out",
        ),
        (
            {"variants": [{"name": "a", "reward": {"verifier": "corrected"}}]},
            "variant 'a': reward.verifier: held",
        ),
        ({"eval": {"every": 0}}, "variant 'baseline': nothing is measured"),
    ],
)
def test_a_matrix_that_cannot_be_compared(folder: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        matrix.cells(matrix.load(write_matrix(folder, **values)), 4)


def test_the_comparisons_that_come_along_are_possible() -> None:
    names = sorted(path.stem for path in matrix.FOLDER.glob("*.toml"))
    assert names == ["justrl", "techniques"]
    for name in names:
        table = matrix.load(name)
        cells = matrix.cells(table, table.budget.steps or 1)
        assert len(cells) == (1 + len(table.variants)) * len(table.seeds)


def test_a_verifier_of_its_own_marks_what_is_held_out(folder: Path) -> None:
    values = {"eval": {"path": str(folder / "problems.jsonl"), "every": 2, "verifier": "corrected"}}
    variants = [{"name": "lenient", "reward": {"verifier": "equivalent", "thoughts": "optional"}}]
    cells = matrix.cells(matrix.load(write_matrix(folder, **values, variants=variants)), 4)
    prompt = Prompt("", np.zeros(1, np.int32), "2")
    rollout = Rollout(prompt, np.zeros(1, np.int32), np.zeros(1, np.float32), "stop", 0)
    for cell in cells:
        mark = held_out.marker(cell.recipe, lambda _: "\\boxed{02}")
        assert mark(rollout).score == 1  # the training verifier compares characters


def test_a_run_of_another_recipe_is_refused(folder: Path) -> None:
    path = write_matrix(folder)
    cells = matrix.cells(matrix.load(path), 4)
    elsewhere = config.load(cells[1].recipe, {"run.directory": "x", "model.path": "y", "packing.segments": 8})
    make_up(cells[1], [[0], [1]])
    (cells[1].folder / "recipe.toml").write_text(config.to_toml(elsewhere))
    compare.find(cells, matrix.load(path).budget)
    (cells[1].folder / "recipe.toml").write_text(
        config.to_toml(config.load(elsewhere, {"loss.clip_high": 0.3}))
    )
    with pytest.raises(InputError, match=r"another recipe \(loss.clip_high: 0.28 -> 0.3\).*'Dr. GRPO'"):
        compare.find(cells, matrix.load(path).budget)


def test_runs_are_launched_once(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_matrix(folder, seeds=[1])
    with pytest.raises(SystemExit):
        cli.main(["compare", str(path), "--launch", "sbatch job"])
    assert "{recipe}" in capfd.readouterr().err
    for _ in range(2):
        cli.main(["compare", str(path), "--launch", "echo submitted {recipe}"])
    shown = capfd.readouterr().out
    assert shown.count("\nsubmitted ") + shown.startswith("submitted ") == 2
    assert shown.count("started before, and not finished") == 2 and "0 of 2 runs are finished" in shown
    recipe = config.load(folder / "compare" / "Dr.-GRPO" / "seed-1.toml")
    assert (recipe.run.steps, recipe.run.seed, recipe.advantage.scale) == (4, 1, "none")
    with pytest.raises(RunError, match=r"--launch: .*status 1"):
        args = ["--launch", f"{sys.executable} -c exit(1) {{recipe}}"]
        compare_command._launch(args[1], [(matrix.cells(matrix.load(path), 4)[0], 5)])


@pytest.mark.slow
def test_a_matrix_is_trained_and_goes_on_after_an_interruption(folder: Path) -> None:
    path = write_matrix(folder, budget={"tokens": 2_500}, seeds=[1, 2])
    process = tiny_run.jaxrl("compare", path, "--jobs", "2")
    first = folder / "compare" / "baseline" / "seed-1" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode not in (0, 1), output
    shown = tiny_run.finish("compare", path, "--jobs", "2")
    assert "4 of 4 runs are finished" in shown
    for rows in (lines(at) for at in (folder / "compare").rglob("metrics.jsonl")):
        steps = [row["step"] for row in rows if "sampler/tokens" in row]
        assert steps == sorted(set(steps))
        assert sum(row.get("sampler/tokens", 0) for row in rows) >= 2_500
    before = {at: at.read_bytes() for at in (folder / "compare").rglob("metrics.jsonl")}
    assert "of 4: " not in tiny_run.finish("compare", path)
    assert before == {at: at.read_bytes() for at in (folder / "compare").rglob("metrics.jsonl")}
