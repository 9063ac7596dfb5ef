"""A vLLM server's answer to a prompt, which is checked completely before it is believed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import numpy as np

from jaxrl.errors import InputError
from jaxrl.json_fields import LARGEST, shown
from jaxrl.sampling.client import BadAnswer
from jaxrl.types import FinishReason, JsonObject, Prompt, Rollout, SamplingParams

NOT_A_NUMBER = -9999.0  # what vLLM writes for a log-probability that is NaN or infinite
NAN = float("nan")
ROUNDING = 1e-5  # nats by which that of a certain token may be above 0

T = TypeVar("T")


class Needs(NamedTuple):
    """What a server has to serve."""

    vocab_size: int = LARGEST
    max_tokens: int = 0  # of a prompt and its completion; 0 is not known
    dtype: str = ""  # of the computation; empty is not known


def read_answer(
    answer: JsonObject,
    prompt: Prompt,
    samples: int,
    params: SamplingParams,
    vocab_size: int,
    versions: Mapping[str, int],
    server: str = "",
) -> list[Rollout]:
    """Reads the completions of a prompt.

    Args:
      answer: of /inference/v1/generate.
      prompt: that was asked for.
      samples: completions that were asked for.
      params: as they were asked for.
      vocab_size: token ids are below it.
      versions: of the model weights that may have sampled, by name.
      server: its URL.

    Returns:
      rollouts [samples], in the order of their indices.

    Raises:
      BadAnswer: if anything is not as it was asked for.
      InputError: if a completion was cut short.
    """
    choices = _field(answer, "choices", list)
    by_index = {_field(choice, "index", int): choice for choice in choices}
    if len(choices) != samples or by_index.keys() != set(range(samples)):
        raise BadAnswer(f"samples {shown(sorted(by_index))} came, where {samples} were asked for")
    rollouts = []
    for i in range(samples):
        choice = by_index[i]
        ids = _tokens(choice, vocab_size)
        tokens, logprobs = np.array(ids, np.int32), np.array(_logprobs(choice, ids), np.float32)
        version, reason = _oldest_version(choice, len(ids), versions), _reason(choice, tokens, params)
        if reason == "length" and len(ids) < params.max_tokens:
            raise InputError(
                f"{server} cut a completion at {len(prompt.tokens)} + {len(ids)} tokens; start it with "
                f"--max-model-len {len(prompt.tokens) + params.max_tokens} or more"
            )
        rollouts.append(Rollout(prompt, tokens, logprobs, reason, version, server=server))
    return rollouts


def _field(value: object, name: str, kind: type[T]) -> T:
    """A field of what has to be a JSON object. A bool is no int here."""
    found = value.get(name) if isinstance(value, Mapping) else value
    if not isinstance(value, Mapping) or type(found) is not kind:
        raise BadAnswer(f"{name} is {shown(found)}, and no {kind.__name__}")
    return found


def _tokens(choice: object, vocab_size: int) -> list[int]:
    ids = _field(choice, "token_ids", list)
    if not ids:
        raise BadAnswer("a completion is empty")
    if set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) >= vocab_size:
        wrong = next(i for i in ids if type(i) is not int or not 0 <= i < vocab_size)
        raise BadAnswer(f"{shown(wrong)} is no token id of a vocabulary of {vocab_size}")
    return ids


def _logprobs(choice: object, ids: list[int]) -> list[float]:
    """The log-probabilities of these tokens. JSON may hold NaN, and ints that have no float."""
    content = _field(_field(choice, "logprobs", dict), "content", list)
    values: list[float] = [entry.get("logprob", NAN) if isinstance(entry, dict) else NAN for entry in content]
    if set(map(type, values)) - {float, int} or not all(NOT_A_NUMBER < v <= ROUNDING for v in values):
        wrong = next(v for v in values if type(v) not in (float, int) or not NOT_A_NUMBER < v <= ROUNDING)
        raise BadAnswer(f"{shown(wrong)} is no log-probability")
    if len(ids) != len(values):
        raise BadAnswer(f"{len(ids)} tokens came with {len(values)} log-probabilities")
    if any(entry.get("token_id", i) != i for entry, i in zip(content, ids, strict=True)):
        raise BadAnswer("log-probabilities are of other tokens")
    return values


def _oldest_version(choice: object, tokens: int, versions: Mapping[str, int]) -> int:
    """The oldest version that sampled one of the tokens; spans of versions follow each other."""
    found, end = [], 0
    for span in _field(choice, "weight_versions", list):
        name = _field(span, "version", str)
        start, stop = span.get("start", end), span.get("end", tokens)
        if name not in versions or type(stop) is not int or start != end or not start < stop:
            raise BadAnswer(
                f"tokens {shown(start)} to {shown(stop)} are of weights {shown(name)}, not {[*versions]}"
            )
        found.append(versions[name])
        end = stop
    if end != tokens:
        raise BadAnswer(f"{end} of {tokens} tokens have a version of their weights")
    return min(found)


def _reason(choice: object, tokens: np.ndarray, params: SamplingParams) -> FinishReason:
    """Why a completion ended: a stop id, which is its last token alone, or their number."""
    found = _field(choice, "finish_reason", str)
    (stops,) = np.isin(tokens, params.stop_ids).nonzero()
    reason: FinishReason = "stop" if len(stops) else "length"
    if found != reason or any(stops < len(tokens) - 1) or len(tokens) > params.max_tokens:
        raise BadAnswer(
            f"{len(tokens)} tokens of at most {params.max_tokens}, with stop ids at {stops.tolist()}, ended by "
            f"{shown(found)}"
        )
    return reason
