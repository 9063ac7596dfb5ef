"""The recipes of published systems at a laptop's size, to be run as they are: sizes become their rank, all else stays.

`make_base` makes a model to start from; `train` trains, and keeps what no file of a run has: `seen(run, step)`. Both
are for a process of their own, on one device.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import tiny_run
from jaxrl import config
from jaxrl.types import Prompt, Rollout
from recipes.systems import SYSTEMS
from tiny import jsonl

NAMES = [one.recipe for one in SYSTEMS.values() if not one.recipe.startswith("justrl")]
SPECIAL, WORDS = ["<pad>", "<eos>", "<user>", "<assistant>"], ["<think>", "</think>", "\\boxed{"]
SYMBOLS = [*SPECIAL, *WORDS, *map(chr, range(128))]
ID = {symbol: number for number, symbol in enumerate(SYMBOLS)}
# how often the base model answers right, by the digit that is asked for
RIGHT = {"0": 0.98, "1": 0.6, "2": 0.3}
ENDS = 0.1  # of thoughts, at every token
TOKENS, SAMPLES, MINIBATCH, STEPS = (24, 36, 48), (4, 8), 4, 3  # STEPS of a stage
MANY = 64  # of samples, for hundreds


def make_tokenizer() -> Any:
    """A byte a token, in Qwen2's form, which transformers takes every tokenizer of a Qwen2 for; R1's template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [chr(n) if 33 <= n < 127 else chr(256 + min(n, 33)) for n in range(128)]  # GPT-2's, of bytes
    vocabulary = {name: number for number, name in enumerate([*SPECIAL, *WORDS, *names])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    fast.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    fast.chat_template = "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}<assistant><think>"
    return fast


def problem(digit: str, length: int) -> str:
    return "say" + "." * (length - 4) + digit


def make_base(folder: str | Path) -> Path:
    """A model that thinks in dots, and then says the digit that it is asked for as often as RIGHT has it."""
    tails = ["", *{config.load(name).data.suffix for name in NAMES}]

    def example(rng: np.random.Generator) -> Rollout:
        asked = str(rng.integers(3))
        others = sorted(RIGHT.keys() - {asked})
        said = asked if rng.random() < RIGHT[asked] else str(rng.choice(others))
        text = problem(asked, int(rng.integers(5, 20))) + str(rng.choice(tails))
        ids = [ID["<user>"], *map(ID.get, text), ID["<assistant>"], ID["<think>"]]
        thoughts = ["."] * min(int(rng.geometric(ENDS)), 40)
        answer = [ID[s] for s in (*thoughts, "</think>", "\\boxed{", said, "}", "<eos>")]
        prompt = Prompt("", np.array(ids, np.int32), "")
        return Rollout(prompt, np.array(answer, np.int32), np.zeros(len(answer), np.float32), "stop", 0)

    return tiny_run.pretrain(
        Path(folder), len(SYMBOLS), make_tokenizer(), example, updates=400, longest=160, positions=256
    )


def write_rows(folder: Path, section: config.Data) -> str:
    """Problems in the columns of a recipe, one of them without an answer if it skips those; the path of the data."""
    rows = []
    for digit in RIGHT:
        for length in range(5, 20):
            solution = f"{digit}?</think>" + "so it goes on and on " * 2 + f"\\boxed{{{digit}}}"
            row = {section.problem_column: problem(digit, length), section.answer_column: digit}
            rows.append(row | {section.hint_column: solution} if section.hint_column else row)
    if section.hint_column:
        rows.append(
            rows[0] | {section.problem_column: "say 4", section.hint_column: "</think>no answer in here"}
        )
    if section.skip_unanswered:
        rows.append({section.problem_column: "say 5", section.answer_column: ""})
    parts = {"easy": rows[::2], "medium": rows[1::2]} if section.split else {"train": rows}
    (folder / "data").mkdir(exist_ok=True)
    for name, part in parts.items():
        jsonl(folder / "data" / f"{name}-00000-of-00001.jsonl", part)
    return str(folder / "data")


def shrink(recipe: config.Recipe, folder: Path, base: Path) -> config.Recipe:
    """The recipe for `make_base`'s model and few steps, with a run folder in `folder`."""
    stages = config.stages_of(recipe)
    longest = sorted({stage.recipe.rollout.max_tokens for stage in stages})
    samples = sorted({stage.recipe.rollout.samples for stage in stages})

    def size(section: str, key: str, value: Any, of: config.Recipe) -> Any:
        """The value of a key, in a stage whose own recipe is `of`."""
        match f"{section}.{key}":
            case "rollout.max_tokens":
                return TOKENS[longest.index(value)]
            case "rollout.samples":
                return MANY if value > 100 else SAMPLES[samples.index(value)]
            case "rollout.prompts":
                return MINIBATCH * of.minibatches
            case "data.max_characters":
                return value and 12
            case "data.min_characters":
                return value and 13
            case "data.max_prompt_tokens":
                return 160
            case "optimizer.learning_rate":
                return 1e-4
            case "optimizer.warmup_steps":
                return min(value, 2)
            case "optimizer.minibatch_prompts":
                return MINIBATCH
            case "kl.reset_every":
                return min(value, 3)
            case "eval.every":
                return 0
            case "length.cosine_on":
                return min(value, 2)
            case "length.cosine_off":
                return min(value, 3)
        return value

    values = config.to_dict(recipe)
    entries = values.pop("stages", [])
    for entry, stage in zip(entries, stages, strict=bool(entries)):
        entry["until"] = STEPS * (stage.number + 1)
        for section, keys in entry.items():
            if isinstance(keys, Mapping):
                entry[section] = {key: size(section, key, value, stage.recipe) for key, value in keys.items()}
    values = {
        section: {key: size(section, key, value, recipe) for key, value in keys.items()}
        for section, keys in values.items()
    }
    ours: dict[str, dict[str, Any]] = {
        "run": {
            "directory": str(folder / "run"), "tensorboard": False,
            "compilation_cache": str(base.parent / "cache"),
        },
        "model": {"path": str(base), "dtype": "float32", "remat": "none"},
        "data": {"path": write_rows(folder, recipe.data)},
        "rollout": {"engine": "local", "slots": 64},
        "sampler": {"servers": 0, "max_staleness": 0},  # those are of engine = "vllm"
        "packing": {"stream_tokens": 256, "bucket_tokens": 32, "logprob_chunk": 128},
        "checkpoint": {"every": 1, "keep_every": 1},
    }  # fmt: skip
    values["run"].pop("steps")
    for section, keys in ours.items():
        values[section] |= keys
    whole = {"stages": entries} if entries else {"run": values["run"] | {"steps": 2 * STEPS}}
    return config.from_dict(values | whole)


def write_recipe(name: str, folder: Path, base: Path) -> Path:
    path = folder / "recipe.toml"
    path.write_text(config.to_toml(shrink(config.load(name), folder, base)))
    return path


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a step has trained on."""

    groups: Sequence[Sequence[Rollout]]
    updates: Sequence[Mapping[str, float]]  # metrics of each
    packed: Sequence[Mapping[str, Any]]  # of each mini-batch, what `packing.pack` was called with
    adam_steps: int  # since the optimizer's last restart, after this one

    @property
    def rollouts(self) -> list[Rollout]:
        return [rollout for group in self.groups for rollout in group]


def seen(run: Path, step: int) -> Seen:
    return pickle.loads((run.parent / f"seen-{step}.pickle").read_bytes())


def train(recipe: str) -> None:
    """Trains, and keeps what each step has seen beside the run folder."""
    import optax

    import jaxrl.loop
    from jaxrl.cli import main
    from jaxrl.grpo import packing

    calls: list[dict[str, Any]] = []
    pack, one_step = packing.pack, jaxrl.loop.one_step

    def kept_pack(rollouts: Any, advantages: Any, *args: Any, **more: Any) -> Any:
        if "weights" in more:  # not one that only scores
            calls.append({"rollouts": rollouts, "advantages": advantages} | more)
        return pack(rollouts, advantages, *args, **more)

    def kept_step(run: Any, work: Any, carry: Any, batches: Any) -> Any:
        calls.clear()
        after, record = one_step(run, work, carry, batches)
        updates = [{key: float(np.mean(value)) for key, value in each.items()} for each in record.updates]
        count = optax.tree_utils.tree_get(after.state.opt_state, "count")
        own = Seen(record.groups, updates, [*calls], int(count))
        (run.setup.directory.parent / f"seen-{carry.step}.pickle").write_bytes(pickle.dumps(own))
        return after, record

    packing.pack, jaxrl.loop.one_step = kept_pack, kept_step
    main(["train", recipe])
