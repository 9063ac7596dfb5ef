"""What a run achieved, against numbers that are known, and the image of it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from test_figures import benchmark, evaluate, make_run

from jaxrl.report import card
from jaxrl.report.figures import report
from jaxrl.report.headline import compared, departures, facts, headline, matters
from jaxrl.report.runs import read_run


def test_before_and_after_are_the_headline(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for name, step, accuracy in (
        ("step_20", 20, 0.5),
        ("before", 0, 0.186),
        ("after", 40, 0.92),
        ("z", 40, 0.1),
    ):
        evaluate(run, name, step, accuracy)
    benchmark(run, 0, 0.3)
    benchmark(run, 40, 0.4)
    found = headline(read_run(run))
    assert found and (found.change, found.measure) == ("18.6% → 92.0%", "held-out accuracy")
    assert found.interval == "95% intervals 16.6% to 20.6% and 90.0% to 94.0%, bootstrap over problems"


def test_else_the_first_and_the_last_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for step, accuracy in ((0, 0.2), (20, 0.6), (40, 0.5)):
        evaluate(run, f"step_{step:06d}", step, accuracy)
    found = headline(read_run(run))
    assert found and (found.change, found.measure) == ("20.0% → 50.0%", "held-out accuracy")
    for step, accuracy in ((0, 0.1), (40, 0.3)):
        benchmark(run, step, accuracy)
    found = headline(read_run(run))
    assert found and (found.change, found.measure) == ("10.0% → 30.0%", "mean of 3 benchmarks")


def test_else_the_mean_reward_with_its_interval(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    evaluate(run, "before", 0, 0.2)  # one evaluation is no change
    rewards = [json.loads(line)["reward/mean"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = headline(read_run(run))
    assert found and found.measure == "mean reward" and not found.percent
    for point, part in zip(found.ends, (rewards[:4], rewards[-4:]), strict=True):
        half = 1.96 * np.std(part, ddof=1) / 2
        np.testing.assert_allclose([point.value, *point.ci95], np.mean(part) + np.array([0, -half, half]))
    assert headline(read_run(make_run(tmp_path / "other", missing=["reward/mean"]))) is None


def test_facts_have_steps_device_hours_and_the_model(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "recipe.toml").write_text("[model]\npath = 'models/Qwen2.5-1.5B'\n")
    assert facts(read_run(run)) == ["40 steps", "0.0444 hours", "model Qwen2.5-1.5B"]
    rows = [
        json.loads(line) | {"perf/devices": 8} for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert facts(read_run(run))[1] == "0.356 device hours (8 devices)"


def test_only_keys_that_steps_depend_on_are_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "recipe.toml").write_text(
        "[run]\ndirectory = 'x'\nseed = 3\n[model]\npath = 'm'\ndtype = 'float32'\n[data]\npath = 'd'\n"
        "[packing]\nsegments = 8\n[eval]\npath = 'e'\n[loss]\nclip_high = 0.3\n[rollout]\nsamples = 4\nslots = 8\n"
    )
    found = {each.key: (each.default, each.values) for each in departures([read_run(run)]) if matters(each)}
    assert found == {
        "model.dtype": ("bfloat16", ["float32"]),
        "rollout.samples": (8, [4]),
        "loss.clip_high": (0.28, [0.3]),
    }


def test_stages_are_compared_too(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    for run, tokens in ((one, 64), (two, 96)):
        (run / "recipe.toml").write_text(
            f"[[stages]]\nuntil = 20\nrollout.max_tokens = 32\n[[stages]]\nuntil = 40\nrollout.max_tokens = {tokens}\n"
        )
    (found,) = compared([read_run(one), read_run(two)])
    assert found == ("stages.1.rollout.max_tokens", None, [64, 96])


@pytest.mark.parametrize("runs", [1, 2, 6])
def test_the_image_has_the_size_of_link_previews_and_changes_with_the_result(
    runs: int, tmp_path: Path
) -> None:
    made = [make_run(tmp_path / f"$run_{i}$") for i in range(runs)]
    images = []
    for accuracy in (0.5, 0.9):
        for run in made[:1]:
            evaluate(run, "before", 0, 0.1)
            evaluate(run, "after", 40, accuracy)
        images.append(matplotlib.image.imread(io.BytesIO(card.png([read_run(run) for run in made]))))
    assert images[0].shape[:2] == (630, 1200) and (images[0] != images[1]).any()
    report(made)
    assert (matplotlib.image.imread(made[0] / "report" / "summary.png") == images[1]).all()
    page = (made[0] / "report" / "report.html").read_text(encoding="utf-8")
    assert 'download="summary.png" href="data:image/png;base64,' in page
