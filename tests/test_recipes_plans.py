"""Every stage of the twelve recipes of JustRL's table fits on 8 and on 32 H100, and the published results are these."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import plans
from jaxrl import config
from jaxrl.errors import InputError
from jaxrl.plan import HARDWARE, plan
from jaxrl.sampling.servers import TRAINERS_MEMORY
from jaxrl.types import JsonObject

ROWS: list[JsonObject] = json.loads((plans.FOLDER.parent / "benchmarks/results/plans.json").read_text())[
    "rows"
]


def test_all_published_runs_are_planned() -> None:
    others = ("demo", "smollm2-", "ablation-")
    files = {path.stem for path in plans.FOLDER.glob("*.toml") if not path.stem.startswith(others)}
    assert files == set(plans.RECIPES)
    assert [(row["recipe"], row["devices"]) for row in ROWS] == [
        (name, devices) for name in plans.RECIPES for devices in plans.DEVICES
    ]


def test_the_page_has_their_table() -> None:
    page = (plans.FOLDER.parent / "docs" / "planning.md").read_text(encoding="utf-8")
    assert plans.table(ROWS) in page


def test_the_arithmetic_is_that_of_the_gpu_compiler() -> None:
    compiled = [row["compiled"] for row in ROWS if row["devices"] == plans.DEVICES[0]]
    assert len(compiled) == len(plans.RECIPES)
    for found in compiled:
        assert found["estimated"] == pytest.approx(found["trainer"], rel=0.05)


@pytest.mark.parametrize("name", plans.RECIPES)
def test_every_stage_fits(name: str, tmp_path: Path) -> None:
    memory = HARDWARE[plans.GPU].memory
    recipe = plans.load(name, tmp_path)
    for devices in plans.DEVICES:
        row = next(row for row in ROWS if (row["recipe"], row["devices"]) == (name, devices))
        for stage, written in zip(config.stages_of(recipe), row["stages"], strict=True):
            for how, made in plans.plans_of(stage.recipe, devices).items():
                peak, beside = plans.peak(made), made["bytes"].get("sampler", 0)
                assert peak <= memory, (stage.name, devices, how, made["bytes"])
                assert not beside or peak - beside <= TRAINERS_MEMORY * memory, (stage.name, devices)
                assert peak / plans.GB == pytest.approx(written[how]["peak_gigabytes"], abs=0.1)
                assert made["steps"][0]["total"] == pytest.approx(written[how]["seconds"], rel=0.02, abs=0.1)


def test_qwen3_has_no_positions_for_the_second_stage_of_polaris() -> None:
    """Which is why the model's config.json has to say more."""
    recipe = config.load(str(plans.FOLDER / "polaris-1.7b.toml"), [])
    first, second = (stage.recipe for stage in config.stages_of(recipe))
    assert plan(first, plans.assumptions(first, trainers=8))
    with pytest.raises(InputError, match="49152 tokens are more than the model's 40960 positions"):
        plan(second, plans.assumptions(second, trainers=8))
