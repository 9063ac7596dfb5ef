"""A whole run, uninterrupted and interrupted."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

import tiny_run
from evals import in_training
from jaxrl import config
from jaxrl.checkpoint import Checkpoints
from jaxrl.errors import TRY_AGAIN, InputError
from jaxrl.grpo.packing import lay_out
from jaxrl.loop import train
from jaxrl.models import hf
from jaxrl.parallel.signals import PEER, graceful_stop
from jaxrl.programs import layout_of
from jaxrl.run import LoadEvaluation, Run, Setup
from jaxrl.telemetry.history import read_history
from jaxrl.telemetry.rollouts import rollout_files
from jaxrl.telemetry.timer import PHASES
from jaxrl.telemetry.trackers import read_metrics
from tiny import rollout_rows


def optimizer_bytes(run: Path) -> dict[str, list[float]]:
    """Every array of the last checkpoint, optimizer included, in a form that compares bit for bit."""
    checkpoints = Checkpoints(run / "checkpoints", read_only=True)
    step = checkpoints.latest()
    import orbax.checkpoint as ocp

    read = ocp.StandardCheckpointer().restore(run.absolute() / "checkpoints" / str(step) / "optimizer")
    return {str(path): np.asarray(x).tolist() for path, x in jax.tree_util.tree_leaves_with_path(read)}


def test_learns_and_leaves_a_complete_run_folder(uninterrupted: Path) -> None:
    rows = tiny_run.metrics(uninterrupted)
    assert [row["step"] for row in rows] == list(range(6))
    assert 0.1 < rows[0]["reward/accuracy"] < 0.8
    assert rows[0]["sampler/logprob_diff_max"] < 1e-4  # the sampler's log-probs are the trainer's
    assert rows[0]["sampler/staleness"] == rows[-1]["sampler/staleness"] == 0
    assert rows[0]["update/ratio_max"] < 1.01  # the first batch runs at learning rate 0
    assert rows[-1]["update/ratio_max"] > 1.001
    assert {"policy/entropy", "update/grad_norm", "update/clip_fraction", "response/length_mean"} <= set(
        rows[0]
    )
    for name in ("recipe.toml", "checkpoints/6", "rollouts/step_000005.parquet"):
        assert (uninterrupted / name).exists(), name


def test_metrics_are_those_of_the_rollouts(uninterrupted: Path) -> None:
    """Recounted from the files of rollouts."""
    total = 0
    for row in tiny_run.metrics(uninterrupted):
        answers = rollout_rows(uninterrupted, row["step"])
        lengths, right = (
            np.array([answer["tokens"] for answer in answers]),
            np.array([answer["score"] > 0 for answer in answers]),
        )
        total += lengths.sum()
        expected = {
            "reward/std": np.std([answer["reward"] for answer in answers]),
            "response/length_min": lengths.min(),
            "response/length_mean_right": lengths[right].mean(),
            "response/length_mean_wrong": lengths[~right].mean(),
            "prompt/length_mean": 3,
            "sampler/tokens_total": total,
            "sampler/staleness_max": 0,
            "update/learning_rate": 1e-3 * min(row["step"], 1),
        }
        assert {name: row[name] for name in expected} == pytest.approx(expected)
        assert 0 <= row["sampler/k3_kl"] < 1e-6 and row["sampler/ess"] == pytest.approx(1, abs=1e-5)
        sides = [row[f"update/clip_fraction_{side}"] for side in ("low", "high")]
        assert row["update/clip_fraction"] == pytest.approx(sum(sides))


def test_the_page_names_all_metrics(uninterrupted: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    names = set().union(*rows) - {"step"}
    assert {name for name in names if f"`{name}`" not in page} == set()


def test_the_history_of_prompts_counts_the_rollouts(uninterrupted: Path) -> None:
    expected = []
    for step in range(len(rollout_files(uninterrupted))):
        prompts: dict[str, tuple[int, int]] = {}
        for row in rollout_rows(uninterrupted, step):
            right, shown = prompts.get(row["prompt_id"], (0, 0))
            prompts[row["prompt_id"]] = right + (row["score"] > 0), shown + 1
        expected.append({"step": step, "prompts": prompts})
    history = read_history(uninterrupted / "prompts.jsonl")
    for row in history:  # of a prompt's key, the id
        row["prompts"] = {key.split()[0]: counts for key, counts in row["prompts"].items()}
    assert history == expected and len(history) == 6
    assert all(set(row["prompts"]) == {"1", "2", "3"} for row in history)
    assert all(sum(shown for _, shown in row["prompts"].values()) == 64 for row in history)


def stream_lengths(run: Path) -> list[set[int]]:
    """Lengths of the streams of each step's mini-batches on one device."""
    recipe, steps = config.load(run / "recipe.toml"), []
    layout = layout_of(recipe, hf.read_config(Path(recipe.model.path)))
    for step in range(len(rollout_files(run))):
        rows = rollout_rows(run, step)
        steps.append(set[int]())
        for half in (rows[:32], rows[32:]):
            groups = [{row["reward"] for row in half[i : i + 8]} for i in range(0, 32, 8)]
            kept = [i for i in range(32) if len(groups[i // 8]) > 1]
            placement = lay_out([3] * 32, [row["tokens"] for row in half], 1, layout, kept)
            steps[-1].add(placement.shape[2])
    return steps


def test_nothing_is_compiled_after_the_first_step_though_streams_differ(uninterrupted: Path) -> None:
    rows = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    compilations, lengths = [row["perf/compilations"] for row in rows], stream_lengths(uninterrupted)
    assert compilations[0] > 3 and compilations[1:] == [0] * 5
    assert len(lengths[0]) == 1 and set.union(*lengths) == {64, 128}


def test_the_time_to_the_first_step_is_reported_by_part(base: Path, tmp_path: Path) -> None:
    said = tiny_run.finish("train", tiny_run.write_recipe(tmp_path, base, **{"run.steps": 2}))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    parts = [rows[0][f"time/{name}"] for name in ("load", "open", "step")]
    assert min(parts) > 0 and 0.7 * rows[0]["time/first_step"] < sum(parts) < rows[0]["time/first_step"]
    assert rows[0]["time/compilation"] > 0 and all(
        row["time/compilation_wait"] < row["time/step"] for row in rows
    )
    assert not {"time/first_step", "time/load", "time/open", "time/compilation"} & set(rows[1])
    assert said.count(f"the first step ended after {rows[0]['time/first_step']:.1f} s: loading") == 1


def test_a_profile_has_the_phases(base: Path, tmp_path: Path) -> None:
    options = ("--profile", "2", "--quiet", "--log-level", "debug")
    said = tiny_run.finish("train", tiny_run.write_recipe(tmp_path, base, **{"run.steps": 4}), *options)
    assert "step 1/4" not in said and "the first step ended after" in said
    assert re.search(r"jax.* DEBUG ", said)
    (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    found = trace.read_bytes()
    assert all(phase.encode() in found for phase in PHASES)
    assert b"jit_update" in found or b"PjitFunction(update)" in found


def test_training_longer_learns_to_copy_and_benchmarks_show_it(base: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(f'[digits]\npath = "{tmp_path}/problems.jsonl"\nsamples = 64\n')
    changes = {"eval.benchmarks": str(tmp_path / "mine.toml"), "eval.every": 20, "eval.max_tokens": 12}
    recipe = tiny_run.write_recipe(tmp_path, base, **{"run.steps": 30, "checkpoint.every": 30} | changes)
    tiny_run.finish("train", recipe)
    folder = tmp_path / "run" / "eval" / "benchmarks"
    results = [json.loads(path.read_text()) for path in sorted(folder.iterdir())]
    assert [(r["step"], r["max_tokens"]) for r in results] == [(0, 12), (20, 12), (30, 12)]
    evaluated = {r["step"]: {"eval/digits/pass@1": r["benchmarks"]["digits"]["pass@1"]} for r in results}
    assert tiny_run.evaluations(tmp_path / "run") == evaluated
    rows = tiny_run.metrics(tmp_path / "run")
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 30  # steps
    accuracy = [row["reward/accuracy"] for row in rows]
    assert np.mean(accuracy[:3]) < 0.6 and np.mean(accuracy[-5:]) > 0.9
    near = (rows[:2], rows[19:22], rows[-2:])  # the first step moves nothing
    for result, trained_rows in zip(results, near, strict=True):
        digits = result["benchmarks"]["digits"]
        assert digits["samples"] == 64
        trained = np.mean([row["reward/accuracy"] for row in trained_rows])
        assert digits["pass@1"] == pytest.approx(trained, abs=0.15)  # of 192 answers, and of 128 and more
    assert results[-1]["average"]["pass@1"] > results[0]["average"]["pass@1"] + 0.3
    last = folder / "step_000030.json"
    last.unlink()
    tiny_run.finish("train", recipe)  # what is missing is made up for, the rest is kept
    assert last.exists() and len(list(folder.iterdir())) == 3
    assert tiny_run.evaluations(tmp_path / "run") == evaluated


def with_held_out(folder: Path, base: Path, **overrides: object) -> Path:
    """A recipe that evaluates every 2 steps on three problems."""
    rows = [{"problem": d, "answer": d} for d in "012"]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"eval.path": str(folder / "held_out.jsonl"), "eval.every": 2, "eval.samples": 4}
    return tiny_run.write_recipe(folder, base, **own | overrides)


def train_here(recipe: Path, load: LoadEvaluation = in_training.load, **overrides: int) -> list[str]:
    """Trains in this process; returns what was said."""
    lines = list[str]()
    options = [
        text for key, value in overrides.items() for text in (f"--{key.replace('_', '.')}", str(value))
    ]
    train(config.load(recipe, options), load, lines.append)
    return lines


@pytest.mark.slow
def test_a_run_in_another_thread_trains(base: Path, tmp_path: Path) -> None:
    """As in a web server or a notebook's worker; Python takes signals in the main thread alone."""
    recipe = tiny_run.write_recipe(tmp_path, base, **{"run.steps": 1})
    with ThreadPoolExecutor(1) as pool:
        pool.submit(train_here, recipe).result(300)
    assert len(tiny_run.metrics(tmp_path / "run")) == 1


def test_an_owed_evaluation_is_made_on_the_restart(base: Path, tmp_path: Path) -> None:
    recipe, results = with_held_out(tmp_path, base, **{"run.steps": 2}), tmp_path / "run" / "eval"
    train_here(recipe)
    last, names = results / "step_000002.json", ["step_000000.json", "step_000002.json"]
    assert [path.name for path in sorted(results.iterdir())] == names
    before = last.read_bytes()
    last.unlink()  # as if a kill had come before it
    assert "raise run.steps" not in train_here(recipe)[-1]
    assert last.read_bytes() == before
    assert "raise run.steps" in train_here(recipe)[-1]
    # of other settings: neither believed nor lost
    train_here(recipe, eval_samples=3)
    assert json.loads(last.read_bytes())["samples"] == 3
    assert (results / "other" / last.name).read_bytes() == before


def test_an_evaluation_of_another_run_is_not_this_ones(base: Path, tmp_path: Path) -> None:
    recipe, results = with_held_out(tmp_path, base, **{"run.steps": 0}), tmp_path / "run" / "eval"
    train_here(recipe)
    before = (results / "step_000000.json").read_bytes()
    assert "is of another run or other settings" in train_here(recipe, run_seed=1 << 63)[-1]
    assert (results / "other" / "step_000000.json").read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_in_an_evaluation_ends_there(base: Path, tmp_path: Path, number: int) -> None:
    class Endless:
        def __call__(self, run: Run, steps: int) -> None:
            if steps == 2:
                os.kill(os.getpid(), number)
                time.sleep(300)

        def missing(self, setup: Setup, steps: int) -> bool:
            return True

    recipe, run = with_held_out(tmp_path, base, **{"checkpoint.every": 100}), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
        train_here(recipe, lambda *_: Endless())
    assert [row["step"] for row in tiny_run.metrics(run)] == [0, 1]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["2"]


def test_a_run_of_no_steps_is_evaluated_and_ends(base: Path, tmp_path: Path) -> None:
    train_here(with_held_out(tmp_path, base, **{"run.steps": 0}))
    result = json.loads((tmp_path / "run" / "eval" / "step_000000.json").read_text())
    assert (result["problems"], result["samples"]) == (3, 4)
    assert tiny_run.evaluations(tmp_path / "run") == {0: {"eval/held_out/pass@1": result["accuracy"]}}
    assert tiny_run.metrics(tmp_path / "run") == []


def test_an_evaluation_that_nobody_does_is_refused(base: Path, tmp_path: Path) -> None:
    recipe = tiny_run.write_recipe(tmp_path, base, **{"eval.every": 1, "eval.path": "held_out.jsonl"})
    with pytest.raises(InputError, match=r"eval.every = 1, and nothing evaluates"):
        train(config.load(recipe))


def test_a_finished_run_says_so(uninterrupted: Path) -> None:
    assert "raise run.steps" in tiny_run.finish("train", uninterrupted / "recipe.toml")


def test_another_recipe_is_refused_with_the_key(uninterrupted: Path) -> None:
    changes = ["--loss.clip-high", "0.3", "--run.steps", "9"]
    process = tiny_run.jaxrl("train", uninterrupted / "recipe.toml", *changes)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert "loss.clip_high: 0.28 -> 0.3" in output and "run.steps:" not in output
    assert "Traceback" not in output


def kill_when(seen: Callable[[], bool], number: int, *args: object) -> int:
    """Runs jaxrl until `seen`, then sends it the signal; returns its exit code."""
    process = tiny_run.jaxrl(*args)
    deadline = time.monotonic() + 300
    while not seen() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(number)
    process.communicate(timeout=120)
    return process.returncode


def interrupt(run: Path, point: str, number: int, recipe: Path) -> int:
    """Starts a run anew until the signal comes before its end, as it does but seldom not; returns the exit code."""
    for _ in range(5):
        if code := kill_when(kill_points(run)[point], number, "train", recipe):
            return code
        shutil.rmtree(run)
    return 0


def kill_points(run: Path) -> dict[str, Callable[[], bool]]:
    def lines() -> int:
        path = run / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    return {
        "before the first step": lambda: (run / "recipe.toml").exists(),
        "after one step": lambda: lines() >= 1,
        "while the first checkpoint is written": lambda: any(run.glob("checkpoints/*tmp*")),
        "in the middle": lambda: (run / "checkpoints" / "2").exists() and lines() >= 3,
        "while the last checkpoint is written": lambda: any(run.glob("checkpoints/6*tmp*")),
    }


@pytest.mark.slow
def test_kill_9_at_many_points_changes_no_bit(uninterrupted: Path, base: Path, tmp_path: Path) -> None:
    recipe, run = tiny_run.write_recipe(tmp_path, base), tmp_path / "run"
    codes = {
        name: kill_when(seen, signal.SIGKILL, "train", recipe) for name, seen in kill_points(run).items()
    }
    assert list(codes.values()).count(-signal.SIGKILL) >= 4, codes  # the last may have been too fast to hit
    tiny_run.finish("train", recipe)
    assert_same_run(run, uninterrupted, tmp_path)


def test_kill_9_once_changes_no_bit(uninterrupted: Path, base: Path, tmp_path: Path) -> None:
    recipe, run = tiny_run.write_recipe(tmp_path, base), tmp_path / "run"
    assert interrupt(run, "in the middle", signal.SIGKILL, recipe) == -signal.SIGKILL
    assert "going on from step" in tiny_run.finish("train", recipe)
    assert_same_run(run, uninterrupted, tmp_path)


def test_ctrl_c_saves_the_step_and_goes_on_from_it(uninterrupted: Path, base: Path, tmp_path: Path) -> None:
    recipe = tiny_run.write_recipe(tmp_path, base, **{"checkpoint.every": 100})
    run = tmp_path / "run"
    assert interrupt(run, "after one step", signal.SIGINT, recipe) == 130
    assert "going on from step" in tiny_run.finish("train", recipe)
    assert_same_run(run, uninterrupted, tmp_path)


def test_a_closed_terminal_saves_the_step_too(uninterrupted: Path, base: Path, tmp_path: Path) -> None:
    recipe = tiny_run.write_recipe(tmp_path, base, **{"checkpoint.every": 100})
    run = tmp_path / "run"
    assert interrupt(run, "after one step", signal.SIGHUP, recipe) == TRY_AGAIN
    assert "going on from step" in tiny_run.finish("train", recipe)
    assert optimizer_bytes(run) == optimizer_bytes(uninterrupted)


def assert_same_run(run: Path, reference: Path, tmp_path: Path) -> None:
    assert tiny_run.metrics(run) == tiny_run.metrics(reference)
    ours, theirs = tiny_run.weights(run, tmp_path / "a"), tiny_run.weights(reference, tmp_path / "b")
    assert all((a == b).all() for a, b in zip(ours, theirs, strict=True))
    assert optimizer_bytes(run) == optimizer_bytes(reference)


def test_a_torn_last_checkpoint_is_said_and_the_one_before_it_used(
    uninterrupted: Path, base: Path, tmp_path: Path
) -> None:
    recipe = tiny_run.write_recipe(tmp_path, base)
    tiny_run.finish("train", recipe, "--run.steps", 4)
    newest = tmp_path / "run" / "checkpoints" / "4"
    for file in (newest / "params").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            os.truncate(file, file.stat().st_size // 2)
    said = tiny_run.finish("train", recipe)
    assert f"{newest} is damaged" in said and "going on from step 2" in said
    assert optimizer_bytes(tmp_path / "run") == optimizer_bytes(uninterrupted)


def test_a_stop_of_another_process_does_not_make_the_next_signal_the_second(
    capsys: pytest.CaptureFixture,
) -> None:
    with graceful_stop(print) as stop:
        stop.arm()
        os.kill(os.getpid(), PEER)
        assert stop.asked
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), PEER)
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), PEER)  # one that is late ends nothing
    assert capsys.readouterr().out.count("finishing this step") == 1


def test_an_interrupt_where_nothing_can_be_raised_is_raised_later(capsys: pytest.CaptureFixture) -> None:
    asked = []

    def in_the_garbage_collector(phase: str, _: object) -> None:
        if not asked:
            asked.append(phase)
            os.kill(os.getpid(), signal.SIGINT)
            sum(range(1000))  # where Python looks for signals

    with pytest.raises(KeyboardInterrupt), graceful_stop(print) as stop:
        gc.callbacks.append(in_the_garbage_collector)
        try:
            gc.collect()
        finally:
            gc.callbacks.remove(in_the_garbage_collector)
        assert stop.asked
        stop.arm()
    assert asked and capsys.readouterr() == ("", "")
