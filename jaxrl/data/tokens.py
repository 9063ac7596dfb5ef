"""The tokenizer of a model: problems to token ids by way of its chat template, and back."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
from jaxtyping import Int32

from jaxrl import config
from jaxrl.errors import InputError, first_line
from jaxrl.types import Detokenize, Tokenizer

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
BATCH = 1024  # rows templated and tokenized at a time


def load_tokenizer(path: str) -> Tokenizer:
    """Loads the tokenizer of a Hugging Face folder.

    Raises:
      InputError: if there is none, or it cannot be read.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is missing is intended
    from transformers import AutoTokenizer

    # Where all of these are missing, transformers makes up an empty tokenizer from config.json.
    if Path(path).is_dir() and not any((Path(path) / name).exists() for name in VOCABULARIES):
        raise InputError(f"{path}: no tokenizer; the folder needs tokenizer.json and tokenizer_config.json")
    try:
        return cast(Tokenizer, AutoTokenizer.from_pretrained(path))
    except Exception as error:  # whatever the many tokenizer classes raise
        why = first_line(error)
        raise InputError(
            f"{path}: no readable tokenizer ({why}); a model folder has tokenizer.json"
        ) from None


def require_template(tokenizer: Tokenizer, section: config.Data) -> None:
    """Refuses a tokenizer without a chat template where the recipe wants one.

    Raises:
      InputError: if there is none.
    """
    if section.chat_template and not tokenizer.chat_template:
        raise InputError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template; add one to tokenizer_config.json, "
            "or set data.chat_template = false for plain text"
        )


def detokenizer(tokenizer: Tokenizer) -> Detokenize:
    """Token ids to text, without special tokens."""

    def detokenize(ids: np.ndarray) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    return detokenize


def encode(
    tokenizer: Tokenizer, section: config.Data, problems: Sequence[str]
) -> Iterator[Int32[np.ndarray, " T"]]:
    """Yields the token ids of each problem, inside the prefix, suffix and template of [data]."""
    for first in range(0, len(problems), BATCH):
        texts = [section.prefix + text + section.suffix for text in problems[first : first + BATCH]]
        if section.chat_template:  # the template writes its own special tokens
            chats = [[{"role": "user", "content": text}] for text in texts]
            texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        for ids in tokenizer(texts, add_special_tokens=not section.chat_template)["input_ids"]:
            yield np.array(ids, np.int32)
