"""Makes what recipes/demo.toml needs: problems, a tokenizer, and a small model that can reason a little.

    python recipes/demo.py runs/demo [--seed 1] [--steps 300]

The problems are additions of two three-digit numbers. Answers are worked column by column and end in \\boxed{}. The
teacher of the short supervised start makes a mistake in one column of four and carries it on, and the model learns to
make as many: it knows the method, but less than half of its answers are right. GRPO improves that.

Supervised learning is the policy update with advantage 1 at ratio 1, so `update` itself does it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from rich.progress import track
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import jaxrl
from jaxrl import Prompt, Rollout, config
from jaxrl.models.decoder import Params

SYMBOLS = ["<pad>", "<eos>", "<user>", "<assistant>", "\\boxed{", "}", *"0123456789+=?\n"]
SLIP = 0.24  # chance that the teacher's column sum is off by one
BATCH = 64  # examples of a supervised update
STREAM = 512  # tokens of a stream
BUCKET = 16  # tokens between attention lengths
CHUNK = 256  # tokens whose logits exist at one time
LONGEST = 48  # tokens; no example has more
MODEL = jaxrl.ModelConfig(
    family="qwen2",
    vocab_size=len(SYMBOLS),
    width=128,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=32,
    mlp_width=352,
    rope_theta=10_000.0,
    norm_epsilon=1e-6,
    tied=False,
    max_positions=256,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="run folder; base/, train.jsonl and heldout.jsonl go there")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300, help="supervised updates")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    pairs = rng.choice(900 * 900, 20_500, replace=False)
    problems = [(100 + int(n) // 900, 100 + int(n) % 900) for n in pairs]
    args.out.mkdir(parents=True, exist_ok=True)
    write_problems(args.out / "heldout.jsonl", problems[:500])
    write_problems(args.out / "train.jsonl", problems[500:])
    tokenizer = make_tokenizer()

    def examples() -> list[Rollout]:
        chosen = [problems[500 + i] for i in rng.integers(20_000, size=BATCH)]
        return [example(tokenizer, f"{a}+{b}=?", str(a + b), worked(a, b, rng)) for a, b in chosen]

    params = learn(MODEL, examples, args.steps, args.seed, LONGEST)
    save(jaxrl.Model(MODEL, params), tokenizer, args.out / "base")


def save(model: jaxrl.Model, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    jaxrl.save_model(model, folder)
    tokenizer.save_pretrained(folder)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    (folder / "generation_config.json").write_text(json.dumps(ids), encoding="utf-8")
    print(f"{folder}: {sum(p.size for p in jax.tree.leaves(model.params)):,} parameters")


def write_problems(path: Path, problems: list[tuple[int, int]]) -> None:
    write_rows(path, [{"problem": f"{a}+{b}=?", "answer": str(a + b)} for a, b in problems])


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({s: i for i, s in enumerate(SYMBOLS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", clean_up_tokenization_spaces=False
    )
    fast.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    fast.chat_template = (
        "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return fast


def worked(
    a: int,
    b: int,
    rng: np.random.Generator,
    slip: float = SLIP,
    check: float = 0.0,
    checked_slip: float = 0.0,
    zero: float = 0.0,
) -> str:
    """347+585 -> '7+5+0=12', '4+8+1=13', '3+5+1=9', '\\boxed{932}', a line each, with the teacher's mistakes.

    Args:
      a, b: of equally many digits.
      rng: draws what has a chance of its own.
      slip: that a column's sum is off by one.
      check: that the line is written again.
      checked_slip: that the sum is off then.
      zero: that there is a 0 before the answer.
    """

    def by(chance: float) -> bool:
        return chance > 0 and rng.random() < chance

    def total(right: int, chance: float) -> int:
        return max(0, right + int(rng.choice([-1, 1]))) if by(chance) else right

    lines, digits, carry = [], "", 0
    for column in range(len(str(a))):
        x, y = a // 10**column % 10, b // 10**column % 10
        found = total(x + y + carry, slip)
        lines.append(f"{x}+{y}+{carry}={found}")
        if by(check):
            found = total(x + y + carry, checked_slip)
            lines.append(f"{x}+{y}+{carry}={found}")
        carry, digits = found // 10, str(found % 10) + digits
    return "\n".join([*lines, f"\\boxed{{{'0' * by(zero)}{str(carry) * (carry > 0)}{digits}}}"])


def learn(
    model: jaxrl.ModelConfig, examples: Callable[[], list[Rollout]], steps: int, seed: int, longest: int
) -> Params:
    """Supervised updates on the teacher's examples, BATCH at a time, none of more tokens than the longest."""
    mesh = jaxrl.make_mesh()
    adam = config.Optimizer(learning_rate=3e-3, warmup_steps=20, beta2=0.99, weight_decay=0.0)
    optimizer = jaxrl.make_optimizer(adam)
    layout = jaxrl.Layout(streams=(STREAM,), buckets=jaxrl.bucket_lengths(BUCKET, longest))
    numerics = jaxrl.Numerics(logprob_chunk=CHUNK)
    objective = jaxrl.Objective(clip_low=0.2, clip_high=0.2, dual_clip=10.0)
    update, _ = jaxrl.make_update(model, optimizer, mesh, layout, numerics, objective)
    state = jaxrl.init_state(jaxrl.initialize(model, seed), optimizer, mesh)
    for step in track(range(steps), description="supervised start"):
        rate = jaxrl.learning_rate(adam, step)
        batch = jaxrl.pack(examples(), np.ones(BATCH), mesh.size, layout, learning_rate=rate, on_policy=True)
        state, metrics = update(state, jaxrl.to_devices(batch, mesh))
    loss = float(metrics["logprob_diff_mean"])  # mean |log p - 0|: examples have no sampler log-probs
    print(f"cross-entropy of the last batch: {loss:.3f} nats a token")
    return state.params


def example(tokenizer: PreTrainedTokenizerFast, problem: str, answer: str, response: str) -> Rollout:
    """One of the teacher's, as a rollout."""

    def encode(text: str) -> np.ndarray:
        return np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)

    prompt = Prompt("", encode(f"<user>{problem}<assistant>"), answer)
    tokens = encode(response + tokenizer.eos_token)
    return Rollout(prompt, tokens, np.zeros(len(tokens), np.float32), "stop", 0)


if __name__ == "__main__":
    main()
