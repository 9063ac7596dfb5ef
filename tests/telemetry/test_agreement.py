"""The band of the difference between sampler and trainer."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest

import tiny_run
from jaxrl import config
from jaxrl.collect import Collected, Collector
from jaxrl.errors import InputError
from jaxrl.loop import train
from jaxrl.telemetry.agreement import METRIC, bound, disagreement
from jaxrl.telemetry.trackers import history


@pytest.mark.parametrize(
    ("before", "value", "says"),
    [
        ([], 0.019, None),
        ([], 0.021, "and by at most 0.02 usually"),
        ([0.006] * 3, 0.029, None),
        ([0.006] * 3, 0.031, "by 0.031 nats .* and by 0.006 in the steps before"),
        ([1e-6] * 50, 9e-4, None),
        ([1e-6] * 50, 2e-3, "by 0.002 nats .* and by 1e-06 in the steps before"),
        ([0.3] * 30 + [0.006] * 20, 0.031, "0.006 in the steps before"),
        ([0.006] * 10 + [0.3] * 11, 0.3, None),
        ([0.006] * 3, math.nan, None),
        ([0.006] * 3, math.inf, "by inf nats"),
    ],
)
def test_what_leaves_the_band_of_the_last_steps_is_said(
    before: list[float], value: float, says: str | None
) -> None:
    line = disagreement(before, value)
    assert (line is None) == (says is None) == (not value > bound(before))
    assert says is None or re.search(says, line or "")


def test_the_band_outlives_a_restart() -> None:
    rows = [{"step": i, METRIC: value} for i, value in enumerate([0.1, None, 0.3, 0.4])] + [{"step": 1}]
    assert history(rows, METRIC, 3) == [0.1, 0.3]


@pytest.mark.slow
def test_a_run_whose_sampler_disagrees_says_so_and_ends_where_it_is_told_to(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect, said = Collector.__call__, list[str]()

    def shifted(self: Collector, step: int) -> Collected:
        shift = np.float32(0.5 if step == 2 else 0)
        found = collect(self, step)
        groups = [[dataclasses.replace(r, logprobs=r.logprobs - shift) for r in g] for g in found.groups]
        return found._replace(groups=groups)

    monkeypatch.setattr(Collector, "__call__", shifted)
    recipe = config.load(tiny_run.write_recipe(tmp_path, base, **{"run.steps": 4, "checkpoint.every": 100}))
    limited = dataclasses.replace(recipe, sampler=dataclasses.replace(recipe.sampler, logprob_diff_limit=0.1))
    ends = r"step 3: sampler/logprob_diff_mean = 0\.5 is above sampler\.logprob_diff_limit = 0\.1; look at"
    with pytest.raises(InputError, match=ends):
        train(limited, say=said.append)
    assert [line for line in said if line.startswith("step 3: sampler and trainer differ by 0.5 nats")]
    assert not [line for line in said if line.startswith(("step 1:", "step 2:"))]
    train(limited, say=said.append)  # the step is saved
    assert "going on from step 3" in said
    assert [row["step"] for row in tiny_run.metrics(tmp_path / "run")] == [0, 1, 2, 3]
