"""The model stage of grading: a verifier model at an OpenAI-compatible endpoint judges what the rules refused.

Meant for CompassVerifier-3B (arXiv 2508.03686), which answers A (correct), B (incorrect) or C (invalid).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx

from jaxrl import config
from jaxrl.errors import InputError
from jaxrl.files import append
from jaxrl.results import JudgeSettings
from jaxrl.sampling import servers
from jaxrl.types import JsonObject

PROMPT = """\
You grade answers. Decide whether the final answer of the candidate below agrees with the standard answer.

- The standard answer is right and the question is sound; question neither, and do not solve the problem again.
- Compare final answers only, not how they were found. Different ways to write the same thing agree, with a \\boxed{{}}
  around them or without.
- Where several values are asked for, all of them have to agree.
- A candidate that was cut off, repeats itself without end, or gives no answer is invalid.

Reply with one letter and nothing else: A for correct, B for incorrect, C for invalid.

<Original Question Begin>
{question}
<Original Question End>
<Standard Answer Begin>
{gold_answer}
<Standard Answer End>
<Candidate's Answer Begin>
{llm_response}
<Candidate's Answer End>
"""
TAIL = 4000  # characters of a response that the judge sees
SHORTEST = 100  # characters to which a response may be cut for a judge with a short context
MAX_TOKENS = 2048  # of a reply
ATTEMPTS = 3
CONNECT_SECONDS, REQUEST_SECONDS = 10.0, 600.0
SHOWN = 200  # characters of an unexpected answer
# in an endpoint's message, if the prompt exceeds the context
NO_ROOM = re.compile("context|too long|maximum")
WORDS = {"CORRECT": "A", "INCORRECT": "B", "INVALID": "C"}


@dataclass(frozen=True)
class Candidate:
    """A response to be judged."""

    question: str
    answer: str  # the reference answer
    response: str
    truncated: bool


class Unanswered(Exception):
    """The endpoint did not answer."""


class Judge:
    """Sends each question once: replies are kept in a file, which survives the process.

    Attributes:
      down: why the endpoint did not answer; nothing more is sent once it is set.
    """

    def __init__(
        self,
        url: str,
        cache: Path,
        *,
        key: str = "",
        model: str = "",
        prompt: str = PROMPT,
        tail: int = TAIL,
        released: bool = False,
        workers: int = 32,
    ) -> None:
        """Sends nothing yet.

        Args:
          url: of the endpoint, with or without /v1.
          cache: file of replies.
          key: the endpoint's; empty where it needs none.
          model: its name there; empty takes the first that the endpoint lists.
          prompt: with {question}, {gold_answer} and {llm_response}.
          tail: characters of the response, from its end and after its thoughts, that are sent.
          released: ask as JustRL's released scripts do: no question, the whole response, and only "A" counts.
          workers: requests at one time.
        """
        self.down = ""
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._model, self._prompt, self._tail, self._released = model, prompt, tail, released
        self._workers = workers
        self._http = httpx.Client(
            timeout=httpx.Timeout(REQUEST_SECONDS, connect=CONNECT_SECONDS),
            trust_env=False,
            limits=httpx.Limits(max_connections=None),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        self._cache, self._lock = cache, threading.Lock()
        self._replies = _read(cache)

    def settings(self) -> JudgeSettings:
        """All that its labels depend on."""
        prompt = hashlib.sha256(self._prompt.encode()).hexdigest()
        return {"model": self._model, "prompt": prompt, "tail": self._tail, "released": self._released}

    def labels(self, candidates: Sequence[Candidate]) -> list[str | None]:
        """Returns a label for each.

        Args:
          candidates: responses, of which equal ones are judged once.

        Returns:
          A, B, C or "" (no label in the reply, or no room for the question); None where the endpoint did not answer.
        """
        pool = ThreadPoolExecutor(self._workers)
        try:
            different = list(dict.fromkeys(candidates))
            found = dict(zip(different, pool.map(self._label, different), strict=True))
            return [found[candidate] for candidate in candidates]
        finally:
            pool.shutdown(cancel_futures=True)

    def _label(self, c: Candidate) -> str | None:
        try:
            if self._released:
                reply = (self._ask("", c.answer, c.response) or "").strip()
                return reply if reply in WORDS.values() else ""
            final = c.response.rpartition("</think>")[2].strip()[-self._tail :]
            if c.truncated or not final:
                return "C"
            while (answered := self._ask(c.question, c.answer, final)) is None and len(final) > SHORTEST:
                final = final[len(final) // 2 :]
            return label(answered or "")
        except Unanswered as error:
            self.down = self.down or str(error)
            return None

    def _ask(self, question: str, answer: str, response: str) -> str | None:
        """The reply; None if the prompt is too long for the model.

        Raises:
          Unanswered: if there is none.
        """
        text = self._prompt.format(question=question, gold_answer=answer, llm_response=response)
        with self._lock:  # one thread asks for the name; the others wait
            self._model = self._model or self._request("GET", "/models", _first_model) or ""
        key = hashlib.sha256(f"{self._model}\n{text}".encode(errors="surrogatepass")).hexdigest()
        if key not in self._replies:
            body = {
                "model": self._model,
                "messages": [{"role": "user", "content": text}],
                "temperature": 0.0,
                "max_tokens": MAX_TOKENS,
            }
            self._keep(key, self._request("POST", "/chat/completions", _content, body))
        return self._replies[key]

    def _request(
        self, method: str, route: str, read: Callable[[JsonObject], str], body: JsonObject | None = None
    ) -> str | None:
        """The answer as `read` extracts it; None if the prompt exceeds the model's context.

        Raises:
          Unanswered: if there is none.
        """
        reason = self.down
        for attempt in range(0 if self.down else ATTEMPTS):
            if attempt:
                time.sleep(2.0**attempt)
            try:
                answer = self._http.request(method, self._url + route, json=body)
            except httpx.HTTPError as error:
                reason = f"no answer ({type(error).__name__})"
                continue
            if answer.status_code == 200:
                try:
                    return read(answer.json())
                except (ValueError, LookupError, TypeError):
                    reason = f"{route} answered with something else: {answer.text[:SHOWN]}"
                    break
            reason = f"HTTP {answer.status_code}: {answer.text[:SHOWN]}"
            if answer.status_code in (400, 413) and NO_ROOM.search(answer.text):
                return None
            if answer.status_code < 500 and answer.status_code != 429:
                break
        raise Unanswered(reason)

    def _keep(self, key: str, reply: str | None) -> None:
        with self._lock:
            if key not in self._replies:
                self._replies[key] = reply
                append(self._cache, json.dumps({"key": key, "reply": reply}) + "\n")


@contextlib.contextmanager
def server(
    recipe: config.Recipe, model: Path, name: str, logs: Path, devices: servers.Devices
) -> Iterator[str]:
    """Starts a vLLM server of a verifier model, which ends with the context, and yields its URL; its key is `api_key`.

    Args:
      recipe: with vLLM's program and options, and the dtype.
      model: Hugging Face folder.
      name: the model's name at the server.
      logs: folder for the log.
      devices: where it runs.

    Raises:
      InputError, RunError: see `servers.running`.
    """
    options = ["--served-model-name", name, *recipe.sampler.vllm_options]
    settings = servers.Settings(
        recipe.sampler.vllm, str(model), recipe.model.dtype, max_tokens=0, chat=True, options=options
    )
    with servers.running(1, settings, logs, devices=devices) as (started,):
        yield started.url


def _first_model(models: JsonObject) -> str:
    return models["data"][0]["id"]


def _content(completion: JsonObject) -> str:
    return completion["choices"][0]["message"]["content"] or ""


def read_prompt(path: Path) -> str:
    """Reads a prompt with {question}, {gold_answer} and {llm_response}; its other braces are written twice.

    Raises:
      InputError: if it lacks one of the three, or has others.
    """
    fields = {"question": "", "gold_answer": "", "llm_response": ""}
    try:
        prompt = path.read_text(encoding="utf-8")
        prompt.format(**fields)
    except (OSError, KeyError, IndexError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be used as the judge's prompt ({error!r}); it takes {{question}}, {{gold_answer}} and "
            "{llm_response}, with any other braces written twice"
        ) from None
    missing = [name for name in fields if f"{{{name}}}" not in prompt]
    if missing:
        raise InputError(f"{path}: the judge's prompt has no {{{missing[0]}}}; put it where that belongs")
    return prompt


def label(reply: str) -> str:
    """The label in a reply, A, B or C, or "" where there is none, or two that differ.

    A label is a letter or one of CORRECT, INCORRECT and INVALID that has a line for itself: the first, the last, or one
    that begins with what it is ("Judgment: B"). It may also open the reply ("B: they differ"), or be a word in capitals
    that ends it. Without any of these it is what all boxes hold. Only what follows the last "Final Judgment" counts,
    where a reply has these words. A letter in a sentence is no label: "A good try".
    """
    text = re.split("final judge?ment", reply.rpartition("</think>")[2], flags=re.IGNORECASE)[-1]
    lines = [line for line in map(str.strip, text.splitlines()) if line.strip(_AROUND)]
    ends = {*lines[:1], *lines[-1:]}
    found = {_label_of(line) for line in lines if line in ends or _NAMED.match(line.strip(_AROUND))} - {""}
    first, last = (_MARKUP.sub("", lines[i]).lstrip(_AROUND) if lines else "" for i in (0, -1))
    if opening := _OPENING.match(first):
        found |= {WORDS.get(opening[1], opening[1]), *_mentioned(first)}
    if _CLOSING.search(last) and not _NEGATION.search(last):
        found |= _mentioned(last)
    found = found or set(_BOXED.findall(text))
    return found.pop() if len(found) == 1 else ""


_AROUND = " \t*_`\"'“”[]#>.,;:!-–—"
_BOXED = re.compile(r"\\boxed\{\s*(?:\\text\{)?([ABC])\b")
_NAMES = "answer|conclusion|decision|evaluation|grade|judge?ment|label|result|verdict"
_NAME = rf"(?i:(?:so,? |thus,? |therefore,? )?(?:the |my |your )?(?:final )?(?:{_NAMES}))"
_NAMED = re.compile(rf"{_NAME}\b[\s*]*(?::|=|is\b)")
_LINE = re.compile(
    rf"(?:{_NAME}[\s*]*(?::|=|is\b))?[\s*:]*"
    r"(?:\$?\\boxed\{\s*)?(?:\\text\{)?\(?([ABC])?\)?\}{0,2}\$?[\s*.:=\-–—]*\(?((?i:correct|incorrect|invalid))?\)?"
)
_MARKUP = re.compile(r"[*_`]")
_OPENING = re.compile(
    r"\(?([ABC]|CORRECT|INCORRECT|INVALID)"
    r"(?:\)\s+[A-Z]|\)?[.:;]\s|\)?\s*[-–—]\s+[A-Za-z]{2}|\)?,?\s+(?:because|since)\b)"
)
_CLOSING = re.compile(r"\b(?:CORRECT|INCORRECT|INVALID)[\s.!)>\"']*$")
_NEGATION = re.compile(r"not\b|n't\b|\b(?:neither|never)\b", re.IGNORECASE)
_MENTION = re.compile(r"\b(?:[ABC](?=\s*[.:;)])|(?i:correct|incorrect|invalid)\b)")


def _mentioned(line: str) -> set[str]:
    """The labels that a line has: words, and letters before a mark."""
    return {WORDS.get(word.upper(), word) for word in _MENTION.findall(line)}


def _label_of(line: str) -> str:
    """The label that a line consists of, or ""."""
    found = _LINE.fullmatch(line.strip(_AROUND))
    letter, word = (found[1] or "", WORDS.get((found[2] or "").upper(), "")) if found else ("", "")
    return letter if word in ("", letter) else "" if letter else word


def _read(cache: Path) -> dict[str, str | None]:
    """The replies in a file, by key; a row that a killed process left incomplete is asked again."""
    replies: dict[str, str | None] = {}
    for line in cache.read_text(encoding="utf-8").splitlines() if cache.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            replies[row["key"]] = row["reply"]
    return replies
