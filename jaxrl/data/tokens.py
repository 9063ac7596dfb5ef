"""The tokenizer of a model: problems to token ids by way of its chat template, and back."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
from blake3 import blake3
from jaxtyping import Int32

from jaxrl import config
from jaxrl.data.messages import Chat
from jaxrl.data.stops import Vocabulary
from jaxrl.errors import InputError, first_line
from jaxrl.json_fields import read_json
from jaxrl.types import Detokenize, Tokenizer

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
COMPANIONS = (
    "*token*",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "config.json",
)
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
LARGEST_VOCABULARY = 1 << 28  # bytes; the largest tokenizer.json that is in use has some 35 million
BATCH = 1024  # rows templated and tokenized at a time


def load_tokenizer(path: str) -> Tokenizer:
    """Loads the tokenizer of a Hugging Face folder.

    Raises:
      InputError: if there is none, or it cannot be read.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is missing is intended
    from transformers import AutoTokenizer

    if Path(path).is_dir():
        _require_readable(Path(path))
    # Where all of these are missing, transformers makes up an empty tokenizer from config.json.
    if Path(path).is_dir() and not any((Path(path) / name).exists() for name in VOCABULARIES):
        raise InputError(f"{path}: no tokenizer; the folder needs tokenizer.json and tokenizer_config.json")
    try:
        # Code of the folder's is not run; left open, transformers would ask at the terminal, and wait.
        return cast(Tokenizer, AutoTokenizer.from_pretrained(path, trust_remote_code=False))
    except Exception as error:  # whatever the many tokenizer classes raise
        why = first_line(error)
        raise InputError(
            f"{path}: no readable tokenizer ({why}); a model folder has tokenizer.json"
        ) from None


def tokenizer_digest(folder: Path) -> str:
    """A digest of the files that make a folder's tokenizer and chat template."""
    whole = blake3()
    for file in sorted(_companions(folder)):
        if file.is_file() and file.name != "config.json":
            whole.update(f"{file.relative_to(folder)}\n".encode()).update(file.read_bytes())
    return whole.hexdigest()


def _companions(folder: Path) -> Iterator[Path]:
    """What a tokenizer is read from."""
    yield from (file for file in folder.iterdir() if any(map(file.match, COMPANIONS)))
    yield from folder.glob("additional_chat_templates/*")


def _require_readable(folder: Path) -> None:
    """Raises InputError for files of a tokenizer that would be waited for, or are no such files."""
    for file in _companions(folder):
        if file.suffix or not file.is_dir():
            status = file.stat() if file.exists() else None
            if status is None or not stat.S_ISREG(status.st_mode):
                raise InputError(f"{file}: not a regular file; put the tokenizer's file there")
            if status.st_size > LARGEST_VOCABULARY:
                raise InputError(
                    f"{file}: {status.st_size} bytes are more than any tokenizer has ({LARGEST_VOCABULARY})"
                )
    for name in SETTINGS:
        if (folder / name).exists():
            read_json(folder / name)


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
    tokenizer: Tokenizer,
    section: config.Data,
    chats: Sequence[Chat],
    vocabulary: Vocabulary | None = None,
) -> Iterator[Int32[np.ndarray, " T"]]:
    """Yields the token ids of each chat, inside the template of [data] or as plain text.

    A tokenizer's own special tokens are added to plain text alone, and only those before it: a template writes its own,
    and after an end-of-sequence token there is nothing to continue.

    Args:
      tokenizer: the model's.
      section: the recipe's [data].
      chats: each with its row, for messages.
      vocabulary: the model's, to which ids are held; None holds them to none.

    Raises:
      InputError: naming the row, if the template does not take a chat, or its ids cannot be continued by the model.
    """
    if section.chat_template:
        from jaxrl.data.templates import read_template  # jinja2 is not needed for plain text

        require_template(tokenizer, section)
        _require_no_control(chats, tokenizer)
        render, head = read_template(tokenizer, section).render, []
    elif section.template_arguments or section.date:
        given = "data.date" if section.date else "data.template_arguments"
        raise InputError(f"{given} is set, and data.chat_template = false uses no template; leave one out")
    else:
        render, head = _plain, _head(tokenizer)
    for first in range(0, len(chats), BATCH):
        some = chats[first : first + BATCH]
        for chat, ids in zip(
            some, tokenizer(render(some), add_special_tokens=False)["input_ids"], strict=True
        ):
            tokens = np.array([*head, *ids], np.int32)
            _require_continuable(tokens, chat, tokenizer, vocabulary)
            yield tokens


def _plain(chats: Sequence[Chat]) -> list[str]:
    for chat in chats:
        if chat.arguments:
            raise InputError(
                f"{chat.where}: has template arguments, and data.chat_template = false uses no template; empty "
                "data.template_column"
            )
    return [chat.messages[-1]["content"] for chat in chats]


def _require_no_control(chats: Sequence[Chat], tokenizer: Tokenizer) -> None:
    """Raises InputError for a message with the text of a special token: the model would read it as the template's."""
    special = sorted(filter(None, tokenizer.all_special_tokens), key=len, reverse=True)
    control = re.compile("|".join(map(re.escape, special)) or r"(?!)")
    for chat in chats:
        for message in chat.messages:
            if found := control.search(message["content"]):
                raise InputError(
                    f"{chat.where}: the message of '{message['role']}' holds {found[0]!r}, a special token of "
                    f"{tokenizer.name_or_path}, which ends or begins a turn; take it out of the text (a prompt that is "
                    "written out whole wants data.chat_template = false)"
                )


def _head(tokenizer: Tokenizer) -> list[int]:
    """The special tokens that the tokenizer puts before plain text."""
    bare, whole = (tokenizer(["a"], add_special_tokens=added)["input_ids"][0] for added in (False, True))
    starts = range(len(whole) - len(bare) + 1)
    return whole[: next((i for i in starts if bare and whole[i : i + len(bare)] == bare), 0)]


def _require_continuable(
    tokens: Int32[np.ndarray, " T"], chat: Chat, tokenizer: Tokenizer, vocabulary: Vocabulary | None
) -> None:
    """Raises InputError for a prompt without tokens, with ids that the model lacks, or that has ended.

    JAX would take the embedding's last row for an id beyond it.
    """
    folder = tokenizer.name_or_path
    if not len(tokens):
        raise InputError(f"{chat.where}: the tokenizer of {folder} makes no token of it; remove the row")
    if vocabulary and tokens.max() >= vocabulary.size:
        over = tokens[tokens >= vocabulary.size][:1]
        raise InputError(
            f"{chat.where}: its token id {over[0]} ({tokenizer.decode(over)!r}) is not below the model's vocab_size = "
            f"{vocabulary.size}; take the tokenizer that belongs to the model, {folder} has another one's"
        )
    if vocabulary and tokens[-1] in vocabulary.stop_ids:
        last = tokenizer.decode(tokens[-1:])
        maker = "the chat template ends it so: " if chat.messages[-1]["content"][-len(last) :] != last else ""
        raise InputError(
            f"{chat.where}: the prompt ends in {last!r}, which ends a response, so there is none to come; {maker}"
            "let it end where the assistant's turn begins"
        )
