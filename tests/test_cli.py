"""The command line as a new user meets it: one clear line, the right exit code, nothing lost."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny_run
from faults import permissions_bind
from jaxrl import cli, config
from jaxrl.config import hints
from jaxrl.config.named import FOLDER as RECIPES
from jaxrl.errors import BAD_INPUT, InputError


def refused(capsys: pytest.CaptureFixture[str], *args: object, status: int = BAD_INPUT) -> str:
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in args])
    assert stop.value.code == status
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and error.startswith("jaxrl: "), error
    return error


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model.path", "nowhere/at/all", "no such model folder"),
        ("data.path", "missing.jsonl", "no such file"),
        ("data.problem_column", "question", "question"),
        ("data.answer_column", "solution", "solution"),
        ("eval.every", 5, "eval.path"),
    ],
)
def test_bad_recipe_values(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: object, said: str
) -> None:
    recipe = tiny_run.write_recipe(tmp_path, base)
    section, name = key.split(".")
    text = recipe.read_text().replace(f"[{section}]\n", f"[{section}]\n{name} = {json.dumps(value)}\n")
    lines, seen = [], set()
    for line in text.splitlines():  # the new value stands first; drop the old one of the same key
        header = line if line.startswith("[") else None
        seen = set() if header else seen
        entry = line.split(" = ")[0]
        if header or entry not in seen:
            lines.append(line)
        seen.add(entry)
    recipe.write_text("\n".join(lines))
    assert said in refused(capsys, "train", recipe)


def test_damaged_model(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    recipe = tiny_run.write_recipe(tmp_path, broken)
    assert "model.safetensors" in refused(capsys, "train", recipe)
    settings = json.loads((broken / "config.json").read_text()) | {"model_type": "mamba"}
    (broken / "config.json").write_text(json.dumps(settings))
    assert "mamba" in refused(capsys, "train", recipe)


def test_bad_data(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny_run.write_recipe(tmp_path, base)
    problems = tmp_path / "problems.jsonl"
    problems.write_text("")
    assert "no rows" in refused(capsys, "train", recipe)
    problems.write_text('{"problem": "1", "answer": "1"}\n{"problem": "2", "answer": null}\n')
    assert "problems.jsonl:2" in refused(capsys, "train", recipe)


def test_commands_that_need_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "neither a run folder nor a checkpoint" in refused(capsys, "export", tmp_path)
    assert "no metrics" in refused(capsys, "report", tmp_path)
    assert "--recipe" in refused(capsys, "eval", tmp_path)
    assert "cannot read the recipe" in refused(capsys, "train", tmp_path / "recipe.toml")


@pytest.mark.parametrize(
    "option, meant",
    [
        (["--learning_rate", "1e-5"], "did you mean --optimizer.learning_rate?"),
        (["--stepz=3"], "did you mean --run.steps?"),
        (["--samples", "3"], "did you mean --rollout.samples or --eval.samples?"),
        (["--num-generations", "4"], "did you mean --rollout.samples?"),
        (["--actor_rollout_ref.rollout.n=8"], "did you mean --rollout.samples?"),
        (["--report_to", "wandb"], "did you mean --run.trackers?"),
        (["rollout.samples=4"], "an option begins with --: --rollout.samples 4"),
        (["--run.steps", "3", "--nonsense"], "jaxrl train RECIPE --help lists them all"),
    ],
)
def test_options_of_other_libraries_are_explained(
    option: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, "plan", "demo", *option)
    assert line.endswith(meant)


def test_every_hint_is_a_key() -> None:
    assert set(hints.ELSEWHERE.values()) <= set(config.flat(config.Recipe()))
    assert all(hints.misnamed([f"--{key}", "x=1"], [key]) is None for key in config.flat(config.Recipe()))


def test_help_lists_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    options = ("--rollout.samples", "--loss.clip-high", "--eval.every", "--samplers", "--profile", "--quiet")
    assert all(option in shown for option in options)


def test_export_reads_one_checkpoint_or_the_newest(base: Path, tmp_path: Path) -> None:
    recipe, run = tiny_run.write_recipe(tmp_path, base, **{"run.steps": 4}), tmp_path / "run"
    assert tiny_run.jaxrl("train", recipe).wait(300) == 0
    for source, out in ((run, "newest"), (run / "checkpoints" / "2", "second")):
        process = tiny_run.jaxrl("export", source, tmp_path / out, "--dtype", "float32")
        output, _ = process.communicate(timeout=120)
        assert f"step {4 if out == 'newest' else 2} of" in output
    read = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("newest", "second")]
    assert read[0] != read[1]
    assert (tmp_path / "newest" / "tokenizer.json").exists()


def test_a_failed_checkpoint_write_ends_in_one_line_and_the_run_goes_on_later(
    base: Path, tmp_path: Path
) -> None:
    recipe = tiny_run.write_recipe(tmp_path, base)
    # files over 8 KiB cannot be written, as on a disk that fills up: arrays fail, logs do not
    process = tiny_run.jaxrl("train", recipe, "--run.rollouts-every", "0", largest_file=8)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == BAD_INPUT, output
    assert re.findall("^jaxrl: .*", output, re.MULTILINE) == [
        f"jaxrl: {tmp_path}/run/checkpoints: cannot be written (File too large; there is no older checkpoint); make "
        "room, also for new files, and give the same command again"
    ]
    assert "Traceback" not in output
    process = tiny_run.jaxrl("train", recipe)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def test_a_full_disk_is_noticed_before_anything_is_written(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    error = refused(capsys, "train", tiny_run.write_recipe(tmp_path, base))
    assert "MB are free" in error and "there is no older checkpoint" in error
    assert not any((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("moment", ["loading", "sampling"])
def test_interrupted_early_it_says_so(base: Path, tmp_path: Path, moment: str) -> None:
    process = tiny_run.jaxrl("train", tiny_run.write_recipe(tmp_path, base))
    assert process.stdout is not None
    first = process.stdout.readline()  # the prompts have been read; the model and the compiler come next
    assert "3 prompts" in first
    if moment == "sampling":
        while not (tmp_path / "run" / "recipe.toml").exists():
            time.sleep(0.01)
        time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "Traceback" not in output


def test_commands_come_from_entry_points(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    commands = [line.split()[0] for line in lines if re.match(r" {4}\w", line)]
    assert commands == [
        "train",
        "eval",
        "probe",
        "compare",
        "export",
        "check",
        "plan",
        "recipes",
        "report",
        "rollouts",
        "replay",
        "diagnose",
        "doctor",
        "completion",
    ]


def test_the_help_loads_no_library() -> None:
    code = """
import sys
from jaxrl import cli
try:
    cli.main(["--help"])
except SystemExit:
    heavy = {"numpy", "jax", "pydantic", "tyro", "rich", "httpx", "jaxrl.config.loading"}
    print(*heavy & {*sys.modules}, file=sys.stderr)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "train by a recipe" in ran.stdout and ran.stderr.strip() == ""


def test_a_start_warns_of_nothing(base: Path, tmp_path: Path) -> None:
    recipe = tiny_run.write_recipe(tmp_path, base, **{"run.steps": 1, "run.tensorboard": True})
    call = [sys.executable, "-m", "jaxrl.cli", "train", str(recipe)]
    ran = subprocess.run(call, capture_output=True, text=True, check=True, env=tiny_run.environment())
    assert ran.stderr == ""
    assert "arning" not in ran.stdout


def test_an_option_that_no_command_takes(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["export", "here"], ["report", "here"]):
        with pytest.raises(SystemExit) as stop:
            cli.main([*command, "--rollout.samples", "4"])
        assert stop.value.code == 2 and "unknown option --rollout.samples" in capsys.readouterr().err


def test_train_without_a_recipe_says_what_to_give(capsys: pytest.CaptureFixture[str]) -> None:
    assert "give a recipe" in refused(capsys, "train", "--run.steps=3")


@pytest.mark.parametrize(("path", "encoding"), [("/dev/full", "utf-8"), ("/dev/null", "latin-1")])
def test_what_cannot_be_shown_stops_no_run(path: str, encoding: str) -> None:
    with open(path, "w", encoding=encoding) as stream:  # noqa: PTH123  # as a shell opens it
        shown = cli._unfailing(stream)
        print("a stop id: <｜end▁of▁sentence｜>", file=shown, flush=True)
        shown.close()


def test_a_file_that_may_not_be_used_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    assert "metrics.jsonl: cannot be read (Is a directory); put that right" in refused(
        capsys, "report", tmp_path
    )
    (tmp_path / "checkpoints").mkdir(mode=0)
    with permissions_bind():
        error = refused(capsys, "check", tmp_path)
    assert f"{tmp_path}/checkpoints: cannot be read (Permission denied); put that right" in error


@types.coroutine
def pause() -> Iterator[None]:
    yield


@pytest.mark.parametrize(("file", "shown"), [("orbax/serialization.py", False), ("ours.py", True)])
def test_only_orbaxs_coroutines_fail_in_silence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, file: str, shown: bool
) -> None:
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    cli._quieten_orbax()
    code = "async def read():\n try: await pause()\n except GeneratorExit: raise ValueError('late') from None"
    names: dict[str, Any] = {"pause": pause}
    exec(compile(code, file, "exec"), names)
    coroutine = names["read"]()
    coroutine.send(None)
    del coroutine
    assert ("ValueError: late" in capsys.readouterr().err) == shown


def test_recipes_are_listed_shown_compared_and_given_by_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    cli.main(["recipes"])
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == len(list(RECIPES.glob("*.toml"))) >= 18
    assert any(line.startswith("polaris-1.7b ") and "temperature" in line for line in listed)
    cli.main(["recipes", "show", "polaris-1.7b"])
    assert capsys.readouterr().out == (RECIPES / "polaris-1.7b.toml").read_text()
    cli.main(["recipes", "diff", "deepscaler-1.5b", "fastcurl-1.5b-v3"])
    shown = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert re.search(
        r"8192 \| 16384 \| 24576 +8192 \| 16384 \| 24576 \| 16384 \| 16384", shown["rollout.max_tokens"]
    )
    assert "loss.clip_low" not in shown and "kl.coefficient" in shown
    cli.main(["recipes", "diff", "demo", str(RECIPES / "demo.toml")])
    assert capsys.readouterr().out.endswith("have the same values\n")
    assert config.load("demo") == config.load(RECIPES / "demo.toml")
    monkeypatch.chdir(tmp_path)
    Path("demo").write_text("[run]\nsteps = 7\n")  # a file here goes before a name
    assert config.load("demo").run.steps == 7
    with pytest.raises(
        InputError, match=r"^polaris: no file here, .* did you mean 'polaris-1\.7b'\? `jaxrl recipes`"
    ):
        config.load("polaris")
    with pytest.raises(InputError, match="cannot read the recipe"):
        config.load("recipes/polaris")


def test_a_reader_that_has_enough_is_no_traceback() -> None:
    line = f"{sys.executable} -m jaxrl.cli recipes show justrl-deepseek-1.5b | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line], env=tiny_run.environment(PYTHONUNBUFFERED="1"), capture_output=True, text=True
    )
    assert done.stderr == "" and done.stdout.strip() in ("0", "141"), done
