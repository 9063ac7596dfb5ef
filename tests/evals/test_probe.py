"""`jaxrl probe`: its numbers and zones against values by hand, and a probe of the tiny model that is killed."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_run
from evals import probe, probe_command, probe_tables
from evals.probe import Measured, Placed, Probed, advice, measure, spread, temperatures_of, zones
from evals.statistics import confidence, distinct_4grams
from jaxrl import exports
from jaxrl.errors import InputError
from jaxrl.sampling.local import LocalSampler
from jaxrl.types import Groups, Prompt, Rollout

UNIFORM = 1e6  # a temperature at which every token is as likely


def run(*args: object) -> None:
    """The command, as the command line starts it."""
    parser = argparse.ArgumentParser()
    probe_command.add_arguments(parser)
    probe_command.run(*parser.parse_known_args([str(a) for a in args]))


def refused(*args: object) -> str:
    """The one line that it ends with."""
    with pytest.raises(InputError) as error:
        run(*args)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def rollout(tokens: Sequence[int], logprobs: Sequence[float], right: bool) -> Rollout:
    prompt = Prompt("", np.zeros(1, np.int32), "1")
    finish, score = ("stop", 1.0) if right else ("length", -1.0)
    return Rollout(prompt, np.array(tokens, np.int32), np.array(logprobs, np.float32), finish, 0, score)


def test_distinct_4grams_are_counted_over_all_answers_to_a_problem() -> None:
    # 1234 2345 | 1234 | none: two different ones of three
    assert distinct_4grams([[1, 2, 3, 4, 5], [1, 2, 3, 4], [1, 2, 3]]) == 2 / 3
    assert distinct_4grams([[7] * 6]) == 1 / 3
    assert distinct_4grams([[1, 2, 3], []]) == 0.0


def test_measures_are_means_over_problems_and_entropy_is_a_mean_over_tokens() -> None:
    groups = [
        [rollout([1, 2, 3, 4], [-1.0, 0, 0, 0], True), rollout([1, 2, 3, 4], [0, 0, 0, -2.0], False)],
        [rollout([1, 2, 3, 4, 5], [-1.0] * 5, False), rollout([9], [-3.0], False)],
    ]
    found = measure(groups, 0.7)
    assert (found["temperature"], found["accuracy"], found["right"]) == (0.7, 0.25, [1, 0])
    assert found["ci95"] == confidence(np.array([0.5, 0.0]))
    assert found["distinct_4gram"] == 0.75 and found["distinct_4gram_ci95"] == [0.5, 1.0]
    assert found["entropy"] == pytest.approx((1 + 2 + 5 + 3) / 14)
    assert (found["length_mean"], found["truncated_fraction"]) == (3.5, 0.75)
    with pytest.raises(InputError, match="1 of 3 problems were refused"):
        measure([*groups, []], 0.7)


def results(**right: list[int]) -> list[Measured]:
    """Results of 10 samples a problem, at temperatures 1, 2, ... in tenths."""
    found: list[Any] = []
    for number, counts in enumerate(right.values(), 1):
        found.append({"temperature": number / 10, "right": counts, "accuracy": float(np.mean(counts)) / 10})
    return found


ALL: dict[str, list[int]] = {
    "cold": [5, 5, 5, 5],
    "colder_by_chance": [7, 8, 8, 8],
    "best": [8, 8, 8, 8],
    "as_good": [9, 7, 8, 7],
    "two_of_four": [7, 8, 7, 8],  # a draw of 4 has neither in 1 of 16 cases: the interval reaches 0
    "below": [7, 7, 7, 7],
    "by_chance_again": [9, 7, 8, 7],
    "far_below": [4, 4, 4, 4],
    "by_chance_once_more": [7, 7, 7, 7],
}


def test_zones_follow_from_paired_intervals_and_never_go_back() -> None:
    found = zones(results(**ALL), samples=10, most_loss=0.2)
    assert [each["zone"] for each in found] == [
        *("cold", "robust", "robust", "robust", "robust"),
        *("exploration", "exploration", "collapse", "collapse"),
    ]
    assert [each["loss"] for each in found][:6] == pytest.approx([0.3, 0.025, 0, 0.025, 0.05, 0.1])
    assert found[5]["loss_ci95"] == pytest.approx([0.1, 0.1]) and found[4]["loss_ci95"][0] == 0
    # the same means, but other problems: unpaired, the interval would be the same
    below = [
        zones(results(best=[2, 8, 2, 8], other=other), 10, 0.3)[1] for other in ([1, 7, 1, 7], [8, 1, 7, 0])
    ]
    assert [each["zone"] for each in below] == ["exploration", "robust"]


def test_the_share_that_exploration_may_cost_is_of_the_best_accuracy() -> None:
    for most, zone in ((0.13, "exploration"), (0.12, "collapse")):  # 0.1 of 0.8 is 0.125
        assert zones(results(best=[8, 8], below=[7, 7]), 10, most)[1]["zone"] == zone


def probed(most_loss: float = 0.2, **right: list[int]) -> Probed:
    found = results(**right)
    return {"settings": {}, "results": found, "most_loss": most_loss, "zones": zones(found, 10, most_loss)}


def test_advice_names_the_hottest_of_both_zones_and_what_to_write() -> None:
    first, second, third = advice(probed(**ALL))
    assert first == "hottest in the robust zone: 0.5"
    assert second == "hottest in the exploration zone: 0.7"
    assert third.endswith("write into the recipe: rollout.temperature = 0.7")
    lines = advice(probed(best=[8, 8], far_below=[1, 1]))
    assert "between 0.1 and 0.2" in lines[1] and lines[2].endswith("rollout.temperature = 0.1")
    assert "above 0.2" in advice(probed(best=[8, 8], as_good=[8, 8]))[1]
    assert "no response is right" in advice(probed(none=[0, 0], at_all=[0, 0]))[0]


def test_advice_says_where_problems_are_too_few() -> None:
    *others, last = advice(probed(best=[8, 8], unsure=[8, 4]))
    assert not any("write into the recipe" in line for line in others)
    assert last.startswith("too few problems to be sure of 0.2: its accuracy may be lower by 0.400")


def test_bands_meet_half_way_between_temperatures() -> None:
    names = ("robust", "robust", "exploration", "collapse")
    places: list[Placed] = [
        {"temperature": t, "zone": zone, "loss": 0.0, "loss_ci95": [0.0, 0.0]}  # type: ignore[typeddict-item]
        for t, zone in zip((1.0, 2.0, 3.0, 5.0), names, strict=True)
    ]
    assert probe_tables.bands(places) == [
        ("robust", 0.5, 2.5),
        ("exploration", 2.5, 4.0),
        ("collapse", 4.0, 5.5),
    ]


def test_problems_are_evenly_spaced_over_the_data() -> None:
    prompts = [Prompt(str(i), np.zeros(1, np.int32), "") for i in range(10)]
    assert [prompt.id for prompt in spread(prompts, 4)] == ["0", "2", "5", "7"]
    assert spread(prompts, 64) == prompts


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1.0", "at least two"),
        ("0.6,warm", "'warm' is not a number"),
        ("0.6,", "'' is not a number"),
        ("0.6,1,0.60", "0.60 is there twice"),
        ("0.6,0.001", "0.001 cannot be sampled at; use 0.01 or more"),
        ("nan,1", "nan cannot be sampled at"),
        ("1,inf", "inf cannot be sampled at"),
    ],
)
def test_bad_temperatures_are_one_line(base: Path, tmp_path: Path, text: str, said: str) -> None:
    recipe = tiny_run.write_recipe(tmp_path, base)
    assert said in refused(base, "--recipe", recipe, "--temperatures", text)


def test_temperatures_are_put_in_order() -> None:
    assert temperatures_of("1.2, 0.6,1") == (0.6, 1.0, 1.2)


def test_other_bad_input_is_one_line(base: Path, tmp_path: Path) -> None:
    recipe = tiny_run.write_recipe(tmp_path, base)
    here = (base, "--recipe", recipe)
    assert "--recipe FILE" in refused(base)
    assert "give --temperatures" in refused(*here, "--rollout.temperature=0.7")
    assert "--most-loss" in refused(*here, "--most-loss", 5)
    assert "2.5 is refused by vLLM" in refused(*here, "--servers", 1, "--temperatures", "1,2.5")
    assert "no such model folder" in refused(tmp_path / "nowhere", "--recipe", recipe)
    assert "cannot read the recipe" in refused(base, "--recipe", tmp_path / "nowhere.toml")
    (tmp_path / "run" / "probe").mkdir(parents=True)
    for text in ("{", "[1]", "{}"):
        (tmp_path / "run" / "probe" / "probe.json").write_text(text)
        assert "probe.json: not the results of a probe; delete it" in refused(*here)


def test_a_probe_that_is_killed_goes_on_and_sees_accuracy_fall_and_entropy_rise(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = tiny_run.write_recipe(tmp_path, base), tmp_path / "run" / "probe"
    generate, sampled, dies = LocalSampler.generate, list[tuple[float, Any]](), True

    def recorded(self: LocalSampler, prompts: Any, samples: int, params: Any, seed: Any, on: Any) -> Groups:
        if dies and sampled:
            raise KeyboardInterrupt
        sampled.append((params.temperature, seed))
        assert (params.top_p, params.top_k, params.max_tokens, samples) == (1, 0, 8, 64)
        return generate(self, prompts, samples, params, seed, on)

    monkeypatch.setattr(LocalSampler, "generate", recorded)
    here = (base, "--recipe", recipe, "--samples", 64, "--temperatures")
    with pytest.raises(KeyboardInterrupt):
        run(*here, f"2,{UNIFORM}")
    first = json.loads((out / "probe.json").read_text())["results"]
    assert [result["temperature"] for result in first] == [2]
    dies = False
    run(*here, f"2,{UNIFORM}")
    run(*here, f"0.5,2,{UNIFORM}")
    assert sampled == [(2, (1,)), (UNIFORM, (1,)), (0.5, (1,))]  # the same noise for all, and none twice
    found: Probed = json.loads((out / "probe.json").read_text())
    cold, warm, hot = found["results"]
    assert warm == first[0]
    assert 1.0 > cold["accuracy"] > warm["accuracy"] > 0.25 > hot["accuracy"]
    assert cold["distinct_4gram"] < warm["distinct_4gram"] < hot["distinct_4gram"]
    assert cold["entropy"] < warm["entropy"] < hot["entropy"]
    assert hot["entropy"] == pytest.approx(math.log(len(tiny_run.SYMBOLS)), abs=1e-4)
    assert [place["zone"] for place in found["zones"]] == ["robust", "collapse", "collapse"]
    assert (out / "probe.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert "rollout.temperature = 0.5" in said and f"3 temperatures -> {out}" in said
    # other settings: the results are kept aside, with one line
    run(*here, f"2,{UNIFORM}", "--run.seed", 2)
    assert [temperature for temperature, _ in sampled[3:]] == [2, UNIFORM]
    aside = out / "other" / "probe.json"
    assert f"{out}/probe.json is of seed = 1, not 2, and now {aside}" in capsys.readouterr().out
    assert json.loads(aside.read_text()) == found


def test_a_run_is_probed_with_its_own_recipe_at_its_stage(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_folder, jobs = tmp_path / "run", list[probe.Job]()
    (run_folder / "checkpoints" / "4").mkdir(parents=True)
    text = tiny_run.write_recipe(tmp_path, base).read_text().replace("steps = 6\n", "")
    stages = "[[stages]]\nuntil = 4\n[[stages]]\nuntil = 6\nrollout.samples = 16\nrollout.max_tokens = 16\n"
    (run_folder / "recipe.toml").write_text(f"{text}\n{stages}")
    found: Probed = probed(best=[8, 8], other=[8, 8])

    def taken(job: probe.Job, _: object) -> Probed:
        jobs.append(job)
        return found

    monkeypatch.setattr(exports, "export", lambda source, folder: 4)
    monkeypatch.setattr(probe, "probe", taken)
    monkeypatch.setattr(probe_tables, "plot", lambda *_: None)
    monkeypatch.setattr(probe_tables, "show", lambda *_: None)
    run(run_folder, "--problems", 5)
    run(run_folder / "checkpoints" / "4", "--samples", 2)
    run(base, "--recipe", run_folder / "recipe.toml", "--out", tmp_path / "out")
    first, second, third = jobs
    assert (first.folder, first.out) == (run_folder / "hf", run_folder / "probe")
    assert (first.problems, first.samples, first.recipe.rollout.max_tokens) == (5, 16, 16)
    assert first.temperatures == (0.6, 0.8, 1.0, 1.2, 1.4)
    of_the_step = run_folder / "probe" / "step_000004"
    assert (second.folder, second.out, second.samples) == (of_the_step / "hf", of_the_step, 2)
    assert (third.folder, third.out, third.samples) == (base, tmp_path / "out", 8)  # at the first stage
