"""From a row's values to a chat and an answer: what a problem may be, and what is refused in one line."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal

from jaxrl import config
from jaxrl.data.messages import Chat, Message
from jaxrl.errors import InputError
from jaxrl.rewards.strict_boxed import BOX, extract
from jaxrl.types import JsonObject

# The instruction that DAPO-Math-17k puts around every problem; JustRL's authors took it off.
DAPO_PREFIX = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_SUFFIX = '\n\nRemember to put your answer on its own line after "Answer:".'

ROLES = ("system", "user", "assistant")
SHAREGPT = {"human": "user", "gpt": "assistant"}  # that spelling's names, in keys `from` and `value`
# Keys of a message that templates write out, and that would be lost here; others (name, id) are left out.
UNSUPPORTED = ("tool_calls", "tool_call_id", "function_call", "reasoning_content")
SHORTEST_HINT = 10  # characters; a shorter one is not shown (QuestA, datasets/add_prefix.py)
NO_NUMBERS = ("nan", "inf")  # texts that a table writes where a number is missing


def chat_of(
    value: object, section: config.Data, where: str, arguments: JsonObject | None = None, column: str = ""
) -> Chat:
    """The chat of one row: the template gets all of its messages, and the instruction is in the last one.

    Args:
      value: text, or a list of messages with role and content (or `from` and `value`) that ends in a user's.
      section: the recipe's [data]: system, prefix, suffix, strip_dapo_wrapper, chat_template.
      where: file and row.
      arguments: of the template, of this row alone.
      column: that the value is from; empty is the section's.

    Raises:
      InputError: naming the row and the message, for what is no chat to be continued.
    """
    column = column or section.problem_column
    at = f"{where}: '{column}'"
    if not value or not isinstance(value, str | list) or (isinstance(value, str) and not value.strip()):
        raise InputError(f"{at} holds neither text nor chat messages; remove the row or fill it in")
    messages = (
        [{"role": "user", "content": value}] if isinstance(value, str) else _messages(value, section, at)
    )
    problem = messages[-1]["content"]
    if section.strip_dapo_wrapper:
        problem = problem.removeprefix(DAPO_PREFIX).removesuffix(DAPO_SUFFIX)
    if not problem.strip():
        raise InputError(f"{at} holds neither text nor chat messages; remove the row or fill it in")
    if section.system:
        if messages[0]["role"] == "system":
            raise InputError(
                f"{at} has a system message of its own, and data.system is set; empty data.system"
            )
        messages = [{"role": "system", "content": section.system}, *messages]
    if len(messages) > 1 and not section.chat_template:
        raise InputError(
            f"{at}: a chat of {len(messages)} messages, data.system included, is no plain text; set "
            "data.chat_template = true"
        )
    last = {"role": "user", "content": section.prefix + problem + section.suffix}
    return Chat([*messages[:-1], last], problem, where, arguments or {})


def hint_of(value: object, answer: str, section: config.Data, where: str) -> str | None:
    """What follows a problem: hint_prefix and the beginning of its solution; None without a solution with the answer.

    As QuestA's datasets/add_prefix.py makes it (arXiv 2507.13266): the solution is all that follows the last </think>,
    blanks included, and is cut to a whole number of characters; of a hint under 10 characters only the blanks that it
    would begin with are left.

    Args:
      value: the worked solution, maybe after a thought.
      answer: what the solution has to contain.
      section: the recipe's [data]: hint_column, hint_share, hint_prefix.
      where: file and row.

    Raises:
      InputError: naming the row, if the value is not text.
    """
    if not isinstance(value, str | None):
        raise InputError(
            f"{where}: '{section.hint_column}' is a {type(value).__name__}, and a worked solution is text; set "
            "data.hint_column to a column of text"
        )
    solution = (value or "").rpartition("</think>")[2]
    if not solution.strip() or answer not in solution:
        return None
    shown, prefix = solution[: int(len(solution) * section.hint_share)], section.hint_prefix
    return prefix + shown if len(shown) >= SHORTEST_HINT else prefix[: len(prefix) - len(prefix.lstrip())]


def with_hint(chat: Chat, hint: str, section: config.Data) -> Chat:
    """The chat with a hint between its problem and the suffix."""
    last = {"role": "user", "content": section.prefix + chat.problem + hint + section.suffix}
    return dataclasses.replace(chat, messages=[*chat.messages[:-1], last])


def arguments_of(value: object, section: config.Data, where: str) -> JsonObject:
    """The template arguments of one row: an object, or its JSON text; keys without a value are left out.

    Raises:
      InputError: if it is neither, or holds anything but text, numbers and booleans.
    """
    at = f"{where}: '{section.template_column}'"
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise InputError(
                f"{at} is text that is not JSON; write an object of template arguments"
            ) from None
    if value is None or value == "":
        return {}
    if not isinstance(value, dict):
        raise InputError(
            f"{at} is a {type(value).__name__}, no object of template arguments; write one, or null"
        )
    found = {name: each for name, each in value.items() if each is not None}
    for name, each in found.items():
        if not isinstance(each, str | int | float | bool):
            raise InputError(
                f"{at}: '{name}' is a {type(each).__name__}; a template argument is text, a number or a boolean"
            )
    return found


def answer_of(value: object, section: config.Data, where: str) -> str | None:
    """The answer as verifiers compare it, or None where the row has none.

    Numbers are written without an exponent, and whole ones without a point. Blanks, a box and a pair of dollar signs
    around the whole are taken off; `data.answer_pattern` takes a part.

    Raises:
      InputError: if it is no text and no number, or not a number.
    """
    at = f"{where}: '{section.answer_column}'"
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal | None):
        kind = "a list; a row has one answer" if isinstance(value, list) else "neither text nor a number"
        raise InputError(f"{at} is {str(value)[:80]!r}, {kind}; write it as text")
    if (isinstance(value, str) and value.strip().lower().lstrip("+-") in NO_NUMBERS) or (
        isinstance(value, float | Decimal) and not math.isfinite(value)
    ):
        raise InputError(f"{at} is {str(value).strip()}, not a number; write the answer, or remove the row")
    if isinstance(value, str) and section.answer_pattern:
        found = re.search(section.answer_pattern, value)
        value = found and found[1]
    text = "" if value is None else value if isinstance(value, str) else _digits(value)
    return _bare(text) or None


def _digits(number: float | Decimal) -> str:
    """204.0 -> "204", 0.1 -> "0.1", 1e16 -> "10000000000000000"."""
    if isinstance(number, int):
        return str(number)
    text = format(number if isinstance(number, Decimal) else Decimal(repr(number)), "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def _bare(text: str) -> str:
    """The answer without what is around the whole of it."""
    text = text.strip()
    inside = extract(text)
    text = inside.strip() if inside is not None and text == f"{BOX}{inside}}}" else text
    if len(text) > 1 and text[0] == text[-1] == "$" and "$" not in text[1:-1]:
        text = text[1:-1].strip()
    return text


def _messages(value: Sequence[object], section: config.Data, at: str) -> list[Message]:
    messages = [_message(each, f"{at}, message {n}") for n, each in enumerate(value, 1)]
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise InputError(
            f"{at}: a system message that is not the first, or a second one; join them at the start"
        )
    if roles[-1] != "user":
        raise InputError(
            f"{at} ends in a message of '{roles[-1]}', and a prompt ends in the user's; take it off "
            "(an answer that has begun is not continued)"
        )
    return messages


def _message(value: object, at: str) -> Message:
    if not isinstance(value, Mapping):
        raise InputError(
            f"{at} holds neither text nor chat messages: a {type(value).__name__}; write objects"
        )
    names = ("from", "value") if "from" in value and value.get("role") is None else ("role", "content")
    role, content = (value.get(name) for name in names)
    role = SHAREGPT.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise InputError(f"{at}: '{names[0]}' is {role!r}; known roles are {', '.join(ROLES)}")
    lost = next((key for key in UNSUPPORTED if value.get(key)), None)
    if lost:
        raise InputError(
            f"{at} has '{lost}', which is not supported; remove it, or write it into the content"
        )
    if isinstance(content, list):
        content = _text_of_parts(content, at)
    if not isinstance(content, str) or not content.strip():
        raise InputError(f"{at}: '{names[1]}' is no text, or empty; remove the row or fill it in")
    return {"role": role, "content": content}


def _text_of_parts(parts: Sequence[object], at: str) -> str:
    texts: list[str] = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(text, str):
            raise InputError(f"{at} has a part of type '{kind}'; only parts of text are supported, remove it")
        texts.append(text)
    return "".join(texts)
