"""The vocabulary of all parts: records of a rollout, lists of names, callbacks, protocols. It loads no library."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias  # noqa: TID251  # JsonObject's

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float, Float32, Int32

# Parsed JSON or TOML of another program, whose fields are validated one by one.
JsonObject: TypeAlias = dict[str, Any]

# Each list of names that a recipe chooses from, written once: config.py checks against it, a module implements it.
Verifier = Literal[
    "strict_boxed", "minerva", "equivalent", "corrected", "math_verify", "equivalent_or_math_verify"
]
Thoughts = Literal["required", "closed", "optional"]
ByThoughts = Literal["equivalent", "equivalent_or_math_verify"]  # verifiers that have such a rule
Rules = Literal["released", "corrected"]  # by which the lenient graders compare two answers
Sandboxed = Literal[Rules, "math_verify"]  # what compares two answers in a child process
Normalization = Literal["token_mean", "sequence_mean", "sequence_sum", "dr_grpo"]
Order = Literal["shuffle", "copies", "replacement"]
Engine = Literal["local", "vllm"]
TransportName = Literal["files", "nccl"]
OnUpdate = Literal["keep", "drain"]
Truncation = Literal["truncated", "masked", "filtered"]  # of importance weights
Correction = Literal["none", Truncation]
Level = Literal["token", "sequence", "geometric"]  # what an importance ratio is taken over
# What is taken off a reward, and what divides the rest.
TrackerName = Literal["wandb", "trackio", "mlflow"]
Center = Literal["none", "group", "leave_one_out", "length_weighted", "second_best", "batch"]
Scale = Literal["none", "group", "batch"]
OnTruncated = Literal["train", "drop", "drop_wrong"]  # what becomes of truncated responses
OnFailure = Literal["end", "value"]  # what a reward function that fails does to a run
Filter = Literal["none", "drop", "refill", "substitute"]  # of groups that teach nothing
Restart = Literal["optimizer", "reference", "data"]  # what a stage may begin anew
Ratio = Literal["token", "sequence", "geometric"]  # of two policies' probabilities
Estimator = Literal["k1", "k2", "k3", "abs"]  # of a KL divergence
Dtype = Literal["bfloat16", "float32"]
Backend = Literal["xla", "cudnn", "splash"]  # of packed attention
Remat = Literal["full", "attention", "projections", "products", "none"]
Gather = Literal["step", "layer"]

FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A problem, ready to be continued."""

    id: str  # stable over a run; names the problem in rollout files
    tokens: Int32[np.ndarray, " T"]  # chat-templated prompt, generation prompt included
    answer: str  # ground truth, as the verifier wants it
    problem: str = ""  # digest of the problem, without what a recipe adds to it, and of its answer
    columns: Mapping[str, object] | None = None  # of its row, where a reward function takes some

    @property
    def key(self) -> str:
        """The prompt's name in what is remembered of it: another file's row of the same id is another prompt."""
        return f"{self.id} {self.problem}".strip()


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One sampled completion of a prompt."""

    prompt: Prompt
    tokens: Int32[np.ndarray, " T"]  # completion ids; the end-of-sequence token, where sampled, is included
    logprobs: Float32[np.ndarray, " T"]  # log-probability (nats) of each id at the sampling temperature
    finish_reason: FinishReason
    version: int  # of the model weights that sampled it; the oldest, where they changed on the way
    score: float = float("nan")  # the verifier's mark, +1 or -1, once marked
    reward: float = float("nan")  # what is trained on: the score's, and terms of the length
    server: str = ""  # that sampled it, where there are several
    undecided: bool = False  # whether it is marked wrong because comparing its answer is too much work
    rewards: Mapping[str, float] | None = None  # of the recipe's functions, by name; NaN where one failed


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How completions are sampled, and when they end."""

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: the whole vocabulary
    max_tokens: int = 15_360
    stop_ids: tuple[int, ...] = ()


Groups = Sequence[Sequence[Rollout]]  # [P][G]: the rollouts of each prompt
# Numbers of B sequences: one each, or one for each token of their completions.
Values: TypeAlias = "Float[np.ndarray, ' B'] | list[Float[np.ndarray, ' _']]"
Say = Callable[[str], None]  # prints a line for people
Detokenize: TypeAlias = "Callable[[np.ndarray], str]"  # token ids [T] to text
# Called with each rollout as it finishes; what it returns takes its place.
OnRollout = Callable[[Rollout], Rollout]
# Called with a prompt's place and its rollouts once all are there (none where it was refused); returns prompts that are
# sampled as well.
OnGroup: TypeAlias = "Callable[[int, Sequence[Rollout]], Sequence[Prompt]]"


class Marker(Protocol):
    """Gives a rollout of a step its score and its reward."""

    def __call__(self, rollout: Rollout, step: int = 0) -> Rollout: ...


def silent(_: str) -> None:
    """A `Say` that prints nothing: every process but the first has nothing to add."""


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    name_or_path: str
    chat_template: str | Mapping[str, str] | None
    eos_token_id: int | None
    all_special_tokens: list[str]

    def __call__(
        self, text: list[str], *, add_special_tokens: bool = True
    ) -> Mapping[str, list[list[int]]]: ...

    def decode(self, token_ids: np.ndarray, *, skip_special_tokens: bool = False) -> str: ...

    def get_chat_template(self) -> str: ...

    def apply_chat_template(
        self,
        conversation: Sequence[Sequence[Mapping[str, object]]],
        *,
        chat_template: str,
        add_generation_prompt: bool,
        tokenize: bool,
        **arguments: object,
    ) -> list[str]: ...
