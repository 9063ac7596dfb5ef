"""Services that people follow their runs in: W&B, trackio, MLflow, or one's own. None can stop a run, or slow it."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import queue
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

from jaxrl import __version__, config
from jaxrl.errors import InputError
from jaxrl.files import write_atomically
from jaxrl.plugins import is_plugin, load_plugin
from jaxrl.telemetry.expendable import Expendable
from jaxrl.telemetry.trackers import Tracker, is_evaluation
from jaxrl.types import Detokenize, Groups, JsonObject, Say, TrackerName

FOLDER = "trackers"
PATIENCE = 60.0  # seconds that a service has at the end for what it was given
PROMPTS, ANSWERS = 2, 8  # of a step's table, at most
Row = Mapping[str, str | float]  # of the table of answers


@dataclasses.dataclass(frozen=True)
class Subject:
    """The run that a service is to show."""

    id: str  # the same after a restart
    name: str
    project: str
    directory: Path
    config: Mapping[str, object]  # the recipe by "section.key", and the version of the code


class Service(Protocol):
    """A run at a service; a function of one's own that makes one takes a `Subject`."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes finite metrics of a step, 0 for the first."""

    def answers(self, step: int, rows: Sequence[Row]) -> None:
        """Takes some of a step's answers, which have the same columns."""

    def file(self, path: Path) -> None:
        """Takes a file of the run, such as its report."""

    def close(self) -> None: ...


class _LikeWandB:
    """What W&B and trackio have in common: a module with `Table`, and a run that its `init` opens."""

    def __init__(self, module: ModuleType, subject: Subject, **options: object) -> None:
        self._module = module
        self._run = module.init(
            project=subject.project, resume="allow", config=dict(subject.config), **options
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def answers(self, step: int, rows: Sequence[Row]) -> None:
        table = self._module.Table(columns=[*rows[0]], data=[[*row.values()] for row in rows])
        self._run.log({"rollouts": table}, step=step)

    def close(self) -> None:
        self._run.finish()


class WandB(_LikeWandB):
    """A run of Weights & Biases; WANDB_MODE=offline writes it into the run folder, for `wandb sync`."""

    def __init__(self, subject: Subject) -> None:
        import wandb

        # the console and the machine are the run's to report
        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
        folder = str(subject.directory)
        super().__init__(wandb, subject, id=subject.id, name=subject.name, dir=folder, settings=settings)

    def file(self, path: Path) -> None:
        artifact = self._module.Artifact(f"{self._run.id}-{path.stem}", type="report")
        artifact.add_file(str(path))
        self._run.log_artifact(artifact)


class Trackio(_LikeWandB):
    """A run of trackio, in its local database, or where TRACKIO_SPACE_ID says."""

    def __init__(self, subject: Subject) -> None:
        import trackio

        name = f"{subject.name}-{subject.id[:4]}"  # two runs may have the name of a folder
        super().__init__(trackio, subject, name=name, embed=False, auto_log_cpu=False, auto_log_gpu=False)

    def file(self, path: Path) -> None:
        """trackio keeps no files of a run."""


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI; `project` is the experiment."""

    def __init__(self, subject: Subject) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._client = Metric, MlflowClient()
        found = self._client.get_experiment_by_name(subject.project)
        experiment = found.experiment_id if found else self._client.create_experiment(subject.project)
        known = self._client.search_runs([experiment], f"tags.jaxrl = '{subject.id}'")
        if known:
            self._id = known[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        self._id = self._client.create_run(
            experiment, run_name=subject.name, tags={"jaxrl": subject.id}
        ).info.run_id
        values = [Param(key, str(value)[:6000]) for key, value in subject.config.items()]
        for first in range(0, len(values), 100):  # the most that it takes at once
            self._client.log_batch(self._id, params=values[first : first + 100])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        values = [
            self._metric(name.replace("@", "_at_"), value, now, step) for name, value in metrics.items()
        ]
        self._client.log_batch(self._id, metrics=values)

    def answers(self, step: int, rows: Sequence[Row]) -> None:
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        self._client.log_dict(self._id, columns, f"rollouts/step_{step:06d}.json")

    def file(self, path: Path) -> None:
        self._client.log_artifact(self._id, str(path))

    def close(self) -> None:
        self._client.set_terminated(self._id)


Make = Callable[[Subject], Service]
SERVICES: dict[TrackerName, Make] = {"wandb": WandB, "trackio": Trackio, "mlflow": MLflow}


class Remote(Tracker):
    """A service's run, fed by a thread of its own. Once it fails, a line says so, and it is left out.

    trackers/NAME.json in the run folder has its id and the last step that it took: one that is trained again after a
    restart, with the same result, is not given twice.
    """

    def __init__(self, name: str, path: Path, subject: Subject, make: Make, say: Say) -> None:
        self._name, self._path, self._id, self._say = name, path, subject.id, say
        self._attempt = Expendable(name, say, "this tracker failed")
        self._taken = int(_read(path).get("step", -1))
        self._jobs: queue.SimpleQueue[Callable[[Service], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=(subject, make), name=name, daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        found = {name: value for name, value in metrics.items() if value is not None}

        def job(service: Service) -> None:
            service.log(step, found)
            if not is_evaluation({"step": step, **metrics}):
                write_atomically(self._path, json.dumps({"id": self._id, "step": step}))

        if step > self._taken:
            self._jobs.put(job)

    def answers(self, step: int, rows: Sequence[Row]) -> None:
        if rows and step > self._taken:
            self._jobs.put(lambda service: service.answers(step, rows))

    def file(self, path: Path) -> None:
        self._jobs.put(lambda service: service.file(path))

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            self._say(
                f"{self._name}: this tracker has not taken all after {PATIENCE:.0f} s, and is left behind"
            )

    def _work(self, subject: Subject, make: Make) -> None:
        services = list[Service]()
        self._attempt(lambda: services.append(make(subject)))
        while job := self._jobs.get():
            self._attempt(functools.partial(job, *services))
        self._attempt(lambda: services[0].close())


def makers(names: Sequence[str]) -> dict[str, Make]:
    """What opens each service, by its name in `run.trackers`.

    Raises:
      InputError: for one that is not installed, or a function of one's own that cannot be imported.
    """
    found = dict[str, Make]()
    for name in names:
        if is_plugin(name):
            found[name] = cast(Make, load_plugin("run.trackers", name))
        elif importlib.util.find_spec(name) is None:
            raise InputError(f"run.trackers: {name} is not installed; pip install {name}, or leave it out")
        else:
            found[name] = SERVICES[cast(TrackerName, name)]
    return found


@contextmanager
def open_services(recipe: config.Recipe, enabled: bool, say: Say) -> Iterator[list[Remote]]:
    """The run's services; none where not enabled. Their ids are in its folder, so that a restart goes on with the same.

    Args:
      recipe: which [run] names them, and which they are shown.
      enabled: whether this process reports.
      say: prints a line.

    Raises:
      InputError: see `makers`.
    """
    section, directory = recipe.run, Path(recipe.run.directory)
    wanted = makers(section.trackers) if enabled else {}
    shown = {**config.flat(recipe), **versions()} if wanted else {}
    with ExitStack() as stack:
        opened = []
        for name, make in wanted.items():
            path = directory / FOLDER / f"{name.replace(':', '.')}.json"
            known = _read(path)
            if "id" not in known:
                path.parent.mkdir(exist_ok=True)
                known = {"id": uuid.uuid4().hex[:8]}
                write_atomically(path, json.dumps(known))
            subject = Subject(known["id"], directory.resolve().name, section.project, directory, shown)
            opened.append(Remote(name, path, subject, make, say))
            stack.callback(opened[-1].close)
        yield opened


def table(groups: Groups, detokenize: Detokenize) -> list[Row]:
    """Some of a step's answers, those to its first prompts, for people to read."""
    rows = list[Row]()
    for group in groups[:PROMPTS]:
        for r in group[:ANSWERS]:
            texts = {
                "prompt": detokenize(r.prompt.tokens),
                "answer": r.prompt.answer,
                "response": detokenize(r.tokens),
            }
            how = {
                "finish_reason": r.finish_reason,
                "tokens": float(len(r.tokens)),
                "version": float(r.version),
            }
            rows.append({**texts, "score": r.score, "reward": r.reward, **how})
    return rows


def versions() -> dict[str, str]:
    """The version of this package, and the commit where it is a checkout."""
    folder, found = Path(__file__).parents[2], {"jaxrl.version": __version__}
    if (folder / ".git").exists():
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
        with suppress(OSError, subprocess.CalledProcessError):  # no git, or a folder of another user
            shown = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
            found["jaxrl.commit"] = shown.strip()
    return found


def _read(path: Path) -> JsonObject:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
