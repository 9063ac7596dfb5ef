"""Shares of a step that trainer and samplers idle, in turn and one batch ahead: `python -m benchmarks.overlap RUN`.

RUN is a folder of the demo (make demo RUN=RUN), whose recipe runs here for a few steps, with sampler.max_staleness 0
and 1 in turn. Two vLLM servers sample. Where trainer and servers share the same cores, as on one CPU, one batch ahead
leaves neither side idle but cannot be faster.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import shutil
import statistics
import tempfile
from pathlib import Path

import jax

from benchmarks.harness import write_results
from evals import in_training
from jaxrl import config
from jaxrl.loop import train
from jaxrl.sampling import servers
from jaxrl.types import JsonObject, silent

WARM_UP = 2  # steps of each run that are left out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder with base/ and train.jsonl of the demo")
    parser.add_argument("--recipe", default="recipes/demo.toml")
    parser.add_argument(
        "--steps", type=int, default=12, help=f"of each run; the first {WARM_UP} are left out"
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--vllm", default=".venv-vllm/bin/vllm")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="jaxrl-overlap-"))
    rows: dict[int, list[JsonObject]] = {0: [], 1: []}
    settings = servers.Settings(options.vllm, str(options.run / "base"), "float32", max_tokens=64)
    devices = servers.choose_devices(options.servers, trains=True)
    with servers.running(options.servers, settings, folder / "logs", devices=devices) as started:
        urls = [server.url for server in started]
        for i in range(options.rounds):
            for staleness in rows:
                run = folder / f"{staleness}-{i}"
                with contextlib.redirect_stdout(io.StringIO()):
                    train(make_recipe(options, run, urls, staleness), in_training.load, silent)
                lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
                rows[staleness] += [json.loads(line) for line in lines[WARM_UP:]]
    shutil.rmtree(folder)
    report(options, {f"max_staleness = {k}": measure(v) for k, v in rows.items()})


def make_recipe(options: argparse.Namespace, run: Path, urls: list[str], staleness: int) -> config.Recipe:
    files = {"model.path": "base", "data.path": "train.jsonl", "eval.path": "heldout.jsonl"}
    values = {key: options.run / name for key, name in files.items()}
    values |= {"run.directory": run, "run.steps": options.steps}
    values |= {"rollout.engine": "vllm", "sampler.max_staleness": staleness}
    flat = [str(part) for key, value in values.items() for part in (f"--{key}", value)]
    return config.load(options.recipe, [*flat, "--sampler.urls", *urls])


def measure(rows: list[JsonObject]) -> dict[str, float]:
    """Medians over the steps."""

    def share(row: JsonObject, phase: str) -> float:
        return row[phase] / row["time/step"]

    columns = {
        "step_seconds": [row["time/step"] for row in rows],
        "sampling_seconds": [row["time/sampling"] for row in rows],
        "trainer_idle": [share(row, "time/sample") for row in rows],
        "samplers_idle": [max(0.0, 1 - share(row, "time/sampling")) for row in rows],
        "staleness": [row["sampler/staleness"] for row in rows],
        "tokens_per_second": [row["perf/tokens_per_second"] for row in rows],
    }
    return {name: statistics.median(values) for name, values in columns.items()}


def report(options: argparse.Namespace, results: dict[str, dict[str, float]]) -> None:
    print(f"{options.recipe}, {options.servers} servers; medians of steps")
    names = list(next(iter(results.values())))
    print(f"{'':<20}" + "".join(f"{name:>20}" for name in names))
    for label, values in results.items():
        print(f"{label:<20}" + "".join(f"{values[name]:>20.3f}" for name in names))
    setting = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "servers": options.servers,
    }
    print(f"written to {write_results('overlap', {'setting': setting} | results)}")


if __name__ == "__main__":
    main()
