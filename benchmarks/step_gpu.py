"""Whole steps at JustRL's shape on one GPU, vLLM beside the trainer: `python -m benchmarks.step_gpu`.

DeepSeek-R1-Distill-Qwen-1.5B's shapes with random weights, whose answers practically never end by themselves: each is
as long as it may be. 64 prompts, 8 answers to each, 4,096 tokens, one update a step. All rewards are the same, so
sequences without an advantage are trained on here. A vLLM server is started as `jaxrl train --sampler.servers 1`
starts it, and shares the GPU; weights go to it through memory. The run's own metrics have the seconds of each phase.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from benchmarks.harness import HERE, write_results
from benchmarks.update_cpu import MODEL as TINY
from jaxrl.models import Config
from jaxrl.plan import KNOWN
from jaxrl.sampling import servers
from jaxrl.telemetry.timer import PHASES
from jaxrl.types import JsonObject

MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
# in a process of its own: this one must not hold memory of the device
WRITE = """
import json, sys
from pathlib import Path
from jaxrl.models import Config, Model, initialize, save
folder, shape, dtype = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
config = Config(**shape)
save(Model(config, initialize(config, 0)), folder, dtype=dtype)
(folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
"""
RECIPE = """
[run]
directory = "{folder}/run"
steps = {steps}
tensorboard = false
rollouts_every = 0
[model]
path = "{folder}/base"
dtype = "{dtype}"
[data]
path = "{folder}/problems.jsonl"
problem_column = "problem"
answer_column = "answer"
suffix = ""
max_prompt_tokens = 256
[rollout]
engine = "vllm"
prompts = {prompts}
samples = {samples}
max_tokens = {tokens}
[sampler]
servers = 1
vllm = "{vllm}"
vllm_options = {vllm_options}
concurrency = {prompts}
[loss]
skip_zero_advantage = false
[optimizer]
minibatch_prompts = {prompts}
[packing]
stream_tokens = {stream}
bucket_tokens = {unit}
logprob_chunk = {unit}
[checkpoint]
every = 10000
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--prompts", type=int, default=64)
    add("--samples", type=int, default=8)
    add("--tokens", type=int, default=4096, help="new ones of each answer")
    add("--stream", type=int, default=16_384, help="tokens in a stream of the update")
    add("--steps", type=int, default=3, help="the first compiles, and is not counted")
    add("--vllm", default=".venv-vllm/bin/vllm")
    add("--memory", type=float, default=0, help="share of the GPU that vLLM gets; 0: jaxrl's own")
    add("--tiny", action="store_true", help="a small model on the CPU, to see that all of it runs")
    options = parser.parse_args()
    shape, dtype = KNOWN[MODEL], "bfloat16"
    if options.tiny:
        shape, dtype = TINY, "float32"
        options.prompts, options.samples, options.tokens, options.stream = 4, 4, 32, 512
    with tempfile.TemporaryDirectory(prefix="jaxrl-step-") as name:
        folder = Path(name)
        write_model(folder / "base", shape, dtype)
        recipe = write_recipe(folder, options, dtype)
        subprocess.run([sys.executable, "-m", "jaxrl.cli", "train", recipe], check=True, cwd=HERE.parent)
        rows = [
            json.loads(line)
            for line in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
    found = summarize(rows[1:], options)
    kind = jax.devices()[0].device_kind
    setting = {"device": kind, "jax": jax.__version__, "gpus": servers.gpus(), "rows": rows}
    if not options.tiny:
        write_results(f"step_gpu_{kind.replace(' ', '_')}", vars(options) | setting | found)
    size = f"{options.prompts} x {options.samples} x {options.tokens}"
    print(f"\n{kind}, median of {len(rows) - 1} steps of {size}:")
    for name, value in found.items():
        print(f"{name:<36}{value:>14,.4g}")


def write_model(folder: Path, shape: Config, dtype: str) -> None:
    """Writes random weights, and a tokenizer with a token for each digit and texts of their own for all others."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir()
    arguments = [str(folder), json.dumps(vars(shape)), dtype]
    subprocess.run([sys.executable, "-c", WRITE, *arguments], check=True, cwd=HERE.parent)
    symbols = ["<pad>", "<eos>", *"0123456789"]
    symbols += [f"<{i}>" for i in range(len(symbols), shape.vocab_size)]
    tokenizer = Tokenizer(models.WordLevel({s: i for i, s in enumerate(symbols)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(folder)


def write_recipe(folder: Path, options: argparse.Namespace, dtype: str) -> Path:
    rng = np.random.default_rng(0)
    problems = [rng.integers(10, size=rng.integers(50, 150)) for _ in range(4 * options.prompts)]
    rows = [{"problem": "".join(map(str, digits)), "answer": "0"} for digits in problems]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    unit = 512 if options.stream > 4096 else 64
    memory = ["--gpu-memory-utilization", str(options.memory)] if options.memory else []
    path, values = folder / "recipe.toml", vars(options) | {"vllm_options": json.dumps(memory)}
    path.write_text(RECIPE.format(folder=folder, dtype=dtype, unit=unit, **values), encoding="utf-8")
    return path


def summarize(rows: list[JsonObject], options: argparse.Namespace) -> dict[str, float]:
    """Medians over the steps."""

    def median(name: str) -> float:
        return statistics.median(row[name] for row in rows)

    phases = (*PHASES, "step")
    found = {f"seconds {name.replace('_', ' ')}": median(f"time/{name}") for name in phases}
    tokens = options.prompts * options.samples * median("response/length_mean")
    found["tokens sampled a second"] = tokens / found["seconds sample"]
    found["tokens trained on a second"] = tokens / found["seconds update"]
    for name in ("perf/mfu", "sampler/logprob_diff_mean", "sampler/logprob_diff_max"):
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            found[name] = statistics.median(values)
    return found


if __name__ == "__main__":
    main()
