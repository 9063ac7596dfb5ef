"""Whole steps at JustRL's shape on one GPU, vLLM beside the trainer: `python -m benchmarks.step_gpu`.

DeepSeek-R1-Distill-Qwen-1.5B's shapes with random weights, whose answers practically never end by themselves: each is
as long as it may be. 64 prompts, 8 answers to each, 4,096 tokens, one update a step. All rewards are the same, so what
has no advantage is trained on here. A vLLM server is started as `jaxrl train --sampler.servers 1` starts it, and
shares the GPU; weights go to it through memory. What a step's phases take is in the run's own metrics.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.harness import HERE, RESULTS
from benchmarks.update_cpu import MODEL as TINY
from jaxrl import config
from jaxrl.plan import KNOWN
from jaxrl.sampling import servers

MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
PHASES = ("sample", "exchange", "score", "old_logprobs", "update", "publish", "step")
# in a process of its own: this one must not hold memory of the device
WRITE = """
import dataclasses, json, sys
from pathlib import Path
from jaxrl.models import Config, Model, initialize, save
folder, shape, dtype = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
config = Config(**shape)
save(Model(config, initialize(config, 0)), folder, dtype=dtype)
(folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096, help="new ones of each answer")
    parser.add_argument("--stream", type=int, default=16_384, help="tokens in a stream of the update")
    parser.add_argument("--steps", type=int, default=3, help="the first compiles, and is not counted")
    parser.add_argument("--vllm", default=".venv-vllm/bin/vllm")
    parser.add_argument(
        "--memory", type=float, default=0, help="share of the GPU that vLLM gets; 0: jaxrl's own"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a small model on the CPU, to see that all of it runs"
    )
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
        rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    found = summary(rows[1:], options)
    import jax

    kind = jax.devices()[0].device_kind
    record = (
        vars(options) | {"device": kind, "jax": jax.__version__, "gpus": servers.gpus(), "rows": rows} | found
    )
    if not options.tiny:
        (RESULTS / f"step_gpu_{kind.replace(' ', '_')}.json").write_text(json.dumps(record, indent=2) + "\n")
    print(
        f"\n{kind}, median of {len(rows) - 1} steps of {options.prompts} x {options.samples} x {options.tokens}:"
    )
    for name, value in found.items():
        print(f"{name:<36}{value:>14,.4g}")


def write_model(folder: Path, shape: object, dtype: str) -> None:
    """Random weights, and a tokenizer that knows the digits; every other token is text of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir()
    subprocess.run(
        [sys.executable, "-c", WRITE, folder, json.dumps(vars(shape)), dtype], check=True, cwd=HERE.parent
    )
    symbols = ["<pad>", "<eos>", *"0123456789"]
    symbols += [f"<{i}>" for i in range(len(symbols), shape.vocab_size)]  # type: ignore[attr-defined]
    tokenizer = Tokenizer(models.WordLevel({s: i for i, s in enumerate(symbols)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(folder)


def write_recipe(folder: Path, options: argparse.Namespace, dtype: str) -> Path:
    rng = np.random.default_rng(0)
    problems = (
        "".join(map(str, rng.integers(10, size=rng.integers(50, 150)))) for _ in range(4 * options.prompts)
    )
    rows = [json.dumps({"problem": text, "answer": "0"}) + "\n" for text in problems]
    (folder / "problems.jsonl").write_text("".join(rows))
    memory = ["--gpu-memory-utilization", str(options.memory)] if options.memory else []
    recipe = config.from_dict({
        "run": {"directory": str(folder / "run"), "steps": options.steps, "tensorboard": False, "rollouts_every": 0},
        "model": {"path": str(folder / "base"), "dtype": dtype},
        "data": {"path": str(folder / "problems.jsonl"), "problem_column": "problem", "answer_column": "answer",
                 "suffix": "", "max_prompt_tokens": 256},
        "rollout": {"engine": "vllm", "prompts": options.prompts, "samples": options.samples,
                    "max_tokens": options.tokens},
        "sampler": {"servers": 1, "vllm": options.vllm, "concurrency": options.prompts, "vllm_options": memory},
        "loss": {"skip_zero_advantage": False},
        "optimizer": {"minibatch_prompts": options.prompts},
        "packing": {"stream_tokens": options.stream, "bucket_tokens": 512 if options.stream > 4096 else 64,
                    "logprob_chunk": 512 if options.stream > 4096 else 64},
        "checkpoint": {"every": 10_000},
    })  # fmt: skip
    path = folder / "recipe.toml"
    path.write_text(config.to_toml(recipe))
    return path


def summary(rows: list[dict], options: argparse.Namespace) -> dict[str, float]:
    median = lambda name: statistics.median(row[name] for row in rows)  # noqa: E731
    found = {f"seconds {name.replace('_', ' ')}": median(f"time/{name}") for name in PHASES}
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
