"""jaxrl probe."""

from __future__ import annotations

import argparse
from pathlib import Path

from evals import sampling
from evals.sampling import devices_of, exported, run_folder
from jaxrl import config
from jaxrl.commands.options import positive, sampler_overrides
from jaxrl.errors import InputError

HELP = "find the sampling temperature to train with"
TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sampling.add_arguments(parser)
    add = parser.add_argument
    add("--recipe", help="recipe with [data] and [reward]; default: the run's own, at the stage it is in")
    temperatures = "at least two (default: 0.6,0.8,1.0,1.2,1.4)"
    add("--temperatures", default="0.6,0.8,1.0,1.2,1.4", metavar="T,T,...", help=temperatures)
    problems = "of the training data, evenly spaced over it (default: 64)"
    add("--problems", type=positive, default=64, metavar="N", help=problems)
    add("--samples", type=positive, metavar="G", help="responses to each; default: rollout.samples")
    loss = "share of the best accuracy that exploration may cost (default: 0.1)"
    add("--most-loss", type=float, default=0.1, metavar="SHARE", help=loss)
    add("--out", type=Path, metavar="DIR", help="for probe.json and probe.png; default: probe in the run")


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    given = {override.partition("=")[0] for override in overrides}
    if "--rollout.temperature" in given:
        raise InputError("--rollout.temperature is what a probe is to find; give --temperatures")
    if not 0 <= args.most_loss <= 1:
        raise InputError(f"--most-loss: {args.most_loss:g} is not a share; give one from 0 to 1")
    of = run_folder(args.model)
    path = args.recipe or (of and of / "recipe.toml")
    if not path:
        raise InputError(f"{args.model} is not a run folder; name the recipe with --recipe FILE")
    from evals import probe, probe_tables  # heavy
    from jaxrl.lock import alone

    temperatures = probe.temperatures_of(args.temperatures)
    recipe = config.load(path, overrides + sampler_overrides(args.samplers, args.servers))
    probe.require_possible(temperatures, recipe)
    devices = devices_of(recipe)
    folder, step = exported(args.model, "probe")
    # a run at the end of a stage is probed for the next one
    stage = config.stage_at(config.stages_of(recipe), 0 if args.recipe else step)
    if recipe.stages:
        print(f"with the recipe of {stage.title}")
    of_a_checkpoint = of is not None and folder.parent != of
    out = args.out or (folder.parent if of_a_checkpoint else (of or Path(recipe.run.directory)) / "probe")
    samples = args.samples or stage.recipe.rollout.samples
    job = probe.Job(stage.recipe, folder, out, temperatures, args.problems, samples, args.most_loss)
    with alone(out, "probe"):
        probed = probe.probe(job, devices)
        probe_tables.plot(probed, out / "probe.png")
    probe_tables.show(probed)
    print("\n".join(probe.advice(probed)))
    print(f"{len(probed['results'])} temperatures -> {out}")
