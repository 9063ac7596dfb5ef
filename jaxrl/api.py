"""Whole experiments from Python: what `jaxrl train`, `eval` and `export` do, with Python's own rows and functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

from jaxrl import config
from jaxrl.errors import InputError
from jaxrl.objects import Rewards, Rows, paths_of
from jaxrl.types import Dtype, Say

if TYPE_CHECKING:
    from jaxrl.run import LoadEvaluation

NONE: Mapping[str, object] = MappingProxyType({})


def train(
    recipe: str | Path | config.Recipe,
    changes: Mapping[str, object] = NONE,
    *,
    data: Rows | None = None,
    held_out: Rows | None = None,
    reward: Rewards | None = None,
    say: Say = print,
    quiet: bool = False,
) -> Path:
    """Trains until `run.steps`; the same call goes on where a run stopped, and so does `jaxrl train RUN/recipe.toml`.

    Args:
      recipe: path of a recipe, the name of one that comes along, or a recipe.
      changes: values by "section.key", such as {"run.steps": 10}; "stages" is the whole list.
      data: rows to train on in place of data.path: dicts by column, a `datasets.Dataset`, a `pandas.DataFrame`, or a
        path. Which columns are read is the recipe's to say. They are kept in the run folder.
      held_out: rows to evaluate on in place of eval.path.
      reward: what is added to the verifier's reward in place of reward.function: a function, several, or a dict of
        names and functions, or of names and (function, weight). See docs/rewards.md; they run in other processes.
      say: prints a line.
      quiet: whether to show no progress.

    Returns:
      the run folder, with metrics.jsonl, rollouts/ and checkpoints/.

    Raises:
      InputError: for a recipe, model, data or function that cannot be used.
      RunError: where a host, a server or the disk failed; the same call goes on from the last checkpoint.
      KeyboardInterrupt, SystemExit: after Ctrl-C or SIGTERM, once the step under way is saved.
    """
    draft = config.draft(recipe, changes)
    found = config.load(recipe, {**changes, **paths_of(draft, data, held_out, reward)})
    train_loaded(found, say, quiet)
    return Path(found.run.directory)


def train_loaded(recipe: config.Recipe, say: Say = print, quiet: bool = False) -> None:
    """`train` by a recipe as it is."""
    from jaxrl import loop

    loop.train(recipe, cast("LoadEvaluation", _evaluation("default")), say, quiet)
    if recipe.run.trackers:
        _send_report(recipe, say)


def evaluate(
    model: str | Path,
    recipe: str | Path | config.Recipe | None = None,
    changes: Mapping[str, object] = NONE,
    *,
    held_out: Rows | None = None,
    **options: object,
) -> Mapping[str, object]:
    """Measures accuracy on a recipe's held-out problems, or on benchmarks.

    Args:
      model: Hugging Face folder, Hub id, or run folder, whose newest checkpoint is exported first.
      recipe: with [data], [reward] and [eval]; None takes the run's own.
      changes: values by "section.key", such as {"eval.samples": 4}.
      held_out: rows to evaluate on in place of eval.path, see `train`.
      **options: as those of `jaxrl eval`, such as name="before", benchmarks="aime24,math500", samples=4 or
        judge="http://localhost:8001".

    Returns:
      what the command writes as JSON, of which "accuracy" and its interval "ci95" are those of held-out problems.

    Raises:
      InputError: if something cannot be used, or the sampler refuses a problem.
      RunError: if a server stops, does not get ready or does not answer.
      TypeError: for an option that there is not.
    """
    call = cast(Callable[..., Mapping[str, object]], _evaluation("evaluate"))
    return call(str(model), recipe, changes, held_out, options)


def export(
    source: str | Path, out: str | Path | None = None, dtype: Dtype = "bfloat16", say: Say = print
) -> Path:
    """Writes a checkpoint as a Hugging Face folder, which transformers and vLLM load.

    Args:
      source: a run folder, whose newest checkpoint is taken, or RUN/checkpoints/N.
      out: the folder to write; None is hf in the run folder.
      dtype: of the model weights.
      say: prints a line.

    Returns:
      the folder.

    Raises:
      InputError: if there is no checkpoint, it is damaged, or the model folder that the run began with cannot be read.
      RunError: if a disk fails.
    """
    from jaxrl import exports

    folder = Path(out) if out else exports.run_of(Path(source))[0] / "hf"
    exports.export(Path(source), folder, dtype, say)
    return folder


def _evaluation(name: str) -> Callable[..., object]:
    """What a package evaluates by: the trainer knows no benchmark."""
    found = entry_points(group="jaxrl.evaluation", name=name)
    if len(found) != 1:
        raise InputError(f"{len(found)} packages evaluate, not one; install jaxrl again")
    return cast(Callable[..., object], next(iter(found)).load())


def _send_report(recipe: config.Recipe, say: Say) -> None:
    """Gives the finished run's report to its trackers; a line says if that fails."""
    from jaxrl.parallel import processes
    from jaxrl.report.figures import report
    from jaxrl.telemetry.expendable import Expendable
    from jaxrl.telemetry.services import open_services

    def send() -> None:
        page = next(path for path in report([Path(recipe.run.directory)]) if path.suffix == ".html")
        with open_services(recipe, True, say) as services:
            for service in services:
                service.file(page)

    if processes.chief():
        Expendable("report.html", say, "no tracker got it")(send)
