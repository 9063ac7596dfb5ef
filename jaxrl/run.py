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
from jaxrl.checkpoint import Checkpoints
from jaxrl.errors import InputError, RunError
from jaxrl.files import at_home, write_atomically, writing
from jaxrl.grpo.update import TrainState
from jaxrl.marking import make_marker
from jaxrl.metrics import Record, step_metrics
from jaxrl.models import decoder, hf
from jaxrl.models.tensors import hash_weights
from jaxrl.parallel import processes
from jaxrl.parallel.mesh import make_mesh
from jaxrl.parallel.signals import Stop
from jaxrl.programs import Programs, build_programs
from jaxrl.sampling.across_processes import Shared
from jaxrl.sampling.open import open_sampler
from jaxrl.sampling.servers import Devices
from jaxrl.telemetry import agreement
from jaxrl.telemetry.profile import Compilations, Profile, resources
from jaxrl.telemetry.progress import Progress
from jaxrl.telemetry.rollouts import write_rollouts
from jaxrl.telemetry.timer import Phase, Timer, watchdog
from jaxrl.telemetry.trackers import Tracker, finite, open_trackers, read_rows
from jaxrl.types import Detokenize, Marker, Prompt, Rollout, SamplingParams, Say, Tokenizer


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
    directory: Path  # the run folder
    folder: Path  # the model's Hugging Face folder
    model: decoder.Config
    mesh: Mesh
    programs: Programs
    tokenizer: Tokenizer
    detokenize: Detokenize  # without special tokens
    method: prepare.Method
    mark: Marker
    prompts: Sequence[Prompt]  # all there are; see `batch`
    mixture: Sequence[data.Part]  # of [[data.sources]]; empty for one
    sampling: SamplingParams
    digest: str  # of the prompts
    evaluation: Evaluation | None
    compilations: Compilations
    began: float  # time.monotonic()

    @functools.cached_property
    def content(self) -> dict[str, str]:
        """Digests of what the recipe's paths hold, by key: the model folder's weights and config, and the prompts."""
        model = blake3(hash_weights(self.folder).encode() + (self.folder / "config.json").read_bytes())
        keys = ("path", "config", "split", "files", "sources")
        return {"model.path": model.hexdigest()} | dict.fromkeys((f"data.{key}" for key in keys), self.digest)

    def evaluates(self, steps: int) -> bool:
        """Whether the recipe wants an evaluation after so many steps: before the first, every so often, at the end."""
        every = self.recipe.eval.every
        return self.evaluation is not None and (steps % every == 0 or steps == self.recipe.run.steps)

    def owes(self, steps: int) -> bool:
        """Whether an evaluation after so many steps is wanted and missing: a stop may have come before its end."""
        return self.evaluates(steps) and self.evaluation is not None and self.evaluation.missing(self, steps)

    def compile_ahead(self, start: int) -> AbstractContextManager[None]:
        """Compiles what steps from `start` on need, in background threads; see `Programs.compile_ahead`."""
        if start >= self.recipe.run.steps:
            return nullcontext()
        return self.programs.compile_ahead(prepare.needs_logprobs(self.recipe))

    def batch(self, step: int) -> list[Prompt]:
        """The prompts of a step, [P]: a function of the seed and the step alone."""
        r = self.recipe
        return data.batch(self.prompts, r.run.seed, step, r.rollout.prompts, r.data.order, self.mixture)


@dataclasses.dataclass(frozen=True)
class Run:
    """An open run."""

    setup: Setup
    start: int  # steps that were done before
    reference: decoder.Params | None  # that a KL term is relative to
    sampler: Shared
    checkpoints: Checkpoints
    trackers: Sequence[Tracker]
    progress: Progress
    timer: Timer
    profile: Profile
    say: Say
    differences: list[float]  # `agreement.METRIC` of the steps so far, where it is known
    opening: dict[str, float]  # seconds before the first step, as metrics

    @property
    def recipe(self) -> config.Recipe:
        return self.setup.recipe

    def sample(self, step: int) -> list[list[Rollout]]:
        """Samples this process's share of a step, marked as it comes; maybe during an earlier step, in a thread."""

        def on_rollout(rollout: Rollout) -> Rollout:
            self.progress.sampled(step, rollout)
            return self.setup.mark(rollout, step)

        seed, samples = (self.recipe.run.seed, step), self.recipe.rollout.samples
        return self.sampler.generate(self.setup.batch(step), samples, self.setup.sampling, seed, on_rollout)

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Times a phase of a step and shows it."""
        with self.timer(name):
            self.progress.phase(name.replace("_", " "))
            yield

    def log(self, step: int, record: Record) -> InputError | None:
        """Reports a step: trackers, rollout files, progress. Returns why the run has to end after it, if it has to."""
        with self.phase("report"):
            run, metrics = self.recipe.run, step_metrics(self.recipe, self.setup.model, step, record)
            metrics |= {"perf/compilations": float(self.setup.compilations.new())} | resources()
            metrics["time/compilation_wait"] = self.setup.programs.waited()
            if step == self.start:
                metrics |= self.opening | {
                    "time/compilation": self.setup.compilations.seconds,
                    "time/first_step": time.monotonic() - self.setup.began,
                }
            for tracker in self.trackers:
                tracker.log(step, finite(metrics))
            if processes.chief() and run.rollouts_every and step % run.rollouts_every == 0:
                decode = self.setup.tokenizer.decode
                write_rollouts(self.setup.directory, step, record.groups, decode, run.rollouts_keep)
        self.progress.step_done(step, metrics)
        if step == self.start:
            self.say(first_step_line(metrics))
        return self._disagreement(step, metrics[agreement.METRIC])

    def _disagreement(self, step: int, value: float) -> InputError | None:
        """Says where sampler and trainer agree less than before; the reason to end the run where the recipe has one."""
        line = agreement.disagreement(self.differences, value)
        if line:
            self.say(f"step {step + 1}: {line}")
        if np.isfinite(value):
            self.differences.append(value)
        limit = self.recipe.sampler.logprob_diff_limit
        if not limit or not value > limit:
            return None
        return InputError(
            f"step {step + 1}: {agreement.METRIC} = {value:.2g} is above sampler.logprob_diff_limit = {limit}; look at "
            f"the servers' options and logs, and delete checkpoints/{step + 1} if the step is to be taken again"
        )

    def evaluate(self, steps: int) -> None:
        """Evaluates what the sampler holds after so many steps, where the recipe wants that."""
        if self.setup.evaluates(steps) and self.setup.evaluation:
            with self.timer("evaluation"):
                self.setup.evaluation(self, steps)


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
    if recipe.run.compilation_cache:
        _keep_programs(at_home(recipe.run.compilation_cache), say)
    compilations = Compilations()
    mesh = make_mesh(recipe.mesh.data, recipe.mesh.fsdp)
    folder = hf.resolve(recipe.model.path)
    model = hf.read_config(folder)
    tokenizer = data.load_tokenizer(str(folder))
    detokenize = data.detokenizer(tokenizer)
    vocabulary = data.read_vocabulary(folder, tokenizer, model.vocab_size)
    verifier = recipe.reward.verifier
    prompts = data.load_prompts(recipe.data, tokenizer, verifier=verifier, vocabulary=vocabulary)
    say(prompts.summary())
    say(vocabulary.summary)
    evaluation = None
    if recipe.eval.every:
        if not load_evaluation:
            raise InputError(
                f"eval.every = {recipe.eval.every}, and nothing evaluates; set it to 0, or give train an evaluation, "
                "such as evals.in_training.load"
            )
        evaluation = load_evaluation(recipe, tokenizer, vocabulary)
    r = recipe.rollout
    return Setup(
        recipe=recipe,
        directory=Path(recipe.run.directory),
        folder=folder,
        model=model,
        mesh=mesh,
        programs=build_programs(recipe, model, mesh, say),
        method=prepare.make_method(recipe),
        tokenizer=tokenizer,
        detokenize=detokenize,
        mark=make_marker(recipe, detokenize),
        prompts=prompts.prompts,
        mixture=prompts.mixture,
        sampling=SamplingParams(r.temperature, r.top_p, r.top_k, r.max_tokens, vocabulary.stop_ids),
        digest=prompts.digest(),
        evaluation=evaluation,
        compilations=compilations,
        began=began,
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
) -> tuple[int, TrainState]:
    """The steps done and the state after them: from the newest checkpoint, or else 0 and the model folder's weights.

    Args:
      setup: see `load`.
      checkpoints: the run's.
      say: prints a line.
      raise_if_stopped: raises what a signal has asked for.

    Raises:
      InputError: if another recipe wrote the checkpoint, or it or the model cannot be read.
      RunError: if the checkpoint cannot be read now.
    """
    if not checkpoints.latest():
        state = setup.programs.init_state(hf.load(setup.folder, mesh=setup.mesh).params)
        checkpoints.warm_up(state)
        return 0, state
    like = setup.programs.abstract_state()
    start, state = checkpoints.resume(setup.recipe, like, say, raise_if_stopped, setup.content)
    if start < setup.recipe.run.steps:
        say(f"going on from step {start}")
    return start, state


def load_reference(setup: Setup) -> decoder.Params | None:
    """The parameters that a KL term is relative to: those of the model folder; None without such a term."""
    return hf.load(setup.folder, mesh=setup.mesh).params if setup.recipe.kl.coefficient else None


def open_checkpoints(recipe: config.Recipe) -> Checkpoints:
    """The checkpoints of the recipe's run folder, which is made if missing."""
    directory = Path(recipe.run.directory)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    section = recipe.checkpoint
    return Checkpoints(directory / "checkpoints", section.keep_last, section.keep_every)


@contextmanager
def open_run(
    setup: Setup, checkpoints: Checkpoints, start: int, devices: Devices, say: Say, stop: Stop
) -> Iterator[Run]:
    """Opens sampler, trackers and progress of a run that goes on from `start`; all of it ends with the context.

    Args:
      setup: see `load`.
      checkpoints: closed last: whatever happens, a write under way is finished.
      start: steps done.
      devices: where started vLLM servers run.
      say: prints a line.
      stop: once it is asked for, no server is waited for any more.
    """
    recipe, directory, chief = setup.recipe, setup.directory, processes.chief()
    if chief:
        write_atomically(directory / "recipe.toml", config.to_toml(recipe))
    loaded = time.monotonic()
    before = agreement.history(read_rows(directory / "metrics.jsonl")[0], start)
    timer = Timer()
    with (
        watchdog(timer, print),
        _finishing(checkpoints, timer),
        open_sampler(
            recipe, setup.folder, setup.model, setup.mesh, say, devices, lambda: stop.asked
        ) as sampler,
        Progress(recipe.run.steps, start, title=directory.name, quiet=not chief) as progress,
        open_trackers(directory, start, recipe.run.tensorboard, enabled=chief, say=say) as trackers,
        closing(Profile(directory / "profile", start, recipe.run.profile, say)) as profile,
    ):
        opening = {"time/load": loaded - setup.began, "time/open": time.monotonic() - loaded}
        reference = load_reference(setup)
        yield Run(
            setup,
            start,
            reference,
            sampler,
            checkpoints,
            trackers,
            progress,
            timer,
            profile,
            say,
            before,
            opening,
        )


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
