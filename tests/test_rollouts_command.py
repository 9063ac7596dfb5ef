"""`jaxrl rollouts`: the answers of a step, as text that commands no terminal."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from jaxrl import cli
from jaxrl.errors import BAD_INPUT
from jaxrl.telemetry.rollouts import read_rollouts, rollout_files, write_rollouts
from jaxrl.types import Prompt, Rollout

HOSTILE = "\x1b]0;owned\x07[bold]:smile:[/bold]\r\x9b2J\u202e"
TEXTS = {1: "What is 1 + 1?", 2: HOSTILE, 3: "It is 3.", 4: "x" * 500 + "y" * 500}


def write_run(folder: Path, *steps: int) -> Path:
    """Two prompts of three answers each, of which the first is right, the second hostile and the third long."""
    prompts = [Prompt(name, np.array([1], np.int32), answer) for name, answer in (("a", "2"), ("b", "4"))]
    for step in steps:
        groups = [
            [
                Rollout(prompt, np.array([i], np.int32), np.float32([-0.25]), "stop", step, score, score / 2)
                for i, score in ((3, 1.0), (2, -1.0), (4, -1.0))
            ]
            for prompt in prompts
        ]
        write_rollouts(folder, step, groups, lambda ids: "".join(TEXTS[i] for i in ids.tolist()))
    return folder


def printed(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    cli.main(["rollouts", *map(str, args)])
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["rollouts", *map(str, args)])
    assert stop.value.code == BAD_INPUT
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and error.startswith("jaxrl: "), error
    return error


def samples(output: str) -> list[tuple[str, str, str]]:
    """(prompt, sample, outcome) of each answer that was printed."""
    found = re.findall(r"^sample (\d) of prompt (\w) · (right|wrong) · reward", output, re.MULTILINE)
    return [(prompt, sample, outcome) for sample, prompt, outcome in found]


def test_the_newest_step_is_shown_and_its_prompts_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path, 0, 9)
    output = printed(capsys, run, "--limit", 5)
    every = [(p, s, o) for p in "ab" for s, o in (("0", "right"), ("1", "wrong"), ("2", "wrong"))]
    assert samples(output) == every[:5]
    assert output.count("What is 1 + 1?") == 2 and output.count("prompt a · reference answer 2\n") == 1
    assert "reward 0.5 · ended after 1 tokens · mean log-prob -0.250 · model version 9\nIt is 3.\n" in output
    assert output.endswith(
        "\n5 of 6 answers in step 10 (step_000009.parquet, 6 answers); --limit 6 shows all\n"
    )
    assert len(samples(printed(capsys, run))) == 3
    assert "in step 1 (step_000000.parquet" in printed(capsys, run, "--step", 1)
    assert samples(printed(capsys, run, "--limit", 0)) == every


def test_answers_are_chosen_by_outcome_and_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, 0)
    assert samples(printed(capsys, run, "--right")) == [("a", "0", "right"), ("b", "0", "right")]
    output = printed(capsys, run, "--wrong", "--prompt", "b")
    assert samples(output) == [("b", "1", "wrong"), ("b", "2", "wrong")]
    assert output.endswith("\n2 of 2 wrong answers to prompt b in step 1 (step_000000.parquet, 6 answers)\n")
    with pytest.raises(SystemExit):
        cli.main(["rollouts", str(run), "--wrong", "--right"])


def test_long_answers_are_cut_in_the_middle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, 0)
    output = printed(capsys, run, "--limit", 0, "--characters", 101)
    assert output.count("\n" + "x" * 51 + "\n[... 899 characters ...]\n" + "y" * 50 + "\n") == 2
    assert printed(capsys, run, "--limit", 0, "--characters", 0).count(TEXTS[4]) == 2


@pytest.mark.parametrize("terminal", [False, True])
def test_an_answer_commands_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
    output = printed(capsys, write_run(tmp_path, 0), "--wrong", "--characters", 0)
    styles = re.findall(r"\x1b\[[0-9;]*m", output)
    assert bool(styles) == terminal
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output)
    assert r"\x1b]0;owned\x07[bold]:smile:[/bold]\r\x9b2J\u202e" in plain
    assert TEXTS[4] in plain  # no line is broken
    assert all(c.isprintable() or c == "\n" for c in plain)


def test_lines_of_older_runs_and_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, 0, 1)
    old, new = rollout_files(run)
    lines = [json.dumps(row) + "\n" for row in read_rollouts(old, 10**9)]
    old.unlink()
    old.with_suffix(".jsonl").write_text("".join([*lines[:2], "{\n", *lines[2:]]))
    output = printed(capsys, run, "--step", 1, "--right")
    assert samples(output) == [("a", "0", "right"), ("b", "0", "right")]
    assert output.endswith("(step_000000.jsonl, 6 answers); 1 damaged lines or files are left out\n")
    new.write_bytes(new.read_bytes()[:-9])
    assert printed(capsys, run).startswith("0 of 0 answers in step 2 ")


def test_what_is_not_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no stored rollouts; give the folder of a run" in refused(capsys, tmp_path)
    run = write_run(tmp_path, 3, 4)
    assert "no stored rollouts of step 4000 (--step); there are 2 steps from 4 to 5" in refused(
        capsys, run, "--step", 4000
    )
    assert "has no prompt 'c' (--prompt); there are: a, b" in refused(capsys, run, "--prompt", "c")
    assert "--limit and --characters" in refused(capsys, run, "--limit", -1)
