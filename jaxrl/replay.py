"""Steps of a run executed again from what the run has kept of them: do its weights follow from its inputs?

A step is a function of the state before it and of its answers, see learn.py, so with the same jaxrl, JAX and devices
the weights after it are the same bits. Only then the metrics are, which a run keeps of every step, so what has been
changed since is found at its step, whether there is a checkpoint after it or not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from blake3 import blake3

from jaxrl import __version__, config, prepare
from jaxrl.checkpoint import Checkpoints, describe, digest_of_json
from jaxrl.collect import Asking, Work
from jaxrl.errors import InputError
from jaxrl.files import reading, write_atomically
from jaxrl.grpo.update import TrainState
from jaxrl.json_fields import read_json
from jaxrl.learn import enter, learn
from jaxrl.marking import finished
from jaxrl.metrics import step_metrics
from jaxrl.models import decoder, hf
from jaxrl.run import Carry, Evaluation, Setup, beginning, carry_at, load, with_reference
from jaxrl.telemetry.rollouts import RolloutRow, read_exactly, rollout_files, step_of
from jaxrl.telemetry.trackers import MetricsRow, finite, read_metrics
from jaxrl.types import JsonObject, Prompt, Rollout, Say

AUDIT = "audit.json"
CLOCKS = ("time/", "perf/")  # metrics of the machine
SHOWN = 3  # findings of a kind that are written out for a step
NEAR = 0.01  # relative difference of metrics that counts as none where weights may differ
# Times the step's largest difference between sampler and trainer; a token's that is more is a finding.
WORSE = 10.0


class Step(NamedTuple):
    """A step that was executed again."""

    step: int  # 1 for the first
    answers: int
    rollouts: str  # digest of the file
    weights: str  # digest of the state after it
    checkpoint: bool  # whether the run has one to compare with
    difference: float  # largest of a parameter's to the checkpoint's
    findings: list[str]  # lines; none where all is as the run has it


class Began(NamedTuple):
    """What a step began with."""

    carry: Carry
    work: Work
    answers: list[RolloutRow]
    groups: list[list[Rollout]]


@dataclasses.dataclass(frozen=True)
class Replay:
    """A run whose steps are executed again. Nothing of it is written but the record of an audit."""

    run: Path
    setup: Setup
    checkpoints: Checkpoints
    rows: Mapping[int, MetricsRow]  # of metrics.jsonl, by step, 0 for the first
    recorded: Mapping[int, JsonObject]  # of an audit's record, by step, 1 for the first
    within: float  # by how much parameters may differ; 0: they, and so metrics, are the same bits
    published: Path | None = None  # a Hugging Face folder that is to have the weights after the last step

    def steps(self, step: int | None) -> Iterator[Step]:
        """Executes the steps from the checkpoint before a step to the one after it; or all, from the model.

        Args:
          step: 1 for the first; None is all.

        Raises:
          InputError: if the run has not kept what is needed, or it is damaged; or the data or the model has changed.
        """
        known, done = self.checkpoints.steps(), len(self.rows)
        if step is not None and not 0 < step <= done:
            raise InputError(f"{self.run} has steps 1 to {done}, and no step {step}")
        first = 0 if step is None else max((each for each in known if each < step), default=0)
        last = done if step is None else min((each for each in known if each >= step), default=step)
        files = self._files()
        if missing := [each + 1 for each in range(first, last) if each not in files]:
            raise InputError(
                f"{self.run}: the answers of {len(missing)} steps, of which {missing[0]} is the first, are not kept as "
                "parquet; run.rollouts_every = 1 and run.rollouts_keep = 0 keep all of them"
            )
        carry = carry_at(self.setup, self.checkpoints, first) if first else beginning(self.setup)
        for place in range(first, last):
            carry, found = self._again(carry, files[place])
            if place + 1 == last and self.published:
                found.findings.extend(self._unlike(carry, self.published))
            yield found

    def _files(self) -> dict[int, Path]:
        """The files with the answers of steps, 0 for the first."""
        return {step_of(file): file for file in rollout_files(self.run) if file.suffix == ".parquet"}

    def began(self, step: int | None) -> Began:
        """What a step began with, after the checkpoint before it.

        Args:
          step: 1 for the first; None takes the newest with answers and a checkpoint before it.

        Raises:
          InputError: if the run has not kept its answers or the checkpoint, or they are damaged or of other data.
        """
        files = self._files()
        steps = sorted(each + 1 for each in {0, *self.checkpoints.steps()} & {*files})
        step = step or max(steps, default=0)
        if step not in steps:
            there = f"steps {', '.join(map(str, steps))} have" if steps else "no step has"
            raise InputError(
                f"{self.run}: {there} both answers as parquet and a checkpoint before it; run.rollouts_every and "
                "checkpoint.every say which do"
            )
        carry = carry_at(self.setup, self.checkpoints, step - 1) if step > 1 else beginning(self.setup)
        return self._began(carry, files[step - 1])

    def _began(self, carry: Carry, file: Path) -> Began:
        setup, stage = self.setup, self.setup.stage_at(carry.step)
        if stage.first == carry.step:
            carry = enter(setup, stage, carry, setup.say)
        carry = with_reference(setup, self.checkpoints, carry)
        work, answers = setup.work(stage, carry.ledger.dropped), read_exactly(file)
        return Began(carry, work, answers, _groups(work, carry, answers, file))

    def _again(self, carry: Carry, file: Path) -> tuple[Carry, Step]:
        """Executes a step again; the next one goes on with the run's own state where there is a checkpoint of it."""
        setup, row = self.setup, self.rows[carry.step]
        with reading(file):
            digest = blake3(file.read_bytes()).hexdigest()
        carry, work, answers, everyone = self._began(carry, file)
        findings = [*_texts(setup, answers, everyone), *_marks(work, everyone, carry.step)]
        findings += _tokens(setup, work, carry, everyone, row)
        carry, record = learn(setup, work, carry, everyone, lambda _: contextlib.nullcontext())
        ours = finite(step_metrics(work.recipe, setup.model, carry.step - 1, record.timed(1.0, {}, 1.0)))
        findings += _metrics(ours, row, self.within)
        arrays, difference = describe(carry.state), 0.0
        if there := carry.step in self.checkpoints.steps():
            known = carry_at(setup, self.checkpoints, carry.step).state
            theirs, difference = describe(known), _difference(carry.state, known)
            others = [name for name in arrays if arrays[name] != theirs[name]]
            if difference > self.within or (others and not self.within):
                findings.append(
                    f"{self.checkpoints.directory / str(carry.step)} does not follow from these answers: "
                    f"{len(others)} of {len(arrays)} arrays differ, the first is {others[0]}, and parameters by up "
                    f"to {difference:.3g}"
                )
            carry = dataclasses.replace(carry, state=known)
        weights = digest_of_json(arrays)
        kept = self.recorded.get(carry.step, {})
        if kept.get("answers", digest) != digest:
            findings.append(f"{file} is not the file of which {AUDIT} has the digest")
        if not self.within and kept.get("weights", weights) != weights:
            findings.append(
                f"the weights after step {carry.step} are not those of which {AUDIT} has the digest"
            )
        return carry, Step(carry.step, len(answers), digest, weights, there, difference, findings)

    def _unlike(self, carry: Carry, folder: Path) -> list[str]:
        """Whether a Hugging Face folder has other weights than these, rounded to its dtype."""
        theirs = hf.load(folder, mesh=self.setup.mesh)
        if theirs.config != self.setup.model:
            return [f"{folder} is a model of another architecture"]
        dtype = read_json(folder / "config.json").get("dtype", "float32")
        params = jax.tree.map(lambda x: x.astype(dtype).astype(x.dtype), carry.state.params)
        pairs = zip(*(hf.named_tensors(theirs.config, p) for p in (params, theirs.params)), strict=True)
        others = [
            name
            for (name, ours), (_, given) in pairs
            if not np.allclose(ours, given, rtol=0, atol=self.within)
        ]
        if not others:
            return []
        return [
            f"{folder} has not the weights after step {carry.step}: {len(others)} tensors, first {others[0]}"
        ]

    def excuse(self) -> str:
        """What to say after findings where the run had other devices; empty otherwise."""
        had, here = self.rows[max(self.rows)].get("perf/devices"), jax.device_count()
        if self.within or had in (None, here):
            return ""
        return f". The run had {had:g} devices, and this is {here}; --within 1e-5 allows for rounding"

    def record(self, steps: Sequence[Step]) -> None:
        """Writes what an audit without findings saw, as audit.json into the run folder."""
        setup, device = self.setup, jax.devices()[0]
        record: JsonObject = {
            "jaxrl": __version__,
            "jax": jax.__version__,
            "devices": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
            "mesh": dict(setup.mesh.shape),
            "recipe": digest_of_json(config.to_dict(setup.recipe)),
            "content": setup.content(len(self.rows)),
            "within": self.within,
            "steps": [
                {"step": s.step, "answers": s.rollouts, "weights": s.weights, "checkpoint": s.checkpoint}
                for s in steps
            ],
        }
        write_atomically(
            self.run / AUDIT, json.dumps(record | {"digest": digest_of_json(record)}, indent=1) + "\n"
        )


@contextlib.contextmanager
def open_replay(
    run: Path,
    overrides: Sequence[str] | Mapping[str, object],
    within: float,
    say: Say,
    published: Path | None = None,
) -> Iterator[Replay]:
    """Opens a run folder to execute its steps again.

    Args:
      run: the run folder.
      overrides: see `config.load`; of what a run may change, such as another mesh.
      within: see `Replay`.
      say: prints a line.
      published: see `Replay`.

    Raises:
      InputError: if the recipe, the data or the model cannot be used, or is not what the run was made with.
    """
    checkpoints = Checkpoints(run / "checkpoints", read_only=True)
    rows = {int(row["step"] or 0): row for row in read_metrics(run / "metrics.jsonl")}
    draft = config.draft(run / "recipe.toml", overrides)
    recipe = config.load(draft, {"run.directory": str(run), "run.trackers": ()})
    setup = load(recipe, lambda *_: cast(Evaluation, None), say)  # nothing is evaluated again
    if (newest := checkpoints.latest()) is not None:
        checkpoints.require_same_recipe(newest, recipe, setup.content(newest))
    try:
        yield Replay(run, setup, checkpoints, rows, _recorded(run / AUDIT), within, published)
    finally:
        for work in setup.works:
            if work.functions:
                work.functions.close()


def _recorded(file: Path) -> dict[int, JsonObject]:
    """The steps of an audit's record, where there is one.

    Raises:
      InputError: if it has been changed.
    """
    if not file.exists():
        return {}
    with reading(file):
        text = file.read_text(encoding="utf-8", errors="replace")
    try:
        record = json.loads(text)
        if record.pop("digest") == digest_of_json(record):
            return {each["step"]: each for each in record["steps"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise InputError(f"{file} is not as an audit has written it; put back a copy, or remove it")


def _difference(ours: TrainState, theirs: TrainState) -> float:
    """The largest difference of a parameter."""
    return max(map(float, jax.device_get(_differences(ours.params, theirs.params))))


@jax.jit  # one program: XLA on CPUs can stall on collectives of two at a time
def _differences(ours: decoder.Params, theirs: decoder.Params) -> list[jax.Array]:
    return jax.tree.leaves(jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), ours, theirs))


def _groups(work: Work, carry: Carry, rows: Sequence[RolloutRow], file: Path) -> list[list[Rollout]]:
    """The groups of a step, in the order of its stream; empty where a prompt was refused.

    Raises:
      InputError: if the file has other prompts than the step's.
    """
    firsts = [k for k, row in enumerate(rows) if row["sample"] == 0]
    kept = [rows[a:b] for a, b in zip(firsts, [*firsts[1:], len(rows)], strict=True)][::-1]
    stream, asking = work.stream(carry.ledger.cursor), Asking(work, carry.ledger.answers)
    everyone: list[list[Rollout]] = []
    while len(everyone) < asking.count:
        prompt = stream[len(everyone)]
        own = kept.pop() if kept and kept[-1][0]["prompt_id"] == prompt.id else []
        asking.learn(len(everyone), group := [_rollout(prompt, row) for row in own])
        everyone.append(group)
    if kept:
        raise InputError(
            f"{file}: prompt {kept[-1][0]['prompt_id']} is none that step {carry.step + 1} asked for there; the file "
            "has changed, or the data"
        )
    return everyone


def _rollout(prompt: Prompt, row: RolloutRow) -> Rollout:
    rewards = row.get("rewards")
    return Rollout(
        prompt=prompt,
        tokens=np.asarray(row["token_ids"], np.int32),
        logprobs=np.asarray(row["logprobs"], np.float32),
        finish_reason=row["finish_reason"],
        version=row["version"],
        score=row["score"],
        reward=row["reward"],
        rewards=None if rewards is None else {k: math.nan if v is None else v for k, v in rewards.items()},
    )


def _named(groups: Iterable[Sequence[Rollout]]) -> list[tuple[str, Rollout]]:
    """All answers, each with what findings call it."""
    return [(f"prompt {r.prompt.id}, sample {g}", r) for group in groups for g, r in enumerate(group)]


def _shown(findings: Sequence[str]) -> list[str]:
    more = len(findings) - SHOWN
    return [*findings[:SHOWN], *([f"and {more} more"] if more > 0 else [])]


def _texts(setup: Setup, rows: Sequence[RolloutRow], everyone: Sequence[Sequence[Rollout]]) -> list[str]:
    """Answers whose text is not that of their tokens, or whose prompt's is not the data's."""
    decode, found = setup.tokenizer.decode, []
    for (name, rollout), row in zip(_named(everyone), rows, strict=True):
        for what, tokens, text in (
            ("completion", rollout.tokens, row["completion"]),
            ("prompt", rollout.prompt.tokens, row["prompt"]),
        ):
            if decode(tokens) != text:
                found.append(f"{name}: the text of the {what} is not that of its tokens")
    return _shown(found)


def _marks(work: Work, everyone: list[list[Rollout]], step: int) -> list[str]:
    """Answers whose score or reward is not what the recipe gives them now, reward functions aside: they may judge anew.

    Completes the answers by what their file lacks.
    """
    if work.functions:
        return []
    found = []
    for k, group in enumerate(everyone):
        (marked,) = finished([[work.mark(rollout, step - work.stage.first) for rollout in group]])
        for (name, rollout), now in zip(_named([group]), marked, strict=True):
            for what in ("score", "reward"):
                was, means = getattr(rollout, what), getattr(now, what)
                if was != means:
                    found.append(f"{name}: its {what} is {was:g}, and the recipe gives {means:g}")
        everyone[k] = [
            dataclasses.replace(r, undecided=m.undecided) for r, m in zip(group, marked, strict=True)
        ]
    return _shown(found)


def _tokens(
    setup: Setup, work: Work, carry: Carry, everyone: Sequence[Sequence[Rollout]], row: MetricsRow
) -> list[str]:
    """Tokens whose log-prob is far from the policy's, by what the run itself has seen in the step."""
    most = row.get("sampler/logprob_diff_max")
    named = _named(everyone)
    if most is None or not named:
        return []
    scored = prepare.scored(setup.programs(work.stage), carry.state.params, [r for _, r in named])
    found = []
    for (name, rollout), ours in zip(named, scored, strict=True):
        off = np.abs(rollout.logprobs - ours.logprobs)
        if not float(off.max()) <= WORSE * most + 1e-4:
            t = int(np.nan_to_num(off, nan=np.inf).argmax())
            found.append(
                f"{name}, token {t} ({rollout.tokens[t]}): its log-prob is "
                f"{rollout.logprobs[t]:.4g}, and the policy's {ours.logprobs[t]:.4g}; the step's largest difference "
                f"was {most:.2g}"
            )
    return _shown(found)


def _metrics(ours: MetricsRow, row: MetricsRow, within: float) -> list[str]:
    """Metrics of a step that are not what the run has written."""

    def same(a: float | None, b: float | None) -> bool:
        near = within and a is not None and b is not None
        return a == b or bool(near and math.isclose(a, b, rel_tol=NEAR, abs_tol=1e-5))  # type: ignore[arg-type]

    found = [
        f"{name} is {row[name]} in metrics.jsonl, and {value} here"
        for name, value in ours.items()
        if name in row and not name.startswith(CLOCKS) and not same(value, row[name])
    ]
    return _shown(found)
