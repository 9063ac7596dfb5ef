"""jaxrl plan."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from jaxrl import config
from jaxrl.files import write_atomically

HELP = "predict memory and step time of a recipe, without its hardware"
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("recipe")
    add("--hardware", default="H100", help="A100, A800, H100, H200, B200, v5p or v6e (default: H100)")
    add("--trainers", type=int, default=0, help="devices that train; alone: they sample in turn")
    add("--samplers", type=int, default=0, help="other devices, which sample one step ahead")
    add("--devices", type=int, default=0, help="of both kinds: finds the best split")
    add("--mean-response", type=float, default=5000, help="tokens (default: 5000)")
    add("--mean-prompt", type=float, default=150, help="tokens (default: 150)")
    add("--spread", type=float, default=0.8, help="deviation over mean of lengths (default: 0.8)")
    zero = "share of rollouts left out of training (default: 0)"
    add("--zero-advantage", type=float, default=0.0, help=zero)
    add(
        "--kept", type=float, default=1.0, help="share of groups in the band, of refill and drop (default: 1)"
    )
    add("--tensor", type=int, default=1, help="devices that one sampler spans (default: 1)")
    add("--eager", action="store_true", help="the sampler runs without CUDA graphs")
    add("--no-compile", dest="compile", action="store_false", help="estimate the memory, in a second")
    add("--json", type=Path, help="also write the plan to this file")


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    recipe = config.load(args.recipe, overrides)
    from jaxrl import plan

    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(plan.Assumptions)}
    made = plan.plans(recipe, plan.Assumptions(**given))
    plan.show(made)
    if args.json:
        whole = {"stages": made} if recipe.stages else made[0]
        write_atomically(args.json, json.dumps(whole, indent=2))
