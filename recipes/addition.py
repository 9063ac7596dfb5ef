"""Writes additions of two numbers for recipes/smollm2-addition.toml: train.jsonl and heldout.jsonl, disjoint.

python recipes/addition.py runs/smollm2-addition [--digits 2] [--train 4000] [--heldout 200] [--seed 1]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--digits", type=int, default=2)
    parser.add_argument("--train", type=int, default=4000, help="problems to train on")
    parser.add_argument("--heldout", type=int, default=200, help="problems to evaluate on")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    low = 10 ** (args.digits - 1) if args.digits > 1 else 0
    span = 10**args.digits - low
    if args.train + args.heldout > span * span:
        parser.error(f"there are {span * span} problems of {args.digits} digits; lower --train or --heldout")
    chosen = np.random.default_rng(args.seed).choice(span * span, args.train + args.heldout, replace=False)
    rows = [
        {"problem": f"{low + n // span} + {low + n % span}", "answer": str(2 * low + n // span + n % span)}
        for n in chosen
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    for name, part in (("heldout", rows[: args.heldout]), ("train", rows[args.heldout :])):
        (args.out / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in part), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
