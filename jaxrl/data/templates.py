"""Chat templates: what they read, and the text that they make of chats."""

from __future__ import annotations

import dataclasses
import datetime
import difflib
from collections.abc import Mapping, Sequence

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from jaxrl import config
from jaxrl.data.messages import Chat
from jaxrl.errors import InputError, first_line
from jaxrl.types import JsonObject, Tokenizer

# Names that templates read and the trainer or transformers sets.
RESERVED = frozenset({
    "messages", "tools", "documents", "conversation", "chat_template", "add_generation_prompt", "tokenize",
    "continue_final_message", "raise_exception", "strftime_now", "namespace", "range", "dict", "date_codes",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs", "sanitize_control_tokens", "self",
})  # fmt: skip
DATE_STRING = "%d %b %Y"  # how Llama 3's templates write it
DIRECTIVES = "aAbBcdDeFgGHIjmMpSTuUVwWxXyY"
NO_DATE = "jaxrl: no data.date"
# Put before a template that asks for the time: transformers' function of this name reads the clock. An argument of the
# name cannot take its place, since transformers turns functions among the arguments into text.
CLOCK = (
    "{%- macro strftime_now(format) -%}"
    f"{{%- if not date_codes -%}}{{{{ raise_exception('{NO_DATE}') }}}}{{%- endif -%}}"
    "{%- set ns = namespace(text=format) -%}"
    "{%- for code, text in date_codes.items() -%}{%- set ns.text = ns.text.replace(code, text) -%}{%- endfor -%}"
    "{{- ns.text -}}{%- endmacro +%}"
)
PARTS = ("{'type': 'text'", '{"type": "text"')  # how Python and JSON write the parts of a content
REMEDY = "correct it (tokenizer_config.json or chat_template.jinja), or set data.chat_template = false"


class _Generation(Extension):
    """The tag {% generation %} of transformers, which changes no text."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's own spelling

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat template, with the recipe's arguments."""

    tokenizer: Tokenizer
    text: str
    reads: frozenset[str]  # names that it does not set itself
    arguments: JsonObject

    def render(self, chats: Sequence[Chat]) -> list[str]:
        """The text of each chat, up to where the response begins.

        Raises:
          InputError: naming row and folder, if the template fails, leaves a message out, or does not read an argument.
        """
        texts = [""] * len(chats)
        groups: dict[str, list[int]] = {}
        for i, chat in enumerate(chats):
            groups.setdefault(repr(sorted(chat.arguments.items())), []).append(i)
        for places in groups.values():
            some = [chats[i] for i in places]
            self._require_read(some[0].arguments, some[0].where)
            for i, text in zip(places, self._texts(some, self.arguments | some[0].arguments), strict=True):
                texts[i] = text
        return texts

    def _texts(self, chats: Sequence[Chat], arguments: JsonObject) -> list[str]:
        for form in (
            _as_text,
            _as_parts,
        ):  # all chats at once: transformers compiles the template at each call
            try:
                texts = self._apply([form(chat) for chat in chats], arguments)
            except Exception:  # of one of them, which is named below
                continue
            if not any(map(_lost, texts, chats)):
                return texts
        return [self._one(chat, arguments) for chat in chats]

    def _one(self, chat: Chat, arguments: JsonObject) -> str:
        """The text of a chat whose content is text, or else a list of parts, which some templates want."""
        reasons: list[str] = []
        for form in (_as_text, _as_parts):
            try:
                (text,) = self._apply([form(chat)], arguments)
            except Exception as error:  # whatever a template may raise
                reasons.append(f"it fails with: {first_line(error)}")
                continue
            lost = _lost(text, chat)
            if not lost:
                return text
            reasons.append(f"it leaves out the message of '{lost}'")
        template = f"{chat.where}: the chat template of {self.tokenizer.name_or_path}"
        if any(NO_DATE in reason for reason in reasons):
            raise InputError(
                f"{template} writes today's date; set data.date, such as '2026-01-31', so that the same command gives "
                "the same prompts tomorrow"
            )
        remedy = "give the chat the messages that it wants (data.system adds a system message)"
        raise InputError(f"{template} does not take this chat, {reasons[0]}; {remedy}, {REMEDY}")

    def _apply(
        self, conversations: Sequence[Sequence[Mapping[str, object]]], arguments: JsonObject
    ) -> list[str]:
        return self.tokenizer.apply_chat_template(
            conversations,
            chat_template=self.text,
            add_generation_prompt=True,
            tokenize=False,
            **arguments,
        )

    def _require_read(self, arguments: JsonObject, where: str) -> None:
        """Raises InputError for an argument that the template does not read: a typo would pass in silence."""
        for name in arguments:
            if name in RESERVED:
                raise InputError(
                    f"{where}: the template argument '{name}' is set by the trainer; leave it out"
                )
            if name not in self.reads:
                known = sorted(self.reads - RESERVED)
                close = difflib.get_close_matches(name, known, n=1)
                hint = (
                    f"did you mean '{close[0]}'?"
                    if close
                    else f"it reads {', '.join(known) or 'none'}; leave it out"
                )
                raise InputError(
                    f"{where}: the chat template of {self.tokenizer.name_or_path} never reads '{name}'; {hint}"
                )


def read_template(tokenizer: Tokenizer, section: config.Data) -> Template:
    """The tokenizer's chat template (of several, the one named default) with the arguments and the date of [data].

    Raises:
      InputError: if it does not parse, or does not read an argument.
    """
    folder = tokenizer.name_or_path
    environment = jinja2.Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"])
    try:
        text = tokenizer.get_chat_template()
        reads = frozenset(meta.find_undeclared_variables(environment.parse(text)))
    except (
        Exception
    ) as error:  # of jinja2; of transformers, for named ones without a default; of what is no text
        raise InputError(
            f"{folder}: the chat template cannot be read ({first_line(error)}); {REMEDY}"
        ) from None
    template = Template(tokenizer, text, reads, dict(section.template_arguments))
    template._require_read(template.arguments, "data.template_arguments")
    if section.date and not reads & {"strftime_now", "date_string"}:
        raise InputError(
            f"data.date = '{section.date}', and the chat template of {folder} writes no date; leave it out"
        )
    arguments = dict(template.arguments)
    moment = datetime.datetime.fromisoformat(section.date) if section.date else None  # midnight
    if moment and "date_string" in reads:
        arguments = {"date_string": moment.strftime(DATE_STRING)} | arguments
    if "strftime_now" in reads:
        text = CLOCK + text
        arguments["date_codes"] = _codes(moment) if moment else {}
    return dataclasses.replace(template, text=text, arguments=arguments)


def _codes(moment: datetime.datetime) -> dict[str, str]:
    """The text for each directive of strftime, those without padding included."""
    codes = {f"%{letter}": moment.strftime(f"%{letter}") for letter in DIRECTIVES}
    return codes | {f"%-{letter}": codes[f"%{letter}"].lstrip("0") or "0" for letter in "dmyHIMSj"}


def _as_text(chat: Chat) -> Sequence[Mapping[str, object]]:
    return chat.messages


def _as_parts(chat: Chat) -> Sequence[Mapping[str, object]]:
    return [m | {"content": [{"type": "text", "text": m["content"]}]} for m in chat.messages]


def _lost(text: str, chat: Chat) -> str:
    """The role of a message of the system's or the user's that is not in the text; blanks around it are no matter.

    An assistant's may be: templates take the reasoning out of earlier turns. A list of parts that was written out as
    one is no message.
    """
    for message in chat.messages:
        content = message["content"]
        if message["role"] != "assistant" and content.strip() not in text:
            return message["role"]
        if any(part in text and part not in content for part in PARTS):
            return message["role"]
    return ""
