"""`jaxrl eval --benchmarks` as a user has it: a tiny random model, the in-process sampler, a judge over HTTP."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from test_judge import Endpoint

import tiny_run
from evals import command as eval_command
from evals import grade
from jaxrl import cli, exports
from jaxrl.types import JsonObject

SAMPLES = 40
OPTIONS = ("--data.suffix", "", "--model.dtype", "float32", "--rollout.max-tokens", 8, "--rollout.slots", 8)


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    digits = [{"problem": d, "answer": d} for d in "012"]
    pairs = [
        {"prompt": [{"role": "user", "content": d}], "reward_model": {"ground_truth": f"\\boxed{{{d}}}"}}
        for d in ("01", "12")
    ]
    toml = folder / "mine.toml"
    text = ""
    for name, rows in (("digits", digits), ("pairs", pairs)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        text += f'[{name}]\npath = "{path}"\nproblems = {len(rows)}\nsamples = {SAMPLES}\n'
    toml.write_text(text)
    return toml


@pytest.fixture(scope="module")
def whole(base: Path, mine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    cli.main(list(map(str, ["eval", base, "--benchmarks", mine, "--out", out, *OPTIONS])))
    return out


def rows(path: Path) -> list[JsonObject]:
    """All rows but one that is being written."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def by_sample(path: Path) -> dict[tuple[int, int], JsonObject]:
    found = {(row["problem"], row["sample"]): row for row in rows(path)}
    assert len(found) == len(rows(path))  # nothing twice
    return found


def test_the_files_have_the_grades_of_all_responses(base: Path, whole: Path) -> None:
    results = json.loads((whole / "results.json").read_text())
    settings = results["settings"]
    assert (settings["temperature"], settings["top_p"], settings["max_tokens"]) == (0.7, 0.9, 8)
    found = results["benchmarks"]["digits"]
    made = by_sample(whole / "digits.jsonl")
    assert sorted(made) == [(p, g) for p in range(3) for g in range(SAMPLES)]
    right = [grade(row["response"], row["answer"]) for row in made.values()]
    accuracy, (low, high) = found["rule"]["pass@1"], found["rule"]["ci95"]
    assert accuracy == pytest.approx(sum(right) / len(right)) and 0.2 < accuracy < 1
    assert low <= accuracy <= high
    assert list(found["rule"]["pass@k"]) == ["1", "2", "4", "8", "16", "32", "40"]
    assert found["length_mean"] == pytest.approx(sum(row["tokens"] for row in made.values()) / len(made))
    assert found["rule+model"] is None and found["judge"] is None
    grades = by_sample(whole / "digits.scores.jsonl")
    for key, row in made.items():
        assert grades[key]["rule"] is grade(row["response"], row["answer"])
        assert grades[key]["corrected"] is grade(row["response"], row["answer"], "corrected")
    true = [row["corrected"] for row in grades.values()]
    assert found["corrected"]["pass@1"] == pytest.approx(sum(true) / len(true))
    assert results["average"]["corrected"]["pass@1"] > 0
    accuracies = [b["rule"]["pass@1"] for b in results["benchmarks"].values()]
    assert results["average"]["rule"]["pass@1"] == pytest.approx(sum(accuracies) / 2)
    table = (whole / "results.md").read_text()
    assert "Temperature 0.7, top-p 0.9, at most 8 tokens, seed 1, protocol default." in table
    assert f"{100 * accuracy:.2f} (" in table and "rule + model | - | - | - |" in table
    assert (whole / "results.png").stat().st_size > 1000


def test_a_killed_evaluation_goes_on_and_ends_the_same(
    base: Path, mine: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["eval", base, "--benchmarks", mine, "--out", out, *OPTIONS, "--rollout.slots", 4]
    process = tiny_run.jaxrl(*command)
    path = out / "digits.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < 10:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.kill()
    process.wait()
    before = path.read_text().rpartition("\n")[0]
    if len(rows_before := before.splitlines()) == 3 * SAMPLES:
        pytest.skip("this machine was too quick")
    assert len(rows_before) >= 10
    cli.main(list(map(str, command)))
    assert path.read_text().startswith(before)  # kept as it was, the others after it
    for name in ("digits", "pairs"):
        assert by_sample(out / f"{name}.jsonl") == by_sample(whole / f"{name}.jsonl")
    stamp = path.stat().st_mtime_ns
    cli.main(list(map(str, command)))
    assert path.stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("config.json", {"rms_norm_eps": 1e-5}, "of config ="),
        ("tokenizer_config.json", {"clean_up_tokenization_spaces": True}, "of tokenizer ="),
        ("generation_config.json", {"eos_token_id": [1, 4]}, "of stop_ids ="),
    ],
)
def test_responses_of_another_model_folder_are_not_mixed_in(
    base: Path,
    mine: Path,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    change: JsonObject,
    said: str,
) -> None:
    """Its weights and the prompts' tokens are the same."""
    model = tmp_path / "model"
    shutil.copytree(base, model)
    (model / name).write_text(json.dumps(json.loads((model / name).read_text()) | change))
    assert said in refused(capsys, "eval", model, "--benchmarks", mine, "--out", whole, *OPTIONS)


def test_what_older_settings_do_not_name_is_not_taken_for_granted(
    base: Path, mine: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    settings = json.loads((out / "settings.json").read_text())
    command = ("eval", base, "--benchmarks", mine, "--out", out, *OPTIONS)
    older = {name: value for name, value in settings.items() if name not in ("top_k", "vllm_options")}
    newer = {name: older.pop(name) for name in ("config", "stop_ids")}
    (out / "settings.json").write_text(json.dumps(older))
    error = refused(capsys, *command)
    added = json.loads(f"{{{error.rpartition(', add ')[2]}}}")
    assert added == newer and "without stop_ids, config, so" in error
    (out / "settings.json").write_text(json.dumps(older | added))
    cli.main(list(map(str, command)))
    assert json.loads((out / "settings.json").read_text()) == settings


def test_options_of_servers_are_settings_but_for_their_memory(
    base: Path, mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("eval", base, "--benchmarks", mine, "--out", tmp_path, *OPTIONS, "--servers", 1)
    program = tmp_path / "vllm"
    program.write_text('#!/bin/sh\ntest "$1" = --version && echo 0.32.0+cpu\n')
    program.chmod(0o755)
    command += ("--sampler.vllm", program)
    for options, said in (
        ("--gpu-memory-utilization=0.9", "the vLLM server stopped"),
        ("--gpu-memory-utilization 0.5 --max-num-seqs 8", "the vLLM server stopped"),
        ("--kv-cache-dtype fp8 --max-num-seqs 8", "of vllm_options = none, not --kv-cache-dtype fp8;"),
    ):
        assert said in refused(capsys, *command, f"--sampler.vllm-options={options}")


def test_other_settings_are_not_mixed_in(
    base: Path, mine: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for change, said in (
        (["--run.seed", 2], "seed = 1, not 2"),
        (["--eval.temperature", 1.0], "temperature = 0.7, not 1.0"),
        (["--data.suffix", "1"], "digits are to other prompts"),
        (["--protocol", "justrl_released"], "protocol = default, not justrl_released"),
    ):
        assert said in refused(capsys, "eval", base, "--benchmarks", mine, "--out", whole, *OPTIONS, *change)


def test_the_judge_reads_what_the_rules_refuse(
    base: Path,
    mine: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("evals.judge.time.sleep", lambda _: None)
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("{question}|{gold_answer}|{llm_response}|\nREPLY {gold_answer}")
    with Endpoint() as endpoint:
        threading.Thread(target=endpoint.serve_forever, args=(0.02,), daemon=True).start()
        endpoint.replies = {"0": "B", "1": "A", "2": "C"}  # of the problem's answer
        out = tmp_path / "out"
        command = ["eval", base, "--benchmarks", mine, "--out", out, *OPTIONS, "--samples", 8]
        command += ["--judge", endpoint.url, "--judge-prompt", prompt]
        endpoint.fail = 10**9
        cli.main(list(map(str, command)))
        assert "the same command asks for the rest" in capsys.readouterr().out
        results = json.loads((out / "results.json").read_text())["benchmarks"]["digits"]
        rule, pending = results["rule"], results["judge"]["pending"]
        assert results["rule+model"] is None and pending > 0
        endpoint.fail = 0
        cli.main(list(map(str, command)))
        results = json.loads((out / "results.json").read_text())
        found = results["benchmarks"]["digits"]
        assert found["rule"] == rule
        assert "pending" not in found["judge"] and sum(found["judge"].values()) == pending
        grades = by_sample(out / "digits.scores.jsonl")
        made = by_sample(out / "digits.jsonl")
        for (p, g), row in grades.items():
            cut = made[p, g]["finish_reason"] == "length"
            assert row["judge"] == ("" if row["rule"] else "C" if cut or p == 2 else "BA"[p])
        both = [row["rule"] or row["judge"] == "A" for row in grades.values()]
        assert found["rule+model"]["pass@1"] == pytest.approx(sum(both) / len(both))
        assert found["rule+model"]["pass@1"] > rule["pass@1"]
        asked = len(endpoint.asked)
        cli.main(list(map(str, command)))
        assert len(endpoint.asked) == asked
        endpoint.shutdown()


def test_the_released_protocol_keeps_its_random_seed(base: Path, mine: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["eval", base, "--benchmarks", mine, "--out", out, *OPTIONS, "--samples", 4]
    cli.main(list(map(str, [*command, "--protocol", "justrl_released"])))
    results = json.loads((out / "results.json").read_text())
    seed, released = results["settings"]["seed"], results["benchmarks"]["digits"]["released"]
    assert seed != 1 and released["avg_output_length"] == 0
    assert released["mean_score"] == results["benchmarks"]["digits"]["rule"]["pass@1"]
    cli.main(list(map(str, [*command, "--protocol", "justrl_released"])))  # goes on with its seed
    assert json.loads((out / "settings.json").read_text())["seed"] == seed


def test_greedy_is_one_sample(base: Path, mine: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = [*OPTIONS, "--eval.temperature", 0.0, "--eval.problems", 2]
    cli.main(list(map(str, ["eval", base, "--benchmarks", mine, "--out", out, *options])))
    assert sorted(by_sample(out / "digits.jsonl")) == [(0, 0), (1, 0)]


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in args])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and error.startswith("jaxrl: "), error
    return error


def test_commands_that_cannot_be(
    base: Path, mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = ("eval", base, "--benchmarks", mine, "--out", tmp_path / "out")
    too_long = refused(capsys, *here, *OPTIONS, "--rollout.max-tokens", 61)
    assert "set --rollout.max-tokens to 60 or less" in too_long
    assert "give one of them" in refused(capsys, *here, "--recipe", "x.toml")
    assert "add --benchmarks" in refused(capsys, "eval", base, "--judge", "http://localhost")
    assert "--samples" in refused(capsys, *here, "--eval.samples", 3)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    assert "chat_template" not in settings or settings.pop("chat_template")
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in base.iterdir():
        if file.is_file() and "chat_template" not in file.name:
            (bare / file.name).write_bytes(file.read_bytes())
    (bare / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "no chat template" in refused(capsys, "eval", bare, "--benchmarks", mine, "--out", tmp_path / "x")


def test_a_run_and_a_checkpoint_are_exported_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "20").mkdir(parents=True)
    exported: list[tuple[Path, Path]] = []

    def write(source: Path, folder: Path) -> int:
        exported.append((source, folder))
        return 40

    monkeypatch.setattr(exports, "export", write)
    assert eval_command._model_of(str(run), None) == (run / "hf", run / "benchmarks" / "step_000040")
    here = run / "benchmarks" / "step_000020"
    eval_command._model_of(str(run / "checkpoints" / "20"), str(tmp_path / "out"))
    assert exported == [(run, run / "hf"), (run / "checkpoints" / "20", here / "hf")]
    assert eval_command._model_of(str(tmp_path), None) == (tmp_path, Path("runs/benchmarks") / tmp_path.name)
    assert len(exported) == 2


def test_two_evaluations_do_not_share_a_folder(
    base: Path, mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        error = refused(capsys, "eval", base, "--benchmarks", mine, "--out", tmp_path / "out", *OPTIONS)
        assert "another evaluation" in error


@pytest.mark.vllm
@pytest.mark.slow
def test_servers_give_the_answers_of_the_local_sampler(mine: Path, tmp_path: Path) -> None:
    """Killed and gone on, several calls at one time; greedy answers are those of the in-process sampler."""
    base = tiny_run.make_base(tmp_path / "base", head_dim=32)  # vLLM on a CPU has no smaller one
    here = ["eval", base, "--benchmarks", mine, *OPTIONS]
    there = [*here, "--servers", 1, "--sampler.vllm", os.environ.get("VLLM", ".venv-vllm/bin/vllm")]
    out = tmp_path / "sampled"
    process = tiny_run.jaxrl(*there, "--out", out, "--sampler.concurrency", 4)
    while not (out / "digits.jsonl").exists() or len(rows(out / "digits.jsonl")) < 10:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.kill()
    process.wait()
    made = len((out / "digits.jsonl").read_text().splitlines())
    assert made < 3 * SAMPLES
    cli.main(list(map(str, [*there, "--out", out])))
    assert len(by_sample(out / "digits.jsonl")) == 3 * SAMPLES
    for command, name in ((here, "local"), (there, "servers")):
        cli.main(list(map(str, [*command, "--out", tmp_path / name, "--eval.temperature", 0.0])))
    for name in ("digits", "pairs"):
        local, served = (by_sample(tmp_path / where / f"{name}.jsonl") for where in ("local", "servers"))
        assert local == served


@pytest.mark.parametrize(
    ("program", "message"),
    [("no-such-vllm", "no-such-vllm: no such program"), ("/bin/false", "the vLLM server stopped")],
)
def test_a_judge_that_cannot_be_started_costs_no_grades(
    program: str, message: str, base: Path, mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", base, "--benchmarks", mine, "--out", tmp_path, "--samples", 2, *OPTIONS]
    with pytest.raises(SystemExit, match=r"2|75"):
        cli.main(list(map(str, [*command, "--judge", base, "--sampler.vllm", program])))
    assert message in (said := capsys.readouterr().err) and "grades by rule are kept" in said
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["judge"] is None and results["benchmarks"]["digits"]["rule"]["pass@1"] >= 0
    assert results["benchmarks"]["digits"]["rule+model"] is None


@pytest.mark.vllm
@pytest.mark.slow
def test_a_judge_is_started_from_its_weights(base: Path, mine: Path, tmp_path: Path) -> None:
    """The judge is a tiny model too: its replies have no label, but it is asked, in its own words, and replies."""
    model = tiny_run.make_base(tmp_path / "judge", head_dim=32)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    (tmp_path / "prompt").write_text("{question}{gold_answer}{llm_response}")
    out, vllm = tmp_path / "out", os.environ.get("VLLM", ".venv-vllm/bin/vllm")
    command = ["eval", base, "--benchmarks", mine, "--out", out, "--samples", 4, *OPTIONS]
    command += ["--sampler.vllm", vllm]
    cli.main(list(map(str, [*command, "--judge", model, "--judge-prompt", tmp_path / "prompt"])))
    results = json.loads((out / "results.json").read_text())
    assert results["judge"]["model"] == str(model)
    replies = [row["reply"] for row in rows(out / "judge.jsonl")]
    assert replies and all("boxed" in reply for reply in replies)
    digits = results["benchmarks"]["digits"]
    assert set(digits["judge"]) == {"no label"} and digits["rule+model"]["pass@1"] == digits["rule"]["pass@1"]
