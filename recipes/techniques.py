"""Makes what recipes/matrices/techniques.toml needs: a task on which techniques can differ, and base models.

    python -m recipes.techniques runs/techniques [--seeds 1 2 3 4 5] [--steps 400]

The problems are additions of two numbers of two to four digits, worked column by column as in the demo, and harder to
reward. One line of three is checked, by writing it again with fewer mistakes, so a longer answer is a better one, and
the budget of tokens cuts long answers off. One answer of three has a 0 before it: `\\boxed{0932}` is right, and a
verifier that compares characters marks it wrong. One example of six has the beginning of its answer in the prompt, as a
hint. Each seed has a base model of its own; all have the same problems.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from jaxrl import Model, Rollout
from recipes.demo import BATCH, MODEL, example, learn, make_tokenizer, save, worked, write_rows

SLIP = 0.2  # chance that a column's sum is off by one
CHECKED_SLIP = 0.06  # where it is the second time that the line is written
CHECK = 1 / 3  # of the lines
ZERO = 1 / 3  # of the answers have a 0 before them
HINTED = 1 / 6  # of the examples
LONGEST = 176  # tokens; no example has more
HELD_OUT = 256


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="train.jsonl, heldout.jsonl and a base-SEED for each go there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--steps", type=int, default=400, help="supervised updates of a base model")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    problems = draw(np.random.default_rng(0), 8_000)
    write_problems(args.out / "heldout.jsonl", problems[:HELD_OUT])
    write_problems(args.out / "train.jsonl", problems[HELD_OUT:])
    for seed in args.seeds:
        if not (args.out / f"base-{seed}" / "generation_config.json").exists():
            make_base(args.out / f"base-{seed}", problems[HELD_OUT:], args.steps, seed)


def draw(rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
    """Different pairs of numbers of equally many digits."""
    found: dict[tuple[int, int], None] = {}
    while len(found) < count:
        low = 10 ** int(rng.integers(1, 4))
        a, b = rng.integers(low, 10 * low, size=2)
        found[int(a), int(b)] = None
    return list(found)


def write_problems(path: Path, problems: list[tuple[int, int]]) -> None:
    right = np.random.default_rng(0)
    rows = [
        {"problem": f"{a}+{b}=?", "answer": str(a + b), "solution": worked(a, b, right, slip=0, check=CHECK)}
        for a, b in problems
    ]
    write_rows(path, rows)


def make_base(folder: Path, problems: list[tuple[int, int]], steps: int, seed: int) -> None:
    rng, tokenizer = np.random.default_rng(seed), make_tokenizer()

    def examples() -> list[Rollout]:
        return [teach(*problems[i], rng.random() < HINTED) for i in rng.integers(len(problems), size=BATCH)]

    def teach(a: int, b: int, hinted: bool) -> Rollout:
        response = worked(a, b, rng, SLIP, CHECK, CHECKED_SLIP, ZERO)
        hint = "\n" + response[: int(len(response) * rng.random())] if hinted else ""
        return example(tokenizer, f"{a}+{b}=?{hint}", str(a + b), response)

    save(Model(MODEL, learn(MODEL, examples, steps, seed, LONGEST)), tokenizer, folder)


if __name__ == "__main__":
    main()
