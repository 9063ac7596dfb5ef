"""jaxrl eval."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from evals import sampling
from evals.sampling import devices_of, exported, run_folder
from jaxrl import config
from jaxrl.commands.options import positive, sampler_overrides
from jaxrl.errors import InputError
from jaxrl.results import BenchmarksResult, EvalProtocol, HeldOutResult

if TYPE_CHECKING:
    from evals.judge import Judge
    from evals.suite import OpenJudge
    from jaxrl.objects import Rows

HELP = "accuracy on benchmarks, or on a recipe's held-out problems"
TAKES_OVERRIDES = True
ONLY_BENCHMARKS = ("data", "samples", "judge", "judge_model", "judge_prompt", "judge_tail")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sampling.add_arguments(parser)
    parser.add_argument("--out", help="file (--recipe) or folder (--benchmarks) to write; has a default")
    add = parser.add_argument_group("held-out problems").add_argument
    add("--recipe", help="recipe with [data], [reward] and [eval]; default: the run's own")
    add("--name", default="eval", help="label in the report, such as before or after")
    add = parser.add_argument_group("benchmarks (docs/evaluation.md)").add_argument
    add("--benchmarks", metavar="LIST", help="aime24,math500,..., all, or .toml files of your own")
    add("--data", type=Path, metavar="DIR", help="local copies; default: from the Hub")
    add("--samples", type=positive, default=0, help="responses to each problem; default: 32 or 4")
    add("--protocol", choices=get_args(EvalProtocol), default="default")
    judge = "OpenAI-compatible endpoint of CompassVerifier-3B; or what to start it from"
    add("--judge", metavar="URL|MODEL", help=judge)
    add("--judge-model", default="", help="its name at a URL; default: the first one listed")
    add("--judge-prompt", type=Path, metavar="FILE", help="another prompt for the judge")
    add("--judge-tail", type=positive, help="characters of a response's end that the judge sees")


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    _measured(args, overrides)


def evaluate(
    model: str,
    recipe: str | Path | config.Recipe | None,
    changes: Mapping[str, object],
    held_out: Rows | None,
    options: Mapping[str, object],
) -> Mapping[str, object]:
    """The command as a function; see `jaxrl.evaluate`."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args([model])
    for name in options:
        if not hasattr(args, name):
            raise TypeError(f"evaluate() has no option {name!r}; there are: {', '.join(vars(args))}")
    vars(args).update(options, recipe=recipe)
    return _measured(args, changes, held_out)


def _measured(
    args: argparse.Namespace, overrides: list[str] | Mapping[str, object], rows: Rows | None = None
) -> Mapping[str, object]:
    if not args.benchmarks:
        return cast(Mapping[str, object], _on_held_out(args, overrides, rows))
    if args.recipe or rows is not None:
        raise InputError(
            "--recipe is for held-out problems and --benchmarks for benchmarks; give one of them"
        )
    return cast(Mapping[str, object], _on_benchmarks(args, overrides))


def _on_held_out(
    args: argparse.Namespace, overrides: list[str] | Mapping[str, object], rows: Rows | None
) -> HeldOutResult:
    for name in ONLY_BENCHMARKS:
        if getattr(args, name):
            raise InputError(f"--{name.replace('_', '-')} is for benchmarks; add --benchmarks LIST")
    run = run_folder(args.model)
    path = args.recipe or (run and run / "recipe.toml")
    if not path:
        raise InputError(
            f"{args.model} is not a run folder; say what to evaluate on with --benchmarks LIST or --recipe FILE"
        )
    more = sampler_overrides(args.samplers, args.servers)
    if isinstance(overrides, Mapping):
        recipe = config.load(_with_rows(config.draft(path, overrides), rows), more)
    else:
        recipe = config.load(path, overrides + more)
    devices = devices_of(recipe)
    from evals import held_out

    model, step = exported(args.model, "eval")
    if not args.recipe:  # as the run itself evaluates after so many steps
        recipe = config.stage_at(config.stages_of(recipe), step - 1).recipe
    out = Path(args.out or Path(recipe.run.directory) / "eval" / f"{args.name}.json")
    return held_out.evaluate(recipe, model, out, args.name, step, devices)


def _with_rows(recipe: config.Recipe, rows: Rows | None) -> config.Recipe:
    """A draft that is evaluated on rows."""
    if rows is None:
        return recipe
    from jaxrl.objects import paths_of

    return config.draft(recipe, paths_of(recipe, held_out=rows))


def _on_benchmarks(args: argparse.Namespace, overrides: list[str] | Mapping[str, object]) -> BenchmarksResult:
    from evals import benchmarks, suite
    from jaxrl.lock import alone

    chosen = benchmarks.select(args.benchmarks)
    base = config.from_dict(suite.PROTOCOL)
    more = sampler_overrides(args.samplers, args.servers)
    if isinstance(overrides, Mapping):
        recipe = config.load(config.draft(base, overrides), more)
    else:
        recipe = config.from_command_line(base, overrides + more, "jaxrl eval MODEL --benchmarks LIST")
        recipe = config.from_dict(config.to_dict(recipe), "command line")
    if recipe.eval.samples != base.eval.samples:
        raise InputError("--eval.samples is for held-out problems; benchmarks take --samples")
    devices = devices_of(recipe)  # before JAX looks for GPUs
    open_judge = _judge(args, recipe)
    folder, out = _model_of(args.model, args.out)
    job = suite.Job(args.model, folder, chosen, recipe, out, args.data, args.samples, args.protocol)
    with alone(out, "evaluation"):
        results = suite.evaluate(job, open_judge, devices)
    print((out / "results.md").read_text(encoding="utf-8"))
    print(f"{len(results['benchmarks'])} benchmarks -> {out}")
    return results


def _judge(args: argparse.Namespace, recipe: config.Recipe) -> OpenJudge | None:
    """Prepares the judge that is asked for. Called before JAX looks for GPUs, of which a server may get one."""
    from evals import judge
    from jaxrl.models import hf
    from jaxrl.sampling import servers
    from jaxrl.sampling.client import api_key

    prompt = judge.read_prompt(args.judge_prompt) if args.judge_prompt else judge.PROMPT
    if not args.judge:
        return None
    released = args.protocol == "justrl_released"
    make = partial(judge.Judge, prompt=prompt, tail=args.judge_tail or judge.TAIL, released=released)

    @contextmanager
    def at_url(out: Path) -> Iterator[Judge]:
        key = os.environ.get("JUDGE_API_KEY", "")
        yield make(args.judge, out / "judge.jsonl", key=key, model=args.judge_model)

    if "://" in args.judge:
        return at_url
    devices = servers.choose_devices(1, trains=recipe.rollout.engine == "local")
    model = hf.resolve(args.judge)

    @contextmanager
    def started(out: Path) -> Iterator[Judge]:
        with judge.server(recipe, model, args.judge, out / "judge", devices) as url:
            yield make(url, out / "judge.jsonl", key=api_key(), model=args.judge)

    return started


def _model_of(model: str, out: str | None) -> tuple[Path, Path]:
    """The model's Hugging Face folder, exported first if it is a run or a checkpoint, and the folder for results."""
    folder, step = exported(model, "benchmarks")
    run = run_folder(model)
    default = run / "benchmarks" / f"step_{step:06d}" if run else Path("runs/benchmarks") / Path(model).name
    return folder, Path(out or default)
