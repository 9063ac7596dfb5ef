"""The token ids that a model has, and those that end a response."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from jaxrl.errors import InputError
from jaxrl.json_fields import read_json, shown
from jaxrl.types import Tokenizer

FILES = ("generation_config.json", "config.json")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The token ids of a model."""

    size: int  # rows of the embedding; ids are below it
    stop_ids: tuple[int, ...]  # that end a response
    summary: str = ""  # of the stop ids, for people


def read_vocabulary(folder: Path, tokenizer: Tokenizer, size: int) -> Vocabulary:
    """Reads which ids end a response: the end-of-sequence ids of generation_config.json, config.json and the tokenizer.

    transformers takes those of generation_config.json alone, from which chat models' own turn ends are often missing.
    The tokenizer's is left out where the model has no row for it, since it is never sampled then.

    Args:
      folder: the model's.
      tokenizer: the model's.
      size: the model's vocab_size.

    Raises:
      InputError: if a file has anything but ids below `size` there, or there is none anywhere.
    """
    found = dict[int, str]()
    for name in FILES:
        value = read_json(folder / name).get("eos_token_id") if (folder / name).exists() else None
        for each in value if isinstance(value, list) else [] if value is None else [value]:
            if type(each) is not int or not 0 <= each < size:
                raise InputError(
                    f"{folder / name}: eos_token_id = {shown(value)} is neither a token id below vocab_size = {size} "
                    "nor a list of such; write the ids of the tokens that end a response"
                )
            found.setdefault(each, name)
    own = tokenizer.eos_token_id
    if own is not None and own < size:
        found.setdefault(own, "tokenizer")
    if not found:
        raise InputError(
            f"{folder}: no token ends a response: generation_config.json, config.json and the tokenizer have no "
            f"eos_token_id below vocab_size = {size}; add one to generation_config.json"
        )
    named = [f"{i} {tokenizer.decode(np.array([i], np.int32))!r} ({source})" for i, source in found.items()]
    return Vocabulary(size, tuple(found), f"stop ids: {', '.join(named)}")
