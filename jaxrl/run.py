"""Opening a run: everything that a recipe names, loaded and checked, and then what has to be closed again."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
from blake3 import blake3
from jax.sharding import Mesh

from jaxrl import config, data, prepare
from jaxrl.checkpoint import CONTENT_KEYS, DATA_KEYS, REWARD_KEYS, Checkpoints, Resumed, content_key
from jaxrl.collect import Collector, Work
from jaxrl.config.stages import needs_reference, reference_at
from jaxrl.errors import InputError, RunError
from jaxrl.files import at_home, write_atomically, writing
from jaxrl.grpo.update import TrainState
from jaxrl.ledger import Ledger
from jaxrl.ledger import from_json as ledger_from_json
from jaxrl.marking import make_marker
from jaxrl.metrics import Record, step_metrics
from jaxrl.models import decoder, hf
from jaxrl.models.tensors import hash_weights
from jaxrl.parallel import processes
from jaxrl.parallel.mesh import make_mesh
from jaxrl.parallel.signals import Stop
from jaxrl.programs import Programs, build_programs, objective_of, require_room, same_programs
from jaxrl.reference import Reference, as_reference, take
from jaxrl.results import evaluation_metrics
from jaxrl.rewards.functions import Functions, columns_of, digest_of
from jaxrl.sampling.across_processes import Shared
from jaxrl.sampling.local import require_positions
from jaxrl.sampling.open import open_sampler
from jaxrl.sampling.servers import Devices
from jaxrl.telemetry import agreement
from jaxrl.telemetry.history import FILE, History
from jaxrl.telemetry.profile import Compilations, Profile, resources
from jaxrl.telemetry.progress import Progress
from jaxrl.telemetry.rollouts import write_rollouts
from jaxrl.telemetry.services import Remote, makers, open_services, table
from jaxrl.telemetry.timer import Phase, Timer, watchdog
from jaxrl.telemetry.trackers import Tracker, finite, history, open_trackers, read_rows
from jaxrl.types import Detokenize, SamplingParams, Say, Tokenizer


class Evaluation(Protocol):
    """Evaluates a run while it trains."""

    def __call__(self, run: Run, steps: int) -> None:
        """Makes the results that are missing, of the parameters that the run's sampler holds after so many steps."""

    def missing(self, setup: Setup, steps: int) -> bool:
        """Whether a result of this run after so many steps is missing."""


# Reads an evaluation's problems; a bad file is then named before a sampler or a server is started.
LoadEvaluation = Callable[[config.Recipe, Tokenizer, data.Vocabulary], Evaluation]


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a recipe names, loaded and checked. Nothing is written, and nothing has to be closed."""

    recipe: config.Recipe
    stages: Sequence[config.Stage]
    directory: Path  # the run folder
    folder: Path  # the model's Hugging Face folder
    model: decoder.Config
    mesh: Mesh
    tokenizer: Tokenizer
    detokenize: Detokenize  # without special tokens
    works: Sequence[Work]  # of each stage, with all its prompts
    evaluation: Evaluation | None
    compilations: Compilations
    began: float  # time.monotonic()
    say: Say
    _programs: dict[int, Programs] = dataclasses.field(default_factory=dict)  # by stage

    @functools.cached_property
    def _digests(self) -> dict[str, str]:
        """Digests of what the paths of each stage hold, by `checkpoint.content_key`."""
        model = blake3(hash_weights(self.folder).encode() + (self.folder / "config.json").read_bytes())
        found, sets = (
            {"model.path": model.hexdigest()},
            {id(work.prompts): work.prompts for work in self.works},
        )
        digests = {name: prompts.digest() for name, prompts in sets.items()}  # stages share them
        for work in self.works:
            found |= {content_key(work.stage.number, key): digests[id(work.prompts)] for key in DATA_KEYS}
            if functions := digest_of(work.recipe.reward):
                own = blake3(functions.encode()).hexdigest()
                found |= {content_key(work.stage.number, key): own for key in REWARD_KEYS}
        return found

    def content(self, steps: int) -> dict[str, str]:
        """Digests of what the recipe's paths hold, by key, of the stages that begin before so many steps are done."""
        ahead = [stage.number for stage in self.stages if stage.number and stage.first >= steps]
        keys = {content_key(number, key) for number in ahead for key in CONTENT_KEYS}
        return {key: digest for key, digest in self._digests.items() if key not in keys}

    def stage_at(self, step: int) -> config.Stage:
        return config.stage_at(self.stages, step)

    def programs(self, stage: config.Stage) -> Programs:
        """The programs of a stage; those of an earlier one where they are the same."""
        known = self._programs
        if stage.number not in known:
            same = [known[n] for n in known if same_programs(self.stages[n].recipe, stage.recipe)]
            built = same or [build_programs(stage.recipe, self.model, self.mesh, self.say)]
            known[stage.number] = built[0]
        return known[stage.number]

    def work(self, stage: config.Stage, dropped: frozenset[str]) -> Work:
        """The stage, without the prompts that are left out as solved.

        Raises:
          InputError: if none is left.
        """
        work = self.works[stage.number]
        if not dropped:
            return work
        prompts = work.prompts.without(dropped)
        if not prompts.prompts:
            raise InputError(
                f"{stage.title}: data.drop_solved = {stage.recipe.data.drop_solved} leaves none of the "
                f"{len(work.prompts.prompts)} prompts of {work.prompts.path}; raise it, or take other data"
            )
        return dataclasses.replace(work, prompts=prompts)

    def evaluates(self, steps: int) -> bool:
        """Whether the recipe wants an evaluation after so many steps: before the first, every so often, at the end."""
        every = self.stage_at(steps - 1).recipe.eval.every
        if self.evaluation is None or not every:
            return False
        return steps % every == 0 or steps == self.recipe.run.steps

    def owes(self, steps: int) -> bool:
        """Whether an evaluation after so many steps is wanted and missing: a stop may have come before its end."""
        return self.evaluates(steps) and self.evaluation is not None and self.evaluation.missing(self, steps)

    def compile_ahead(self, step: int) -> AbstractContextManager[None]:
        """Compiles what a step's stage needs, in background threads; see `Programs.compile_ahead`."""
        if step >= self.recipe.run.steps:
            return nullcontext()
        stage = self.stage_at(step)
        return self.programs(stage).compile_ahead(prepare.needs_logprobs(stage.recipe))


@dataclasses.dataclass(frozen=True)
class Carry:
    """All that a run carries from one step to the next; a checkpoint holds what does not follow from the recipe."""

    step: int  # done
    state: TrainState
    ledger: Ledger
    reference: Reference | None  # where the stage has a KL term


@dataclasses.dataclass(frozen=True)
class Run:
    """An open run."""

    setup: Setup
    start: int  # steps that were done before
    sampler: Shared
    checkpoints: Checkpoints
    trackers: Sequence[Tracker]
    services: Sequence[Remote]
    history: History | None  # of the first process
    progress: Progress
    timer: Timer
    profile: Profile
    say: Say
    differences: list[float]  # `agreement.METRIC` of the steps so far, where it is known
    tokens: list[float]  # sampled in the steps so far, where it is known
    opening: dict[str, float]  # seconds before the first step, as metrics

    @property
    def recipe(self) -> config.Recipe:
        return self.setup.recipe

    def collector(self, work: Work, ledger: Ledger) -> Collector:
        """Samples the steps of a stage, and shows that."""
        progress, samples = self.progress, work.recipe.rollout.samples

        def on_more(step: int, prompts: int, bad: int) -> None:
            low, high = work.recipe.groups.keep
            progress.sampling_more(step, prompts * samples, f"{bad} groups out of {low} to {high}")

        return Collector(work, self.sampler, ledger.cursor, ledger.answers, progress.sampled, on_more)

    def save(self, carry: Carry) -> None:
        """Starts writing a checkpoint."""
        with self.phase("checkpoint"):
            ledger = carry.ledger.to_json(self.setup.stages, carry.step)
            self.checkpoints.save(
                carry.step, carry.state, self.recipe, self.setup.content(carry.step), ledger
            )

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Times a phase of a step and shows it."""
        with self.timer(name):
            self.progress.phase(name.replace("_", " "))
            yield

    def log(self, work: Work, step: int, record: Record) -> InputError | None:
        """Reports a step: trackers, rollout files, progress. Returns why the run has to end after it, if it has to."""
        with self.phase("report"):
            run, metrics = self.recipe.run, step_metrics(work.recipe, self.setup.model, step, record)
            if len(self.setup.stages) > 1:
                metrics["run/stage"] = float(work.stage.number + 1)
            self.tokens.append(metrics["sampler/tokens"])
            metrics["sampler/tokens_total"] = sum(self.tokens)
            if self.setup.evaluates(step):
                metrics |= evaluation_metrics(self.setup.directory, step)
            metrics |= {"perf/compilations": float(self.setup.compilations.new())} | resources()
            metrics["time/compilation_wait"] = self.setup.programs(work.stage).waited()
            if step == self.start:
                metrics |= self.opening | {
                    "time/compilation": self.setup.compilations.seconds,
                    "time/first_step": time.monotonic() - self.setup.began,
                }
            keeps = bool(run.rollouts_every) and step % run.rollouts_every == 0
            rows = table(record.sampled, self.setup.tokenizer.decode) if keeps and self.services else []
            for service in self.services:  # before the step's metrics, which end it
                service.answers(step, rows)
            for tracker in (*self.trackers, *self.services):
                tracker.log(step, finite(metrics))
            if self.history:
                self.history.log(step, record.sampled)
            if processes.chief() and keeps:
                decode = self.setup.tokenizer.decode
                write_rollouts(self.setup.directory, step, record.sampled, decode, run.rollouts_keep)
        self.progress.step_done(step, metrics)
        if step == self.start:
            self.say(first_step_line(metrics))
        return self._disagreement(step, metrics[agreement.METRIC], work.recipe.sampler.logprob_diff_limit)

    def _disagreement(self, step: int, value: float, limit: float) -> InputError | None:
        """Says where sampler and trainer agree less than before; the reason to end the run where the recipe has one."""
        line = agreement.disagreement(self.differences, value)
        if line:
            self.say(f"step {step + 1}: {line}")
        if np.isfinite(value):
            self.differences.append(value)
        if not limit or not value > limit:
            return None
        return InputError(
            f"step {step + 1}: {agreement.METRIC} = {value:.2g} is above sampler.logprob_diff_limit = {limit}; look at "
            f"the servers' options and logs, and delete checkpoints/{step + 1} if the step is to be taken again"
        )

    def evaluate(self, steps: int) -> None:
        """Evaluates what the sampler holds after so many steps, where the recipe wants that.

        The results are metrics of the step that begins with these parameters; the last ones have a row of their own.
        """
        if self.setup.evaluates(steps) and self.setup.evaluation:
            with self.timer("evaluation"):
                self.setup.evaluation(self, steps)
            if steps == self.recipe.run.steps and (last := evaluation_metrics(self.setup.directory, steps)):
                for tracker in (*self.trackers, *self.services):
                    tracker.log(steps, finite(last))


def first_step_line(metrics: Mapping[str, float]) -> str:
    """A line that says what the time to the first step went into."""
    first, load, start, step, wait, compiled = (
        f"{metrics[f'time/{name}']:.1f} s"
        for name in ("first_step", "load", "open", "step", "compilation_wait", "compilation")
    )
    return (
        f"the first step ended after {first}: loading {load}, starting the sampler {start}, the step {step}, of which "
        f"{wait} waited for programs; all compilations took {compiled}, the background's included"
    )


def load(recipe: config.Recipe, load_evaluation: LoadEvaluation | None, say: Say) -> Setup:
    """Loads and checks what the recipe names.

    Args:
      recipe: the run's.
      load_evaluation: what evaluates during training; needed where `eval.every` is set.
      say: prints a line.

    Raises:
      InputError: for whatever cannot be used.
    """
    began = time.monotonic()
    makers(recipe.run.trackers)  # a service that is not installed is named before anything is loaded
    if recipe.run.compilation_cache:
        _keep_programs(at_home(recipe.run.compilation_cache), say)
    compilations = Compilations()
    stages = config.stages_of(recipe)
    for stage in stages:
        with _about(stage, stages):
            columns_of(stage.recipe.reward)  # looks at what it names before anything is loaded
    mesh = make_mesh(recipe.mesh.data, recipe.mesh.fsdp)
    folder = hf.resolve(recipe.model.path)
    model = hf.read_config(folder)
    for stage in stages:
        with _about(stage, stages):
            require_room(stage.recipe, model, mesh)
            objective_of(stage.recipe)  # imports what it names
    tokenizer = data.load_tokenizer(str(folder))
    detokenize = data.detokenizer(tokenizer)
    vocabulary = data.read_vocabulary(folder, tokenizer, model.vocab_size)
    works = list(_works(stages, model, tokenizer, detokenize, vocabulary, say))
    say(vocabulary.summary)
    evaluation = None
    if any(stage.recipe.eval.every for stage in stages):
        if not load_evaluation:
            raise InputError(
                f"eval.every = {recipe.eval.every}, and nothing evaluates; set it to 0, or give train an evaluation, "
                "such as evals.in_training.load"
            )
        evaluation = load_evaluation(recipe, tokenizer, vocabulary)
    return Setup(
        recipe=recipe,
        stages=stages,
        directory=Path(recipe.run.directory),
        folder=folder,
        model=model,
        mesh=mesh,
        tokenizer=tokenizer,
        detokenize=detokenize,
        works=works,
        evaluation=evaluation,
        compilations=compilations,
        began=began,
        say=say,
    )


@contextmanager
def _about(stage: config.Stage, stages: Sequence[config.Stage]) -> Iterator[None]:
    """Has errors name the stage, where there are several."""
    try:
        yield
    except InputError as error:
        if len(stages) == 1:
            raise
        raise InputError(f"{stage.title}: {error}") from error


def _works(
    stages: Sequence[config.Stage],
    model: decoder.Config,
    tokenizer: Tokenizer,
    detokenize: Detokenize,
    vocabulary: data.Vocabulary,
    say: Say,
) -> Iterator[Work]:
    """What each stage's recipe names; prompts are read once where stages have the same."""
    sets: list[tuple[config.Data, str | None, dict[str, str], data.PromptSet]] = []
    called: list[tuple[config.Reward, Functions]] = []
    for stage in stages:
        r = stage.recipe
        section, verifier = dataclasses.replace(r.data, drop_solved=1.0, order="shuffle"), r.reward.marked_by
        columns = columns_of(r.reward)
        prompts = next((known for *key, known in sets if key == [section, verifier, columns]), None)
        functions = next((known for reward, known in called if reward == r.reward), None)
        with _about(stage, stages):
            if prompts is None:
                prompts = data.load_prompts(
                    section, tokenizer, verifier=verifier, vocabulary=vocabulary, columns=columns
                )
                sets.append((section, verifier, columns, prompts))
                say(prompts.summary() if len(stages) == 1 else f"{stage.title}: {prompts.summary()}")
            if stage.number and r.rollout.engine == "local":
                for prompt in prompts.prompts:
                    require_positions(prompt, r.rollout.max_tokens, model)
            if r.reward.named and not functions:
                functions = Functions(r.reward, Path(r.run.directory) / "rewards.log")
                functions.try_out(prompts.prompts[0], detokenize, say)
                called.append((r.reward, functions))
            yield Work(
                stage,
                prompts,
                prepare.make_method(r),
                make_marker(r, detokenize, functions),
                SamplingParams(
                    r.rollout.temperature,
                    r.rollout.top_p,
                    r.rollout.top_k,
                    r.rollout.max_tokens,
                    vocabulary.stop_ids,
                ),
                functions,
            )


def _keep_programs(cache: Path, say: Say) -> None:
    """Has JAX keep compiled programs in a folder, where that can be."""
    if str(cache).startswith("~"):
        say(
            "this user has no home directory, so programs are compiled anew; set run.compilation_cache to keep them"
        )
        return
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        say(
            f"run.compilation_cache = {cache} cannot be made ({error.strerror}), so programs are compiled anew"
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(cache))


def resume(
    setup: Setup, checkpoints: Checkpoints, say: Say, raise_if_stopped: Callable[[], None] = lambda: None
) -> Carry:
    """The state after the steps done: from the newest checkpoint, or else 0 and the model folder's weights.

    Args:
      setup: see `load`.
      checkpoints: the run's.
      say: prints a line.
      raise_if_stopped: raises what a signal has asked for.

    Raises:
      InputError: if another recipe wrote the checkpoint, or it or the model cannot be read.
      RunError: if the checkpoint cannot be read now.
    """
    latest = checkpoints.latest() or 0
    if not latest:
        carry = beginning(setup)
        checkpoints.warm_up(carry.state)
        return carry
    like = setup.programs(setup.stage_at(latest)).abstract_state()
    found = checkpoints.resume(setup.recipe, like, say, raise_if_stopped, setup.content(latest))
    if found.step < setup.recipe.run.steps:
        say(f"going on from step {found.step}")
    return _carried(setup, found)


def carry_at(setup: Setup, checkpoints: Checkpoints, step: int) -> Carry:
    """The state after so many steps, of which there is a checkpoint.

    Raises:
      InputError, RunError: see `Checkpoints.at`.
    """
    like = setup.programs(setup.stage_at(step)).abstract_state()
    return _carried(setup, checkpoints.at(step, setup.recipe, like, setup.content(step)))


def beginning(setup: Setup) -> Carry:
    """The state before the first step, with the model folder's weights."""
    params = hf.load(setup.folder, mesh=setup.mesh).params
    return Carry(0, setup.programs(setup.stage_at(0)).init_state(params), Ledger(), None)


def _carried(setup: Setup, found: Resumed) -> Carry:
    ledger = ledger_from_json(found.ledger, setup.stages, found.step)
    return Carry(found.step, found.state, ledger, found.reference)


def with_reference(setup: Setup, checkpoints: Checkpoints, carry: Carry) -> Carry:
    """What a step begins with: the reference that its recipe names, taken from the policy where it starts anew here.

    Raises:
      InputError: if it was never kept, or cannot be read or written.
    """
    stage, since = setup.stage_at(carry.step), reference_at(setup.stages, carry.step)
    dtype, wanted, held = setup.recipe.model.dtype, stage.recipe.kl.coefficient > 0, carry.reference
    if (wanted and held and held.step == since) or not (wanted or held or since):
        return carry
    found = held
    if since and since == carry.step and needs_reference(setup.stages, since, since):
        found = take(carry.state.params, dtype, since)
        checkpoints.keep_reference(found)
    elif wanted and not since:
        found = Reference(0, hf.load(setup.folder, dtype, mesh=setup.mesh).params)
    elif wanted:
        like = as_reference(setup.programs(stage).abstract_state().params, dtype)
        with checkpoints.explaining(carry.step):
            found = checkpoints.reference(like)
    elif carry.step == stage.first and not needs_reference(setup.stages, since, carry.step):
        checkpoints.keep_reference(None)
    if wanted and (not found or found.step != since):
        raise InputError(
            f"{stage.title}: its reference is the policy after {since} steps, which was not kept, since no stage had "
            'a KL term with it; add "reference" to its restart'
        )
    if held and (held is not found or not wanted):  # whoever else names it, its memory is needed
        jax.tree.map(lambda x: x.delete(), held.params)
    return dataclasses.replace(carry, reference=found if wanted else None)


def open_checkpoints(recipe: config.Recipe) -> Checkpoints:
    """The checkpoints of the recipe's run folder, which is made if missing."""
    directory = Path(recipe.run.directory)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    section = recipe.checkpoint
    return Checkpoints(directory / "checkpoints", section.keep_last, section.keep_every)


@contextmanager
def open_run(
    setup: Setup,
    checkpoints: Checkpoints,
    start: int,
    devices: Devices,
    say: Say,
    stop: Stop,
    quiet: bool = False,
) -> Iterator[Run]:
    """Opens sampler, trackers and progress of a run that goes on from `start`; all of it ends with the context.

    Args:
      setup: see `load`.
      checkpoints: closed last: whatever happens, a write under way is finished.
      start: steps done.
      devices: where started vLLM servers run.
      say: prints a line.
      stop: once it is asked for, no server is waited for any more.
      quiet: whether to show no progress.
    """
    recipe, directory, chief = setup.recipe, setup.directory, processes.chief()
    if chief:
        write_atomically(directory / "recipe.toml", config.to_toml(recipe))
    loaded = time.monotonic()
    before, _ = read_rows(directory / "metrics.jsonl")
    timer = Timer()
    with (
        watchdog(timer, print),
        _closing_functions(setup),
        _finishing(checkpoints, timer),
        open_sampler(
            recipe, setup.folder, setup.model, setup.mesh, say, devices, lambda: stop.asked
        ) as sampler,
        Progress(recipe.run.steps, start, title=directory.name, quiet=quiet or not chief) as progress,
        open_trackers(directory, start, recipe.run.tensorboard, enabled=chief, say=say) as trackers,
        open_services(recipe, chief, say) as services,
        closing(History(directory / FILE, start, say)) if chief else nullcontext() as prompts,
        closing(Profile(directory / "profile", start, recipe.run.profile, say)) as profile,
    ):
        opening = {"time/load": loaded - setup.began, "time/open": time.monotonic() - loaded}
        yield Run(
            setup,
            start,
            sampler,
            checkpoints,
            trackers,
            services,
            prompts,
            progress,
            timer,
            profile,
            say,
            history(before, agreement.METRIC, start),
            history(before, "sampler/tokens", start),
            opening,
        )


@contextmanager
def _closing_functions(setup: Setup) -> Iterator[None]:
    """Ends calls of reward functions with the run; batches that are sampled ahead may wait for some."""
    try:
        yield
    finally:
        for work in setup.works:
            if work.functions:
                work.functions.close()


@contextmanager
def _finishing(checkpoints: Checkpoints, timer: Timer) -> Iterator[None]:
    """Finishes the write under way. An error of the run is the one to name: it came first."""
    swallowed: tuple[type[Exception], ...] = ()
    try:
        yield
    except (InputError, RunError):
        swallowed = (InputError, RunError)
        raise
    finally:
        with timer("checkpoint"), suppress(*swallowed):
            checkpoints.close()
