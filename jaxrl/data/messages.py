"""What a chat is, before its template."""

from __future__ import annotations

import dataclasses

from jaxrl.types import JsonObject

Message = dict[str, str]  # role, content


@dataclasses.dataclass(frozen=True)
class Chat:
    """A prompt before its template: messages with the instruction in place, and the row's template arguments."""

    messages: list[Message]
    problem: str  # its text, for people and for finding duplicates
    where: str = ""  # file and row, for messages
    arguments: JsonObject = dataclasses.field(default_factory=dict)
