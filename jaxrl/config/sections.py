"""The sections of a recipe, which is everything that defines a run, as frozen dataclasses.

Every default is JustRL's value as run (arXiv 2512.16649 and its released scripts, verl v0.4.0), so an empty
recipe with a model and a data set is the paper's baseline. Where a value is ours, its line says so.
"""

from __future__ import annotations

import datetime
import ipaddress
import math
import os
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args
from urllib.parse import urlsplit

import tyro
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from jaxrl.types import (
    Backend,
    Center,
    Correction,
    Dtype,
    Engine,
    Estimator,
    Filter,
    Gather,
    Level,
    Normalization,
    OnFailure,
    OnTruncated,
    OnUpdate,
    Order,
    Ratio,
    Remat,
    Restart,
    Scale,
    Thoughts,
    TrackerName,
    TransportName,
    Verifier,
)

MOST = 2**31 - 1  # devices hold int32


def _float32(x: float) -> float:
    if x and not 2.0**-126 <= abs(x) < 2.0**128:
        raise ValueError("0 or infinite in float32, which devices hold")
    if x < 1 <= x + 2.0**-25:
        raise ValueError("1 in float32, which devices hold")
    return x


Count = Annotated[int, Field(ge=0, le=MOST)]
Positive = Annotated[int, Field(gt=0, le=MOST)]
Seed = Annotated[int, Field(ge=0, lt=1 << 64)]
Float = Annotated[float, Field(allow_inf_nan=False), AfterValidator(_float32)]
Share = Annotated[Float, Field(gt=0, le=1)]
NonNegative = Annotated[Float, Field(ge=0)]
PositiveFloat = Annotated[Float, Field(gt=0)]
COLDEST = 0.01  # temperature; vLLM samples at no lower one, which would divide by almost 0


def _one_group(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups if pattern else 1
    except re.error as error:
        raise ValueError(f"not a regular expression ({error})") from None
    if groups != 1:
        raise ValueError(f"{groups} groups; the answer is one group, such as '#### (.+)'")
    return pattern


Pattern = Annotated[str, AfterValidator(_one_group)]


def _at_home(text: str) -> str:
    path = os.path.expanduser(text)  # noqa: PTH111
    if path.startswith("~"):  # a container's user may have no home
        raise ValueError("this user has no home directory; give the folder without ~, or set HOME")
    return path


# A path, or what may stand in its place; ~ is the home folder
Location = Annotated[str, AfterValidator(_at_home)]


def _iso_date(text: str) -> str:
    if text and datetime.date.fromisoformat(text).isoformat() != text:
        raise ValueError("not a date such as 2026-01-31")
    return text


def _server(text: str) -> str:
    """The one spelling of a server's URL: scheme, host and port in lower case, without a slash at the end."""
    text = text.strip()
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        host, port = parts.hostname or "", parts.port
        if ":" in host and "%" not in host:
            host = f"[{ipaddress.IPv6Address(host).compressed}]"
        elif not re.fullmatch(r"[\w.-]+", host):
            raise ValueError("no host")
    except ValueError as error:
        raise ValueError(f"not the URL of a server ({error}); IPv6 is http://[fd00::1]:8000") from None
    more = parts.path.strip("/") or parts.query or parts.fragment or parts.username is not None
    if parts.scheme not in ("http", "https") or port == 0 or more:
        raise ValueError("a server is http or https, a host and a port; its key is in JAXRL_API_KEY")
    return f"{parts.scheme}://{host}" + ("" if port is None else f":{port}")


def _scalar(value: object) -> object:
    if not isinstance(value, bool | int | float | str) or value != value:
        raise ValueError("a template argument is text, a number or a boolean")
    return value


def _known_or_plugin(*names: str) -> AfterValidator:
    """One of these names, or that of a function elsewhere."""

    def check(text: str) -> str:
        if text not in names and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", text):
            raise ValueError(f'neither one of {", ".join(names)} nor a "module:function"')
        return text

    return AfterValidator(check)


def _function_path(text: str) -> str:
    if text and not re.fullmatch(
        r"(.+\.(py|pkl)|[A-Za-z_][\w.]*):[A-Za-z_]\w*|[\w.-]+(?<!\.py)(?<!\.pkl)", text
    ):
        raise ValueError('not a "FILE.py:FUNCTION", a "MODULE:FUNCTION" or the name of an entry point')
    return _at_home(text)


def _metric_name(text: str) -> str:
    if not re.fullmatch(r"[\w.-]*", text):
        raise ValueError("not a name of letters, digits, _, . and -")
    return text


def _printable(text: str) -> str:
    if not text.isprintable() or len(text) > 60:
        raise ValueError("not a name of at most 60 printable characters")
    return text


Date = Annotated[str, AfterValidator(_iso_date)]
ServerURL = Annotated[str, AfterValidator(_server)]
FunctionPath = Annotated[str, AfterValidator(_function_path)]
Argument = Annotated[bool | int | float | str, BeforeValidator(_scalar)]


@dataclass(frozen=True)
class Section:
    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class Run(Section):
    directory: Location = "runs/default"
    """Run folder: recipe.toml, metrics.jsonl, rollouts/, checkpoints/, hf/, report/ (ours)."""
    steps: Count = 4380
    """Rollout batches to train on (JustRL-DeepSeek: 4,380 when the paper's numbers were taken)."""
    seed: Seed = 1
    """Seed of prompt order and sampling noise (verl data.seed; the engine's own seed is not published)."""
    tensorboard: bool = True
    """Also write TensorBoard event files into the run folder (ours)."""
    trackers: tuple[Annotated[str, _known_or_plugin(*get_args(TrackerName))], ...] = ()
    """Services to report to as well: wandb, trackio, mlflow, or "module:function" of your own (ours)."""
    project: Annotated[str, AfterValidator(_printable)] = "jaxrl"
    """Project of the run at a service; of MLflow, its experiment (ours)."""
    rollouts_every: Count = 1
    """Keep every n-th step's rollouts as parquet; 0 keeps none (ours)."""
    rollouts_keep: Count = 50
    """Files of rollouts to keep, the newest ones; 0 keeps all, of some 50 MB each in a JustRL run (ours)."""
    compilation_cache: str = "~/.cache/jaxrl"
    """Folder for compiled programs, on a file system that all hosts share; empty keeps none (ours)."""
    profile: Count = 0
    """Trace this many steps after the first into the run folder's profile/, for XProf; 0 traces none (ours)."""


@dataclass(frozen=True)
class Model(Section):
    path: Location = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    """Hugging Face folder or Hub id of the policy to start from (paper, section 3)."""
    dtype: Dtype = "bfloat16"
    """Compute dtype; parameters, moments, softmax, log-probs and gradients stay float32 (verl FSDP)."""
    attention: Literal["auto", Backend] = "auto"
    """Kernel for packed attention: auto is cudnn on NVIDIA GPUs in bfloat16, splash on TPUs, else xla (ours)."""
    remat: Literal["auto", Remat] = "auto"
    """What the backward pass computes again: whole layers (full), all but attention, only the MLP (projections), only
    elementwise operations (products), none; auto takes the least that fits the device (ours; verl: full)."""


@dataclass(frozen=True)
class Source(Section):
    """One of several data sets to mix. A field that is left empty is that of [data]."""

    path: Location
    weight: PositiveFloat = 1.0
    """Share of the prompts, relative to the other sources'."""
    problem_column: str = ""
    answer_column: str = ""
    answer_pattern: Pattern = ""
    template_column: str = ""
    system: str = ""
    config: str = ""
    """Part of this path that is read, as data.config, split and files; of [data] these are not taken."""
    split: str = ""
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Data(Section):
    path: Location = "BytedTsinghua-SIA/DAPO-Math-17k"
    """Hub id of a data set, a .parquet or .jsonl file, or a folder of such files (paper, section 3)."""
    config: str = ""
    """Configuration of a data set that has several (ours)."""
    split: str = ""
    """Split of a data set; empty takes the training split (ours)."""
    files: tuple[str, ...] = ()
    """Globs of the files to read instead, such as "main/train-*.parquet"; * spans folders (ours)."""
    problem_column: str = "prompt"
    """Column with the problem: text, or a list of chat messages that ends in the user's (DAPO file)."""
    answer_column: str = "reward_model.ground_truth"
    """Column with the answer; a dot enters a struct (DAPO file)."""
    suffix: str = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    """Appended to the problem, the last user message (JustRL's use_boxed_suffix_prompt)."""
    prefix: str = ""
    """Put before the problem; a place for worked examples (none in JustRL)."""
    strip_dapo_wrapper: bool = True
    """Remove DAPO's own instruction before and after the problem (JustRL's authors did)."""
    deduplicate: bool = True
    """Keep the first of rows with the same problem; DAPO's file repeats each 100 times (ours; see order)."""
    order: Order = "shuffle"
    """shuffle: every prompt once an epoch (ours); copies: 100 times, in any order (the file as released, shuffled);
    replacement: independent draws."""
    chat_template: bool = True
    """Wrap the chat by the tokenizer's template; false feeds plain text."""
    template_arguments: dict[str, Argument] = field(default_factory=dict)
    """Arguments of the chat template, such as enable_thinking = false; it must read each one (none in JustRL)."""
    date: Date = ""
    """Date that the chat template writes as today's, such as 2026-01-31; needed if it writes one (ours)."""
    max_prompt_tokens: Positive = 1024
    """Prompts longer than this many tokens are dropped and counted (verl data.max_prompt_length)."""
    system: str = ""
    """System message put before every chat; a row that has one of its own is refused (none in JustRL)."""
    template_column: str = ""
    """Column with arguments of the chat template for the row alone, an object or its JSON text (ours)."""
    answer_pattern: Pattern = ""
    """Regular expression whose one group is the answer, such as "#### (.+)" for GSM8K; empty takes all (ours)."""
    skip_unanswered: bool = False
    """Leave rows without an answer out, and count them; false refuses the first one (ours)."""
    sources: tuple[Source, ...] = ()
    """Data sets to mix, each a [[data.sources]] with path and weight; data.path is not read then (ours)."""
    min_characters: Count = 0
    """Problems of fewer characters, prefix and suffix not counted, are left out; 0 is no bound (FastCuRL)."""
    max_characters: Count = 0
    """Problems of more characters are left out; 0 is no bound (FastCuRL)."""
    hint_column: str = ""
    """Column with a worked solution, of which what follows the last </think> is taken; see hint_share (QuestA)."""
    hint_share: Annotated[Float, Field(ge=0, le=1)] = 0.0
    """Share of the solution's characters shown after the problem; solutions without the answer are left out (QuestA:
    0.5, then 0.25)."""
    hint_prefix: str = "\n\n## Hint."
    """Between the problem and its hint (QuestA)."""
    drop_solved: Share = 1.0
    """On entering a stage, leave out prompts whose share of right answers in the stage before is above this; 1 leaves
    out none (Polaris: 0.9)."""


@dataclass(frozen=True)
class Rollout(Section):
    prompts: Positive = 256
    """Prompts a step (verl data.train_batch_size)."""
    samples: Positive = 8
    """Rollouts per prompt, the group of GRPO (verl rollout.n)."""
    max_tokens: Positive = 15_360
    """Response budget in tokens (verl data.max_response_length)."""
    temperature: NonNegative = 1.0
    """Sampling temperature; the policy's log-probs are taken at it too (verl rollout.temperature)."""
    top_p: Share = 1.0
    """Nucleus sampling (verl rollout.top_p)."""
    top_k: Count = 0
    """Sample from the k likeliest tokens; 0 means all (verl rollout.top_k = -1)."""
    engine: Engine = "local"
    """Who samples: the in-process JAX sampler, or vLLM servers, see [sampler] (ours; JustRL used vLLM)."""
    slots: Positive = 64
    """Sequences that the local sampler decodes at once (ours)."""


@dataclass(frozen=True)
class Sampler(Section):
    urls: tuple[ServerURL, ...] = ()
    """vLLM servers that are running, such as http://10.0.0.2:8000 (ours)."""
    servers: Count = 0
    """vLLM servers to start on this machine instead, and to stop with the run (ours)."""
    vllm: Location = ".venv-vllm/bin/vllm"
    """The vllm program that starts them, in an environment of its own: make vllm (ours)."""
    vllm_options: tuple[str, ...] = ()
    """More options for it, such as "--gpu-memory-utilization", "0.5" (ours)."""
    transport: TransportName = "files"
    """How weights get to the servers: by a file in sampler.folder, or broadcast from GPU to GPU (ours)."""
    folder: Location = "/dev/shm"
    """Where published weights lie, in a folder that only this user can read; every server reads them: memory of this
    host, or a shared file system (ours)."""
    concurrency: Positive = 64
    """Prompts under way at one server (ours)."""
    request_seconds: Positive = 3600
    """Longest that one request may take before it goes to another server (ours)."""
    publish_seconds: Positive = 300
    """Longest that a server may take to load weights before the run goes on without it (ours)."""
    patience_seconds: Positive = 600
    """How long to wait for a server that is gone before the run ends, to go on later (ours)."""
    logprob_diff_limit: NonNegative = 0.0
    """Nats a token by which sampler and trainer may differ on average; a step above ends the run once it is saved. 0
    only warns, where they differ by far more than before (ours)."""
    max_staleness: Count = 0
    """Batches that are sampled ahead, by weights up to so many steps old, while the trainer updates (JustRL: 0)."""
    on_update: OnUpdate = "keep"
    """Requests under way when weights change go on with the new ones, or end first (ours)."""
    correction: Correction = "none"
    """Importance weights of tokens, trainer's probability over sampler's: truncated cuts them off at cap and floor,
    masked leaves tokens out that are beyond, filtered takes the token's own weight where the level's is within (JustRL:
    none)."""
    correction_level: Level = "token"
    """A token's ratio, the product of its sequence's (sequence), or their geometric mean (geometric) (ours)."""
    correction_cap: Annotated[float, Field(ge=1)] = 2.0
    """Largest importance weight (verl rollout_is_threshold; IcePop in ProRL v2: 5)."""
    correction_floor: Annotated[Float, Field(ge=0, le=1)] = 0.0
    """Smallest importance weight: truncated raises others to it, masked and filtered leave them out; 0 is none (IcePop
    in ProRL v2: 0.5)."""


@dataclass(frozen=True)
class RewardFunction(Section):
    """One of several functions of a reward."""

    path: Annotated[FunctionPath, Field(min_length=1)]
    """As reward.function."""
    weight: Float = 1.0
    """What its value is multiplied by in the reward; 0 only reports it."""
    name: Annotated[str, AfterValidator(_metric_name)] = ""
    """Of its metrics, reward/NAME/mean; empty takes the function's."""

    @property
    def title(self) -> str:
        """Its name in metrics."""
        return self.name or self.path.rpartition(":")[2]


@dataclass(frozen=True)
class Reward(Section):
    verifier: Literal[Verifier, "none"] = "strict_boxed"
    """Marks a response +1 or -1; strict_boxed compares the last \\boxed{} as a string (JustRL's fork), minerva
    DAPO's `Answer:` line after normalizing, equivalent is DeepScaleR's lenient one (by thoughts), corrected a lenient
    one without that one's faults, math_verify the library of that name; equivalent_or_math_verify takes either; none
    leaves it to reward.function and reward.threshold."""
    thoughts: Thoughts = "required"
    """Of verifiers with "equivalent" in their names: the text has <think> and </think> (required) or </think> (closed),
    and the answer comes after; or after </think> if there is one, else anywhere (optional) (DeepScaleR: required)."""
    wrong: Annotated[Float, Field(lt=1)] = -1.0
    """Reward of a wrong answer; a right one's is 1 (JustRL: -1; most others: 0)."""
    with_prompt: bool = False
    """Give the verifier the prompt's text before the response, whose template may hold <think> (DeepScaleR: true)."""
    overlong_tokens: Count = 0
    """Penalize answers that run into the last n tokens of rollout.max_tokens; 0 does not (JustRL's ablation: 4096)."""
    overlong_penalty: NonNegative = 1.0
    """What an answer of rollout.max_tokens loses; less in proportion below (verl overlong_buffer.penalty_factor)."""
    function: FunctionPath = ""
    """A function of your own whose value is added to the reward, see docs/rewards.md: "FILE.py:FUNCTION", from the
    recipe's folder or the current one, "MODULE:FUNCTION", or the name of an entry point of "jaxrl.rewards" (ours)."""
    functions: tuple[RewardFunction, ...] = ()
    """Several of them instead, each a [[reward.functions]] with path, weight and name (ours)."""
    verifier_weight: NonNegative = 1.0
    """What 1 or reward.wrong, for the verifier, is multiplied by before the functions' values are added (ours)."""
    threshold: Float = 0.5
    """With verifier = "none", an answer is right if the functions' weighted sum is above this (ours)."""
    workers: Positive = 4
    """Processes that call each function; a plain one is called once at a time in each (ours)."""
    in_flight: Positive = 64
    """Calls of an async function under way at a time in each process, or most answers in a batch function's (ours)."""
    seconds: PositiveFloat = 60.0
    """Longest that a call may take (ours)."""
    memory_mib: Count = 4096
    """MiB of address space that calls may take in each of these processes, imports aside; 0 is no limit (ours)."""
    on_failure: OnFailure = "end"
    """A call that raises, takes too long or gives no number ends the run, or counts as failure_value (value) (ours)."""
    failure_value: Float = 0.0
    """See on_failure; reward/failed_fraction counts them."""

    @property
    def named(self) -> tuple[RewardFunction, ...]:
        """The functions, whichever key names them."""
        return (RewardFunction(self.function),) if self.function else self.functions

    @property
    def marked_by(self) -> Verifier | None:
        """The verifier, if there is one."""
        return None if self.verifier == "none" else self.verifier


@dataclass(frozen=True)
class Advantage(Section):
    center: Annotated[str, _known_or_plugin(*get_args(Center))] = "group"
    """What is taken off a reward: the mean of its group (GRPO), of the group's others (leave_one_out, RLOO), of the
    group weighted by length (length_weighted, OPO), of all tokens (batch), or none; second_best leaves the best of a
    group its lead (pass@k); or "module:function"."""
    scale: Scale = "group"
    """Then divide by the group's standard deviation, ddof = 1 (verl norm_adv_by_std_in_grpo); or by that of all tokens
    of the step, less their mean (batch, REINFORCE++); or not (none, Dr. GRPO)."""
    epsilon: PositiveFloat = 1e-6
    """Added to the standard deviation (verl core_algos)."""


@dataclass(frozen=True)
class KL(Section):
    coefficient: NonNegative = 0.0
    """Of the divergence from a reference: the model that training starts from, until a stage restarts it or
    reset_every does; with 0 there is none (JustRL: none)."""
    place: Literal["loss", "reward"] = "loss"
    """A term of the loss, weighted like the policy's; or taken off each token's advantage with that of all later tokens
    (none in JustRL)."""
    estimator: Estimator = "k3"
    """Of each token's KL divergence, see docs/techniques.md (none in JustRL)."""
    reset_every: Count = 0
    """The reference becomes the policy after every so many steps of a stage, and the optimizer is kept; 0 is never
    (ProRL v2: 250)."""

    @property
    def in_loss(self) -> bool:
        """Whether there is a term of the loss."""
        return self.coefficient > 0 and self.place == "loss"

    @property
    def in_reward(self) -> bool:
        """Whether the divergence is taken off advantages."""
        return self.coefficient > 0 and self.place == "reward"


@dataclass(frozen=True)
class Entropy(Section):
    bonus: NonNegative = 0.0
    """Coefficient of the entropy that is taken off the loss, weighted like the policy's (JustRL: none)."""
    quantile: Annotated[Float, Field(ge=0, lt=1)] = 0.0
    """Tokens whose entropy is above this quantile of their answer's are clipped to 1 -+ entropy.clip and have no KL
    term; 0 makes no difference between tokens (none in JustRL; Archer: 0.8)."""
    clip: Annotated[Float, Field(ge=0, lt=1)] = 0.5
    """Of the tokens above the quantile (Archer)."""


@dataclass(frozen=True)
class Groups(Section):
    filter: Filter = "none"
    """What becomes of groups whose share of right answers is outside keep: they are trained on (none), left out (drop),
    replaced by other prompts (refill, DAPO's dynamic sampling), or by copies of groups inside (substitute, Polaris)
    (JustRL: none)."""
    keep: tuple[Annotated[Float, Field(ge=0, le=1)], Annotated[Float, Field(ge=0, le=1)]] = (0.0, 1.0)
    """Shares of right answers between which a group is kept, bounds excluded (DAPO)."""
    max_rounds: Count = 0
    """Rounds of sampling a step, after which refill and substitute go on with what there is; 0 is no limit (DAPO's
    recipe: 10)."""
    rescue: bool = False
    """In a group without a right answer, one becomes the newest right answer to its prompt from an earlier step
    (described by Polaris' authors)."""
    rescue_answers: Positive = 4096
    """Right answers that are kept for it, one a prompt, those of the latest steps (ours)."""

    @property
    def rounds(self) -> bool:
        """Whether a step may take more than one round of sampling."""
        return self.filter in ("refill", "substitute")


@dataclass(frozen=True)
class Length(Section):
    truncated_penalty: NonNegative = 0.0
    """Taken off the reward of an answer that was cut off (none in JustRL; ProRL v1)."""
    truncated_factor: Annotated[Float, Field(ge=0, le=1)] = 1.0
    """The reward of an answer that was cut off is multiplied by this (none in JustRL; ProRL v2's scripts: 0)."""
    on_truncated: OnTruncated = "train"
    """Answers that were cut off are trained on, or left out of the loss (drop, DAPO's overlong filtering), or without
    advantage if wrong (drop_wrong, DeepCoder's); they count in their group's mean all the same (JustRL: train)."""
    cosine: NonNegative = 0.0
    """Reward of an empty answer over one of rollout.max_tokens, along half a cosine (none in JustRL; ProRL v2)."""
    cosine_on: Count = 0
    """Steps with the cosine, then cosine_off without, and so on; 0 and 0 is always (ProRL v2: 100 and 500)."""
    cosine_off: Count = 0
    """See cosine_on."""


@dataclass(frozen=True)
class Loss(Section):
    surrogate: Annotated[str, _known_or_plugin("clip", "score", "sigmoid")] = "clip"
    """Of a token's ratio: clip is PPO's, score keeps every token's gradient (CISPO, REINFORCE), sigmoid is SAPO's; or
    "module:function", see docs/techniques.md (verl policy_loss)."""
    ratio: Ratio = "token"
    """Of each token's probabilities, or one a sequence: the mean of log-ratios (sequence, GSPO), clipped before
    (geometric, GMPO) (verl: token)."""
    clip_low: Annotated[Float, Field(ge=0, le=1)] = 0.2
    """The ratio is clipped below 1 - clip_low (verl clip_ratio_low)."""
    clip_high: NonNegative = 0.28
    """The ratio is clipped above 1 + clip_high (verl clip_ratio_high)."""
    dual_clip: Annotated[float, Field(gt=1)] = 10.0
    """Bound of the loss for negative advantages, in units of -A, for surrogate = "clip"; inf is none (verl
    clip_ratio_c)."""
    log_ratio_bound: Annotated[float, Field(ge=1)] = math.inf
    """Log-ratios are cut off at +- this (verl 0.4.0, JustRL's: none; 20 since)."""
    sigmoid_positive: PositiveFloat = 1.0
    """Temperature of surrogate = "sigmoid" where the advantage is positive (SAPO)."""
    sigmoid_negative: PositiveFloat = 1.05
    """And where it is negative (SAPO)."""
    normalization: Literal[Normalization, "verl_dynamic"] = "token_mean"
    """How token losses of a mini-batch are averaged (verl loss_agg_mode = token-mean; what that came to, by rank and
    micro-batch, is verl_dynamic, see docs/fidelity.md)."""
    verl_ranks: Positive = 32
    """Of verl_dynamic: ranks that share the sequences of a step (verl: one a GPU)."""
    verl_tokens: Positive = 32_768
    """Of verl_dynamic: tokens that a micro-batch may hold (verl ppo_max_token_len_per_gpu)."""
    skip_zero_advantage: bool = True
    """Leave sequences whose loss is exactly 0 out of the device work (ours)."""
    skip_first_old_logprobs: bool = True
    """Take the first mini-batch's ratio as 1 instead of recomputing its log-probs, where that is exact (ours)."""


@dataclass(frozen=True)
class Optimizer(Section):
    learning_rate: NonNegative = 1e-6
    """AdamW's, after warm-up, constant (verl actor.optim.lr)."""
    warmup_steps: Count = 10
    """Rollout batches of linear warm-up; the first batch runs at 0 (verl lr_warmup_steps)."""
    beta1: Annotated[Float, Field(ge=0, lt=1)] = 0.9
    """First-moment decay (torch default)."""
    beta2: Annotated[Float, Field(ge=0, lt=1)] = 0.999
    """Second-moment decay (torch default)."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of the second moment (torch default)."""
    weight_decay: NonNegative = 0.1
    """Decoupled, on every parameter, norms and biases included (verl: one parameter group)."""
    max_grad_norm: PositiveFloat = 1.0
    """Global L2 norm to which gradients are clipped (verl grad_clip)."""
    minibatch_prompts: Positive = 64
    """Prompts per optimizer update; 256 / 64 gives 4 updates a step (verl ppo_mini_batch_size)."""
    epochs: Positive = 1
    """Passes over a step's mini-batches, in the same order (verl ppo_epochs; Archer: 3)."""


@dataclass(frozen=True)
class Packing(Section):
    stream_tokens: Positive = 32_768
    """Most tokens in one device's stream, the micro-batch (verl ppo_max_token_len_per_gpu); may be down to half."""
    segments: Positive = 64
    """Most sequences in one stream (ours)."""
    bucket_tokens: Positive = 512
    """Attention runs at segment lengths rounded up to this many tokens (ours)."""
    logprob_chunk: Positive = 2048
    """Tokens whose logits exist at one time (ours)."""


@dataclass(frozen=True)
class Mesh(Section):
    data: Positive = 1
    """Replicas of the sharded state, across slow links (ours)."""
    fsdp: Count = 0
    """Devices that share one copy of the state; 0 takes all devices / data (verl: all 32 ranks)."""
    gather: Gather = "step"
    """When parameters are whole: from the start of an update, or a layer at a time for models too large (ours)."""


@dataclass(frozen=True)
class Checkpoint(Section):
    every: Positive = 50
    """Steps between checkpoints; before an evaluation and after the last step there is always one (verl save_freq)."""
    keep_last: Positive = 2
    """Newest checkpoints to keep (ours; JustRL kept all)."""
    keep_every: Count = 500
    """Keep forever every checkpoint whose step is a multiple of this; 0 keeps none (ours)."""


@dataclass(frozen=True)
class Eval(Section):
    path: Location = ""
    """Held-out problems with the training columns, marked by eval.verifier; what data.path may be (ours)."""
    config: str = ""
    """Configuration of the data set of eval.path, if it has several (ours)."""
    split: str = ""
    """Split of eval.path; empty takes the test, the validation or the training split, the first there is (ours)."""
    files: tuple[str, ...] = ()
    """Globs of the files of eval.path to read instead, as data.files (ours)."""
    benchmarks: str = ""
    """Benchmarks to evaluate on during training, graded by rule, as `jaxrl eval --benchmarks` takes them (JustRL:
    aime24,aime25,amc23)."""
    benchmark_folder: Location = ""
    """Local copies of the benchmarks, as `jaxrl eval --data` takes them; empty downloads them."""
    every: Count = 0
    """Steps between evaluations during training; 0 evaluates only on request (JustRL: 50)."""
    verifier: Literal["", Verifier] = ""
    """Marks answers to the problems of eval.path, in place of reward.verifier and functions (ours)."""
    problems: Count = 0
    """Take the first n problems, of each benchmark too; 0 takes all."""
    samples: Positive = 8
    """Responses per held-out problem."""
    benchmark_samples: Count = 0
    """Responses per problem of a benchmark; 0 takes the benchmark's own number, 32 or 4."""
    max_tokens: Count = 0
    """Longest response of an evaluation; 0 takes rollout.max_tokens (JustRL: 31744)."""
    temperature: NonNegative = 1.0
    """Sampling temperature of evaluation (JustRL: 0.7)."""
    top_p: Share = 1.0
    """Nucleus of evaluation (JustRL: 0.9)."""


@dataclass(frozen=True)
class StageEntry(Section):
    """One of [[stages]]: a part of the run, whose recipe is the base with changes; see stages.py."""

    until: Positive
    """Steps of the run after which the stage ends."""
    name: Annotated[str, AfterValidator(_printable)] = ""
    restart: tuple[Restart, ...] = ()
    """What starts anew with the stage."""
    changes: dict[str, dict[str, object]] = field(default_factory=dict)
    """Values by section and key, written as section.key = value."""


@dataclass(frozen=True)
class Recipe:
    """One experiment."""

    run: Run = field(default_factory=Run)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    rollout: Rollout = field(default_factory=Rollout)
    sampler: Sampler = field(default_factory=Sampler)
    reward: Reward = field(default_factory=Reward)
    advantage: Advantage = field(default_factory=Advantage)
    kl: KL = field(default_factory=KL)
    entropy: Entropy = field(default_factory=Entropy)
    groups: Groups = field(default_factory=Groups)
    length: Length = field(default_factory=Length)
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    packing: Packing = field(default_factory=Packing)
    mesh: Mesh = field(default_factory=Mesh)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    eval: Eval = field(default_factory=Eval)
    stages: Annotated[tuple[StageEntry, ...], tyro.conf.Fixed] = ()

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    @property
    def minibatches(self) -> int:
        """Mini-batches of a step."""
        return self.rollout.prompts // self.optimizer.minibatch_prompts

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates of a step: one for each mini-batch and epoch."""
        return self.minibatches * self.optimizer.epochs

    @property
    def looks(self) -> bool:
        """Whether a technique looks at all log-probs of a step before its mini-batches are packed."""
        return self.sampler.correction != "none" or self.kl.in_reward or self.entropy.quantile > 0

    @property
    def step_tokens(self) -> int:
        """Tokens of a step at most: prompts x samples x longest sequence."""
        return (
            self.rollout.prompts
            * self.rollout.samples
            * (self.data.max_prompt_tokens + self.rollout.max_tokens)
        )

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest prompt and completion, evaluations included."""
        return self.data.max_prompt_tokens + max(self.rollout.max_tokens, self.eval.max_tokens)
