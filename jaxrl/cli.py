"""jaxrl train | eval | export | plan | report. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxrl import __version__, config
from jaxrl.errors import InputError

_EPILOG = """Any value of a recipe is an option: jaxrl train recipes/demo.toml --run.steps 10 --rollout.samples 4.
`jaxrl train RECIPE --help` lists them all."""


def main(argv: list[str] | None = None) -> None:
    """Runs one command; exits with 2 on bad input (one line on stderr) and with 130 when interrupted."""
    args, overrides = _parse(sys.argv[1:] if argv is None else argv)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax's; what matters in it is raised as well
    try:
        args.run(args, overrides)
    except InputError as error:
        print("\n".join(f"jaxrl: {line}" for line in str(error).splitlines()), file=sys.stderr)
        others = [t for t in threading.enumerate() if t is not threading.main_thread() and not t.daemon]
        if argv is None and others:  # Orbax's wait ten minutes for a folder that could not be made
            sys.stdout.flush()
            os._exit(2)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not cut the exit short
        print("jaxrl: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser("jaxrl", description=__doc__, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train", add_help=False, help="train by a recipe; goes on where a run stopped"
    )
    train.add_argument("recipe")
    train.add_argument("--samplers", metavar="URL,URL", help="sample by these vLLM servers: --sampler.urls")
    train.add_argument("--profile", metavar="STEPS", help="trace STEPS steps for XProf: --run.profile")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("eval", help="scores on benchmarks, or on a recipe's held-out problems")
    evaluate.add_argument(
        "model", help="Hugging Face folder, Hub id, or run folder, whose newest checkpoint is exported first"
    )
    evaluate.add_argument("--samplers", metavar="URL,URL", help="sample by these vLLM servers")
    evaluate.add_argument(
        "--servers", type=_servers, metavar="N", help="start N vLLM servers here, or all: one on each GPU"
    )
    evaluate.add_argument("--out", help="file (--recipe) or folder (--benchmarks) to write; has a default")
    held_out = evaluate.add_argument_group("held-out problems")
    held_out.add_argument("--recipe", help="recipe with [data], [reward] and [eval]; default: the run's own")
    held_out.add_argument("--name", default="eval", help="label in the report, such as before or after")
    suite = evaluate.add_argument_group("benchmarks (docs/evaluation.md)")
    suite.add_argument(
        "--benchmarks", metavar="LIST", help="aime24,math500,..., all, or .toml files of your own"
    )
    suite.add_argument("--data", type=Path, metavar="DIR", help="local copies; default: from the Hub")
    suite.add_argument(
        "--samples", type=_positive, default=0, help="responses to each problem; default: 32 or 4"
    )
    suite.add_argument("--protocol", choices=("default", "justrl_released"), default="default")
    suite.add_argument(
        "--judge",
        metavar="URL|MODEL",
        help="OpenAI-compatible endpoint of CompassVerifier-3B; or what to start it from",
    )
    suite.add_argument("--judge-model", default="", help="its name at a URL; default: the first one listed")
    suite.add_argument("--judge-prompt", type=Path, metavar="FILE", help="another prompt for the judge")
    suite.add_argument(
        "--judge-tail", type=_positive, help="characters of a response's end that the judge sees"
    )
    evaluate.set_defaults(run=_evaluate)

    export = commands.add_parser("export", help="write a run's weights as a Hugging Face folder")
    export.add_argument("run_or_checkpoint", help="run folder, or one of its checkpoints/N")
    export.add_argument("out", nargs="?", help="default: hf in the run folder")
    export.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    export.set_defaults(run=_export)

    plan = commands.add_parser("plan", help="predict memory and step time of a recipe, without its hardware")
    plan.add_argument("recipe")
    plan.add_argument("--hardware", default="H100", help="A100, A800, H100, H200 or B200 (default: H100)")
    plan.add_argument(
        "--trainers", type=int, default=0, help="devices that train; alone: they sample in turn"
    )
    plan.add_argument("--samplers", type=int, default=0, help="other devices, which sample one step ahead")
    plan.add_argument("--devices", type=int, default=0, help="of both kinds: finds the best split")
    plan.add_argument("--mean-response", type=float, default=5000, help="tokens (default: 5000)")
    plan.add_argument("--mean-prompt", type=float, default=150, help="tokens (default: 150)")
    plan.add_argument(
        "--spread", type=float, default=0.8, help="deviation over mean of lengths (default: 0.8)"
    )
    plan.add_argument(
        "--zero-advantage",
        type=float,
        default=0.0,
        help="share of rollouts left out of training (default: 0)",
    )
    plan.add_argument("--tensor", type=int, default=1, help="devices that one sampler spans (default: 1)")
    plan.add_argument("--eager", action="store_true", help="the sampler runs without CUDA graphs")
    plan.add_argument(
        "--no-compile", dest="compile", action="store_false", help="estimate the memory, in a second"
    )
    plan.add_argument("--json", type=Path, help="also write the plan to this file")
    plan.set_defaults(run=_plan)

    report = commands.add_parser("report", help="an HTML page and figures of one run or several")
    report.add_argument("runs", nargs="+", type=Path)
    report.add_argument("--out", type=Path, help="folder for the figures; default: report in the first run")
    report.add_argument(
        "--rollouts",
        type=int,
        default=100,
        metavar="MB",
        help="of rollout files to take into the page (default: 100)",
    )
    report.set_defaults(run=_report)

    if argv[:1] == ["train"] and set(argv[1:]) <= {
        "-h",
        "--help",
    }:  # no recipe: the defaults are worth seeing
        config.from_command_line(config.Recipe(), ["--help"], "jaxrl train RECIPE")
    args, rest = parser.parse_known_args(argv)
    if rest and args.run not in (_train, _evaluate, _plan):
        parser.error(f"unknown option {rest[0]}")
    return args, rest


def _servers(text: str) -> int:
    if text != "all":
        return _positive(text)
    from jaxrl.sampling import servers

    return max(1, len(servers.gpus()))


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def _train(args: argparse.Namespace, overrides: list[str]) -> None:
    profile = ["--run.profile", args.profile] if args.profile else []
    recipe = config.load(args.recipe, overrides + profile + _samplers(args))
    from jaxrl.train import train

    train(recipe)


def _samplers(args: argparse.Namespace) -> list[str]:
    if args.samplers:
        return ["--rollout.engine", "vllm", "--sampler.urls", *args.samplers.split(",")]
    count = getattr(args, "servers", None)
    return ["--rollout.engine", "vllm", "--sampler.servers", str(count)] if count else []


def _evaluate(args: argparse.Namespace, overrides: list[str]) -> None:
    if args.benchmarks:
        _benchmarks(args, overrides)
        return
    for name in ("data", "samples", "judge", "judge_model", "judge_prompt", "judge_tail"):
        if getattr(args, name):
            raise InputError(f"--{name.replace('_', '-')} is for benchmarks; add --benchmarks LIST")
    run = Path(args.model) if (Path(args.model) / "recipe.toml").exists() else None
    if not (args.recipe or run):
        raise InputError(
            f"{args.model} is not a run folder; say what to evaluate on with --benchmarks LIST or --recipe FILE"
        )
    recipe = config.load(args.recipe or run / "recipe.toml", overrides + _samplers(args))  # type: ignore[operator]
    where = _place(recipe)
    step = _write_hf(run, run / "hf", "bfloat16") if run else 0
    from evals import during
    from jaxrl import telemetry, train
    from jaxrl.models import hf
    from jaxrl.sampling.sampler import SamplingParams

    folder = hf.resolve(run / "hf" if run else args.model)
    mesh = train.make_mesh()  # of what this process uses, which may be less than training did
    model = hf.load(folder, mesh=mesh)
    tokenizer = train.data.load_tokenizer(str(folder))
    verify = train.verifier(recipe, lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
    prompts = during.load_held_out(recipe, tokenizer)
    out = Path(args.out or Path(recipe.run.directory) / "eval" / f"{args.name}.json")
    sampling = SamplingParams(max_tokens=recipe.rollout.max_tokens, stop_ids=hf.stop_ids(folder))
    with (
        train.open_sampler(recipe, folder, model.config, mesh, print, where) as sampler,
        telemetry.Progress(1, 0, title=f"eval {args.name}") as progress,
    ):
        sampler.publish(model.params, 0)
        progress.phase("eval", total=len(prompts) * recipe.eval.samples)
        result = during.run_evaluation(
            recipe, sampler, prompts, sampling, verify, progress, out, args.name, step
        )
    low, high = result["ci95"]
    print(
        f"{args.name}: accuracy {result['accuracy']:.3f} (95% {low:.3f} to {high:.3f}) on {result['problems']} "
        f"problems x {result['samples']}, mean length {result['length_mean']:.1f} tokens -> {out}"
    )


def _benchmarks(args: argparse.Namespace, overrides: list[str]) -> None:
    if args.recipe:
        raise InputError(
            "--recipe is for held-out problems and --benchmarks for benchmarks; give one of them"
        )
    from evals import benchmarks, judge, suite
    from jaxrl.models import hf
    from jaxrl.sampling import servers
    from jaxrl.sampling.client import api_key

    chosen = benchmarks.select(args.benchmarks)
    base = config.from_dict(suite.PROTOCOL)
    recipe = config.from_command_line(base, overrides + _samplers(args), "jaxrl eval MODEL --benchmarks LIST")
    recipe = config.from_dict(config.to_dict(recipe), "command line")
    if recipe.eval.samples != base.eval.samples:
        raise InputError("--eval.samples is for held-out problems; benchmarks take --samples")
    prompt = judge.read_prompt(args.judge_prompt) if args.judge_prompt else judge.PROMPT
    where = _place(recipe)  # before JAX looks for GPUs
    started = args.judge if args.judge and "://" not in args.judge else ""
    judge_place = servers.place(int(bool(started)), trains=recipe.rollout.engine == "local")
    judge_folder = hf.resolve(started) if started else ""
    folder, out = _model_of(args.model, args.out)

    @contextlib.contextmanager
    def asked() -> Iterator[judge.Judge]:
        url, name, key = args.judge, args.judge_model, os.environ.get("JUDGE_API_KEY", "")
        with contextlib.ExitStack() as stack:
            if started:
                name, key = started, api_key()
                (server,) = stack.enter_context(servers.running(
                    1, recipe.sampler.vllm, str(judge_folder), out / "judge", where=judge_place,
                    dtype=recipe.model.dtype, max_tokens=0, chat=True,
                    options=["--served-model-name", name, *recipe.sampler.vllm_options],
                ))  # fmt: skip
                url = server.url
            yield judge.Judge(
                url, out / "judge.jsonl", key=key, model=name, prompt=prompt, tail=args.judge_tail or judge.TAIL,
                released=args.protocol == "justrl_released",
            )  # fmt: skip

    with suite.alone(out):
        results = suite.evaluate(
            args.model, folder, chosen, recipe, out, local=args.data, samples=args.samples, protocol=args.protocol,
            judge=asked if args.judge else None, where=where,
        )  # fmt: skip
    print((out / "results.md").read_text())
    print(f"{len(results['benchmarks'])} benchmarks -> {out}")


def _place(recipe: config.Recipe) -> Any:
    """Where servers run that are started to evaluate: on all GPUs, while this process does with a CPU."""
    from jaxrl.sampling import servers

    if recipe.rollout.engine == "vllm" and recipe.sampler.transport == "files":
        import jax

        jax.config.update("jax_platforms", "cpu")
    return servers.place(recipe.sampler.servers, trains=False)


def _model_of(model: str, out: str | None) -> tuple[Path, Path]:
    """The Hugging Face folder that is meant, exported first where it is a run's, and the folder for results."""
    from jaxrl.models import hf

    path = Path(model)
    if path.parent.name != "checkpoints" and not (path / "checkpoints").is_dir():
        return hf.resolve(model), Path(out or Path("runs/benchmarks") / path.name)
    run, step = _run_of(path)
    folder = run / "hf" if step is None else run / "benchmarks" / f"step_{step:06d}" / "hf"
    step = _write_hf(path, folder, "bfloat16")
    return folder, Path(out or run / "benchmarks" / f"step_{step:06d}")


def _export(args: argparse.Namespace, _: list[str]) -> None:
    source = Path(args.run_or_checkpoint)
    out = Path(args.out) if args.out else _run_of(source)[0] / "hf"
    _write_hf(source, out, args.dtype)


def _run_of(source: Path) -> tuple[Path, int | None]:
    """The run folder and the step that a path to a run or to one of its checkpoints means."""
    if source.parent.name == "checkpoints" and source.name.isdigit() and source.is_dir():
        return source.parent.parent, int(source.name)
    if (source / "checkpoints").is_dir():
        return source, None
    raise InputError(f"{source}: neither a run folder nor a checkpoint (RUN/checkpoints/N); check the path")


def _write_hf(source: Path, out: Path, dtype: str) -> int:
    """Exports the newest or the given checkpoint; returns its step."""
    import jax

    from jaxrl.checkpoint import Checkpoints
    from jaxrl.distributed import make_mesh, sharding_of
    from jaxrl.models import decoder, hf

    run, step = _run_of(source)
    checkpoints = Checkpoints(run / "checkpoints", read_only=True)
    step = step if step is not None else checkpoints.latest()
    if step is None:
        raise InputError(f"{run}: has no checkpoint yet; train until the first one is written")
    folder = hf.resolve(checkpoints.recipe(step).model.path)
    model_config, mesh = hf.read_config(folder), make_mesh()

    def shard(a: Any) -> Any:
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding_of(a.shape, mesh))

    like = jax.tree.map(shard, jax.eval_shape(lambda: decoder.initialise(model_config, 0)))
    params = checkpoints.restore_params(step, like)
    hf.save(hf.Model(model_config, params, folder), out, dtype)
    print(f"step {step} of {run} -> {out} ({dtype})")
    return step


def _plan(args: argparse.Namespace, overrides: list[str]) -> None:
    recipe = config.load(args.recipe, overrides)
    from jaxrl import plan

    result = plan.plan(
        recipe,
        plan.Assumptions(**{f.name: getattr(args, f.name) for f in dataclasses.fields(plan.Assumptions)}),
    )
    plan.show(result)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2))


def _report(args: argparse.Namespace, _: list[str]) -> None:
    from jaxrl import analysis
    from jaxrl.report import report

    written = report(args.runs, args.out, args.rollouts)
    for directory in args.runs:
        used = analysis.budget(analysis.read_run(directory))
        print(
            f"{directory}: " + ", ".join(f"{analysis.number(value)} {name}" for name, value in used.items())
        )
    for path in written:
        print(path)


if __name__ == "__main__":
    main()
