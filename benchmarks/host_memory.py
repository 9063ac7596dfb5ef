"""Memory that a step's answers take on the trainer's host: `python -m benchmarks.host_memory`.

BroRL's step: 128 prompts x 512 answers, log-normal lengths with a mean of 4,000 tokens, cut at 16,384. Token ids and
log-probs are made as a sampler gives them, and then go through what the host does with them. Devices are left out:
`to_devices` keeps nothing here, and its bytes are counted beside the table. `--share 4` takes a quarter of the prompts,
in mini-batches of a quarter, and multiplies; `--check` is another share, to see that memory is linear.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from unittest import mock

import jax
import numpy as np

from benchmarks.harness import write_results
from jaxrl import config, data, prepare
from jaxrl.collect import Work, choose
from jaxrl.grpo.packing import PackedBatch
from jaxrl.grpo.update import Likelihoods
from jaxrl.marking import make_marker
from jaxrl.parallel import processes
from jaxrl.plan import KNOWN
from jaxrl.programs import Programs, layout_of
from jaxrl.sampling.across_processes import from_bytes, to_bytes
from jaxrl.sampling.answers import read_answer
from jaxrl.telemetry.history import History
from jaxrl.telemetry.rollouts import write_rollouts
from jaxrl.types import Detokenize, Groups, JsonObject, Prompt, Rollout, SamplingParams, silent

RECIPE = Path(__file__).parents[1] / "recipes" / "brorl-1.5b.toml"
MODEL = next(iter(KNOWN.values()))
MEAN, SPREAD, PROMPT = 4000, 0.8, 150  # tokens
TRAINERS, HOSTS = 8, 4
ANSWER = "512 answers of a server at once"  # the only phase that does not grow with the prompts
GB = 1e9


class Meter:
    """Resident bytes of this process, and their peak in each phase."""

    def __init__(self, answers: int) -> None:
        self.answers, self.rows = answers, list[JsonObject]()

    def __call__(self, phase: str, work: Callable[[], object]) -> object:
        """Does the work of a phase, and notes what it took at most and what stayed."""
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
        before, began = _status("VmRSS"), time.perf_counter()
        result = work()
        seconds, peak, after = time.perf_counter() - began, _status("VmHWM"), _status("VmRSS")
        row: JsonObject = {"phase": phase, "seconds": round(seconds, 1), "peak": peak, "after": after}
        row |= {"added_at_peak": peak - before, "bytes_an_answer": round((peak - before) / self.answers)}
        self.rows.append(row)
        print(
            f"{phase:<34}{seconds:>8.1f}{peak / GB:>9.2f}{(peak - before) / GB:>9.2f}{after / GB:>9.2f}"
            f"{(peak - before) / self.answers / 1e3:>12.1f}",
            flush=True,
        )
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--share", type=int, default=1, help="of the step's prompts, one in so many")
    parser.add_argument("--check", type=int, default=4, help="another share, to see whether memory is linear")
    parser.add_argument("--tokenizer", default="models/smollm2-135m-instruct", help="a Hugging Face folder")
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")  # each share begins with an empty process
    found = {}
    for share in (options.check, options.share):
        with spawn.Pool(1) as pool:
            found[share] = pool.apply(measure, (share, options.tokenizer))
    small, large = found[options.check], found[options.share]
    whole = []
    for a, b in zip(large["phases"], small["phases"], strict=True):
        by_large, by_small = (
            (1 if row["phase"] == ANSWER else share) * row["added_at_peak"]
            for share, row in ((options.share, a), (options.check, b))
        )
        whole.append({"phase": a["phase"], "added_at_peak": by_large, "by_the_check": by_small})
    print("\nthe whole step: GB that each phase adds at most, by either share")
    for row in whole:
        print(f"{row['phase']:<34}{row['added_at_peak'] / GB:>9.2f}{row['by_the_check'] / GB:>9.2f}")
    held = options.share * sum(large["minibatches_on_devices"]) / TRAINERS
    print(f"its mini-batches, all held at once: {held / GB:.1f} GB on each of {TRAINERS} trainers")
    record = {"recipe": RECIPE.name, "tokenizer": options.tokenizer, "mean": MEAN, "spread": SPREAD}
    extrapolated = {"extrapolated_by": options.share, "whole_step": whole}
    write_results("host_memory", record | extrapolated | {"measured": large, "check": small})


def measure(share: int, tokenizer: str) -> JsonObject:
    """One share of the step, phase by phase."""
    recipe = config.load(str(RECIPE), [])
    rollout, optimizer = recipe.rollout, recipe.optimizer
    recipe = dataclasses.replace(
        recipe,
        rollout=dataclasses.replace(rollout, prompts=rollout.prompts // share),
        optimizer=dataclasses.replace(optimizer, minibatch_prompts=optimizer.minibatch_prompts // share),
        reward=dataclasses.replace(
            recipe.reward, verifier="strict_boxed"
        ),  # cheap, and its memory is no matter
    )
    detokenize, vocabulary = _detokenizer(tokenizer)
    meter = Meter(recipe.rollout.prompts * recipe.rollout.samples)
    print(f"\n{meter.answers:,} answers, 1 in {share}")
    heads = ("seconds", "peak GB", "added", "after", "kB an answer")
    print(f"{'phase':<34}" + "".join(f"{h:>{w}}" for h, w in zip(heads, (8, 9, 9, 9, 14), strict=True)))
    make = functools.partial(_rollouts, recipe, vocabulary)
    groups = cast(list[list[Rollout]], meter("rollouts, as a sampler gives them", make))
    tokens = sum(len(r.tokens) for group in groups for r in group)
    groups = cast(list[list[Rollout]], meter("marking", lambda: _marked(recipe, groups, detokenize)))
    meter(f"exchange of {HOSTS} processes", lambda: _exchanged(groups))
    work = _work(recipe, groups)
    chosen = meter("choice of groups", lambda: choose(work, groups, 0, {}, list))
    placed: list[int] = []
    trained = cast("list[list[Rollout]]", chosen.groups)  # type: ignore[attr-defined]
    meter("log-probs and packing", lambda: _packed(recipe, work, trained, placed))
    with tempfile.TemporaryDirectory() as folder:
        meter("writing of rollouts", lambda: write_rollouts(Path(folder), 0, groups, detokenize))
        written = sum(file.stat().st_size for file in (Path(folder) / "rollouts").iterdir())
        history = History(Path(folder) / "prompts.jsonl", 0, silent)
        meter("history", lambda: history.log(0, groups))
    # last: what it leaves in the heap would hide what others take
    answer, samples, prompt = _answer(groups[0], vocabulary), recipe.rollout.samples, groups[0][0].prompt
    params = SamplingParams(max_tokens=recipe.rollout.max_tokens, stop_ids=(vocabulary,))
    known = vocabulary + 1
    meter(ANSWER, lambda: read_answer(json.loads(answer), prompt, samples, params, known, {"v": 0}))
    return {
        "share": share,
        "answers": meter.answers,
        "tokens": tokens,
        "bytes_of_a_servers_answer": len(answer),
        "bytes_written": written,
        "trainers": TRAINERS,
        "minibatches_on_devices": placed,  # bytes of each on all trainers; the step holds them all
        "phases": meter.rows,
    }


def _status(name: str) -> int:
    """A number of bytes of this process, as Linux counts it."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def _detokenizer(folder: str) -> tuple[Detokenize, int]:
    """A real tokenizer's where it is there, else a table of words; and the ids that it knows."""
    if Path(folder).is_dir():
        return data.detokenizer(data.load_tokenizer(folder)), 49_152
    words = np.array([f" word{i}" for i in range(49_152)], object)
    return (lambda ids: "".join(words[ids])), len(words)


def _rollouts(recipe: config.Recipe, vocabulary: int) -> list[list[Rollout]]:
    """Answers with log-normal lengths; every group has right and wrong ones, which marking takes from `version`."""
    rng, sigma = np.random.default_rng(0), np.sqrt(np.log1p(SPREAD**2))

    def rollout(prompt: Prompt) -> Rollout:
        drawn = rng.lognormal(np.log(MEAN) - sigma**2 / 2, sigma)
        length = int(np.clip(drawn, 1, recipe.rollout.max_tokens))
        # text has a few frequent tokens and many rare ones
        ids = np.minimum(rng.exponential(vocabulary / 50, length), vocabulary - 1).astype(np.int32)
        logprobs = -rng.exponential(0.4, length).astype(np.float32)
        return Rollout(
            prompt, ids, logprobs, "stop" if length < recipe.rollout.max_tokens else "length", version=0
        )

    prompts = [Prompt(str(p), np.arange(PROMPT, dtype=np.int32), "42") for p in range(recipe.rollout.prompts)]
    return [[rollout(prompt) for _ in range(recipe.rollout.samples)] for prompt in prompts]


def _answer(group: list[Rollout], stop: int) -> bytes:
    """What vLLM answers to a prompt, in its own words; every answer ends with the token `stop`."""

    def token(i: int, logprob: float) -> JsonObject:
        entry: JsonObject = {"token_id": i, "logprob": logprob, "rank": 1}
        return entry | {"top_logprobs": [entry]}

    def choice(index: int, r: Rollout) -> str:
        ids = [*r.tokens[:-1].tolist(), stop]
        content = [token(*pair) for pair in zip(ids, r.logprobs.tolist(), strict=True)]
        made = {"index": index, "logprobs": {"content": content}, "finish_reason": "stop"}
        made |= {"token_ids": ids, "weight_versions": [{"version": "v"}]}
        return json.dumps(made, separators=(",", ":"))

    return f'{{"choices":[{",".join(choice(*pair) for pair in enumerate(group))}]}}'.encode()


def _marked(recipe: config.Recipe, groups: Groups, detokenize: Detokenize) -> list[list[Rollout]]:
    """Marks as a run does, each text alone; then every third answer is right."""
    mark = make_marker(recipe, detokenize)

    def marked(i: int, rollout: Rollout) -> Rollout:
        found = mark(rollout)
        return dataclasses.replace(found, score=1.0, reward=1.0) if i % 3 == 0 else found

    return [[marked(i, rollout) for i, rollout in enumerate(group)] for group in groups]


def _exchanged(groups: list[list[Rollout]]) -> None:
    """Each process's rollouts as bytes, and all of them read again, as each process does beside its own ones."""
    size = max(1, len(groups) // HOSTS)
    parts = [to_bytes(groups[first : first + size]) for first in range(0, len(groups), size)]
    from_bytes(parts, [group[0].prompt for group in groups])


def _work(recipe: config.Recipe, groups: Groups) -> Work:
    prompts = SimpleNamespace(prompts=[group[0].prompt for group in groups], path="")
    mark = make_marker(recipe, str)
    stage, method = config.stages_of(recipe)[0], prepare.make_method(recipe)
    return Work(stage, cast(data.PromptSet, prompts), method, mark, SamplingParams())


def _packed(recipe: config.Recipe, work: Work, groups: Groups, placed: list[int]) -> None:
    """The mini-batches of the step, with log-probs of policy and reference that come back from devices."""

    def to_devices(batch: PackedBatch, _: object) -> PackedBatch:
        """Keeps shapes alone: what is on devices is not on the host."""
        if batch.corrections is not None:  # of an update
            placed.append(sum(x.nbytes for x in jax.tree.leaves(batch)))
        return jax.tree.map(lambda x: np.broadcast_to(x.dtype.type(0), x.shape), batch)

    def logprobs(_: object, batch: PackedBatch) -> Likelihoods:
        return Likelihoods(cast(jax.Array, np.full(batch.tokens.shape, -0.5, np.float32)), None)

    stand_in = SimpleNamespace(
        mesh=SimpleNamespace(size=TRAINERS),
        layout=layout_of(recipe, MODEL),
        sequences=recipe.optimizer.minibatch_prompts * recipe.rollout.samples,
        logprobs=logprobs,
    )
    with (
        mock.patch.object(prepare, "to_devices", to_devices),
        mock.patch.object(processes, "whole", lambda streams: streams),
    ):
        prepare.minibatches(
            recipe,
            work.method,
            cast(Programs, stand_in),
            groups,
            1e-6,
            {},
            functools.partial(logprobs, None),
        )


if __name__ == "__main__":
    main()
