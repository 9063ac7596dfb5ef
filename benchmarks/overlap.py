"""Which share of a step trainer and samplers idle, in turn and one batch ahead: `python -m benchmarks.overlap RUN`.

RUN is a folder of the demo (make demo RUN=RUN), whose recipe runs here for a few steps, in turns: sampler.max_staleness
0, 1, 0, 1. Two vLLM servers sample. Where trainer and servers share the same cores, as on one CPU, one batch ahead
leaves neither side idle but cannot be faster.
"""

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

from jaxrl import config
from jaxrl.sampling import servers
from jaxrl.train import train

RESULTS = Path(__file__).parent / "results" / "overlap.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder with base/ and train.jsonl of the demo")
    parser.add_argument("--recipe", default="recipes/demo.toml")
    parser.add_argument("--steps", type=int, default=12, help="of each run; the first two are left out")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--vllm", default=".venv-vllm/bin/vllm")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="jaxrl-overlap-"))
    rows: dict[int, list[dict]] = {0: [], 1: []}
    with servers.running(
        options.servers, options.vllm, str(options.run / "base"), folder / "logs", dtype="float32", max_tokens=64,
        where=servers.choose_devices(options.servers, trains=True),
    ) as started:  # fmt: skip
        for i in range(options.rounds):
            for staleness in rows:
                run = folder / f"{staleness}-{i}"
                with contextlib.redirect_stdout(io.StringIO()):
                    train(
                        recipe(options, run, [server.url for server in started], staleness),
                        say=lambda _: None,
                    )
                lines = (run / "metrics.jsonl").read_text().splitlines()
                rows[staleness] += [json.loads(line) for line in lines[2:]]
    shutil.rmtree(folder)
    report(options, {f"max_staleness = {k}": measure(v) for k, v in rows.items()})


def recipe(options: argparse.Namespace, run: Path, urls: list[str], staleness: int) -> config.Recipe:
    data = {"model.path": "base", "data.path": "train.jsonl", "eval.path": "heldout.jsonl"}
    values = {key: options.run / name for key, name in data.items()} | {
        "run.directory": run, "run.steps": options.steps, "rollout.engine": "vllm", "sampler.max_staleness": staleness,
    }  # fmt: skip
    flat = [str(part) for key, value in values.items() for part in (f"--{key}", value)]
    return config.load(options.recipe, [*flat, "--sampler.urls", *urls])


def measure(rows: list[dict]) -> dict[str, float]:
    median = lambda values: statistics.median(values)  # noqa: E731
    return {
        "step_seconds": median([row["time/step"] for row in rows]),
        "sampling_seconds": median([row["time/sampling"] for row in rows]),
        "trainer_idle": median([row["time/sample"] / row["time/step"] for row in rows]),
        "samplers_idle": median([max(0.0, 1 - row["time/sampling"] / row["time/step"]) for row in rows]),
        "staleness": median([row["sampler/staleness"] for row in rows]),
        "tokens_per_second": median([row["perf/tokens_per_second"] for row in rows]),
    }


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
    }
    RESULTS.write_text(
        json.dumps({"setting": setting | {"servers": options.servers}} | results, indent=2) + "\n"
    )
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
