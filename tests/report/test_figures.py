"""The figures and the summary of a run, against numbers computed here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl.errors import InputError
from jaxrl.report.figures import report
from jaxrl.report.panels import PANELS
from jaxrl.report.runs import smooth


def make_run(folder: Path, steps: int = 40, missing: Sequence[str] = ()) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows: list[dict[str, float | None]] = []
    for step in range(steps):
        reward = -0.5 + step / steps + rng.normal(0, 0.05)
        row: dict[str, float | None] = {"step": step, "reward/mean": reward, "policy/entropy": 1 - step / 100}
        row |= {"response/length_mean": 100 + step, "update/clip_fraction": 0.01, "update/grad_norm": 0.3}
        row |= {"time/sample": 1.0, "time/update": 3.0, "time/step": 4.0}
        rows.append(row | dict.fromkeys(missing))
    rows[3 % steps]["policy/entropy"] = None  # as a step without a trained token writes it
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def evaluate(folder: Path, name: str, step: int, accuracy: float) -> None:
    (folder / "eval").mkdir(exist_ok=True)
    result = {"name": name, "step": step, "accuracy": accuracy, "ci95": [accuracy - 0.02, accuracy + 0.02]}
    (folder / "eval" / f"{name}.json").write_text(json.dumps(result | {"problems": 500, "samples": 8}))


def benchmark(folder: Path, step: int, accuracy: float) -> None:
    (folder / "eval" / "benchmarks").mkdir(parents=True, exist_ok=True)
    measured = {"pass@1": accuracy, "ci95": [accuracy - 0.1, accuracy + 0.1]}
    found = {name: {"title": name.upper()} | measured for name in ("aime24", "aime25", "amc23")}
    result = {"step": step, "seconds": 9.0, "benchmarks": found, "average": measured}
    (folder / "eval" / "benchmarks" / f"step_{step}.json").write_text(json.dumps(result))


def history(folder: Path, steps: int = 4) -> None:
    """Prompts of a run, of which `lost` ends none right and `hard` never is, under names that tables have to escape."""
    rows = []
    for step in range(steps):
        prompts = {"lost": [2 * (step < 2), 4], "hard | <b>": [0, 4], f"new {step}": [4, 4]}
        rows.append({"step": step, "prompts": prompts})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def colors(path: Path) -> int:
    return len(np.unique(matplotlib.image.imread(path).reshape(-1, 4), axis=0))


def test_every_figure_is_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    evaluate(run, "before", 0, 0.2)
    evaluate(run, "after", 40, 0.9)
    written = report([run])
    panels = {f"{name}.png" for name in (*PANELS, "time", "accuracy", "training")}
    assert {p.name for p in written} == panels | {"summary.png", "summary.md", "report.html"}
    assert set(PANELS) == {"reward", "entropy", "length", "clip_fraction", "grad_norm"}
    assert all(p.parent == run / "report" for p in written)
    assert all(colors(p) > 20 for p in written if p.suffix == ".png")


def test_a_second_run_changes_the_figures(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two", steps=30)
    alone = matplotlib.image.imread(report([one], tmp_path / "a")[1])
    both = matplotlib.image.imread(report([one, two], tmp_path / "b")[1])
    assert alone.shape == both.shape and (alone != both).any()


def test_summary_has_the_means_and_the_evaluations(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    evaluate(run, "before", 0, 0.2)
    text = report([run])[-2].read_text()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, last = (np.mean([row["reward/mean"] for row in part]) for part in (rows[:4], rows[-4:]))
    assert f"| reward/mean | {first:.4g} | {last:.4g} |" in text
    assert f"| policy/entropy | {np.mean([1, 0.99, 0.98]):.4g} |" in text  # the fourth is missing
    assert "| before | 0 | 0.200 | 0.180 to 0.220 | 500 x 8 |" in text
    assert "| update | 120.0 | 75.0% |" in text
    assert "hours a point of accuracy" not in text  # of one evaluation


def test_benchmarks_have_a_figure_and_rows(tmp_path: Path) -> None:
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other")
    for step, accuracy in ((0, 0.25), (20, 0.5), (40, 0.75)):
        benchmark(run, step, accuracy)
    written = report([run, other])  # of which one was not evaluated
    (figure,) = [p for p in written if p.name == "benchmarks.png"]
    one = matplotlib.image.imread(figure)
    assert one.shape[1] == round(3 * 4.5 * 130) and colors(figure) > 20
    right = one[one.shape[0] // 2 :, one.shape[1] // 3 :]  # the fourth, an average, is alone in its row
    assert (right == 1).all()
    text = written[-2].read_text()
    assert "| benchmark, rule only | step 0 | step 40 |" in text
    for name in ("AIME24", "AMC23", "Average"):
        assert f"| {name} | 25.0% (15.0% to 35.0%) | 75.0% (65.0% to 85.0%) |" in text
    benchmark(other, 40, 0.1)
    report([run, other])
    assert (matplotlib.image.imread(figure) != one).any()


def test_prompts_have_a_panel_and_a_table(tmp_path: Path) -> None:
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other")
    before = {
        path.name: matplotlib.image.imread(path) for path in report([run, other]) if path.suffix == ".png"
    }
    history(other)
    written = report([run, other])  # of which the second has one
    names = {path.name for path in written if path.suffix == ".png"}
    assert names == {*before, "prompts.png"}
    figure = matplotlib.image.imread(run / "report" / "prompts.png")
    assert len(np.unique(figure.reshape(-1, 4), axis=0)) > 20
    overview = matplotlib.image.imread(run / "report" / "training.png")
    rows = overview.shape[0] / before["training.png"].shape[0]
    assert rows == 3 / 2 and overview.shape[1] == before["training.png"].shape[1]
    summary = (run / "report" / "summary.md").read_text()
    first, second = summary.split("## other")
    assert "never solved" not in first
    assert "6 prompts sampled, 1 never solved, 1 solved and lost again. The hardest:" in second
    table = second.split("| prompt | answers | right | last step |\n|---|---|---|---|\n")[1]
    assert table.splitlines() == ["| hard \\| <b> | 16 | 0 | 4 |", "| lost | 16 | 4 | 4 |"]


def test_runs_without_some_metrics_are_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=1, missing=["update/clip_fraction"])
    assert len(report([run])) == 10  # no accuracy.png


def test_a_folder_without_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"metrics\.jsonl: no metrics"):
        report([tmp_path])


lines = st.tuples(
    st.floats(-5, 5), st.floats(-2, 2), st.integers(2, 300), st.floats(0.01, 0.5), st.integers(0, 99)
)


@given(lines)
def test_smoothing_leaves_a_straight_line_as_it_is(line: tuple[float, float, int, float, int]) -> None:
    start, slope, count, share, seed = line
    values = start + slope * np.arange(count)
    np.testing.assert_allclose(smooth(values, share), values, atol=1e-6)  # both ends too
    gaps = np.where(np.random.default_rng(seed).random(count) < 0.3, np.nan, values)
    smoothed = smooth(gaps, share)
    near = np.isfinite(smoothed)
    assert near[np.isfinite(gaps)].all()
    alone = np.array([np.isfinite(gaps[max(0, i - 1) : i + 2]).sum() < 2 for i in range(count)])
    np.testing.assert_allclose(smoothed[near & ~alone], values[near & ~alone], atol=1e-6)


def test_smoothing_is_the_weighted_least_squares_line() -> None:
    values = np.random.default_rng(0).normal(size=30)
    values[[4, 5, 29]] = np.nan
    at, smoothed = np.arange(30), smooth(values, 0.2)
    for i in range(30):
        weights = np.maximum(0, 1 - np.abs((at - i) / 6) ** 3) ** 3
        near = np.isfinite(values) & (weights > 0)
        line = np.polynomial.Polynomial.fit(at[near], values[near], 1, w=np.sqrt(weights[near]))
        np.testing.assert_allclose(smoothed[i], line(i), atol=1e-9)


def test_a_smoothed_curve_does_not_run_below_rising_data() -> None:
    values = np.linspace(0, 1, 100) + np.random.default_rng(0).normal(0, 0.1, 100)
    assert abs(np.mean(smooth(values) - values)) < 0.005
