"""The model stage of grading: a verifier model, behind any OpenAI-compatible endpoint, reads what the rules refused.

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
from typing import Any

import httpx

from jaxrl import config
from jaxrl.errors import InputError
from jaxrl.sampling import servers

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
TAIL = 4000  # characters
SHORTEST = 100
MAX_TOKENS = 2048  # of a reply
ATTEMPTS = 3
WORDS = {"CORRECT": "A", "INCORRECT": "B", "INVALID": "C"}


@dataclass(frozen=True)
class Candidate:
    question: str
    answer: str  # the reference
    response: str
    truncated: bool


class Unanswered(Exception):
    """The endpoint did not answer."""


class Judge:
    """Asks each thing once: replies are kept in a file, which survives the process.

    Attributes:
      down: why the endpoint did not answer, where it did not; nothing more is asked then.
    """

    def __init__(
        self, url: str, cache: Path, *, key: str = "", model: str = "", prompt: str = PROMPT, tail: int = TAIL,
        released: bool = False, workers: int = 32, limit: float = 600.0,
    ):  # fmt: skip
        """
        Args:
          url: of the endpoint, with or without /v1.
          cache: file of replies.
          key: sent to the endpoint, where there is one.
          model: its name there; the first that the endpoint lists where empty.
          prompt: with {question}, {gold_answer} and {llm_response}.
          tail: characters of the response, from its end and after its thoughts, that are sent.
          released: ask as JustRL's released scripts do: no question, the whole response, and only "A" counts.
          workers: requests at one time.
          limit: seconds for one of them.
        """
        self.down = ""
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._model, self._prompt, self._tail, self._released = model, prompt, tail, released
        self._workers = workers
        self._http = httpx.Client(
            timeout=httpx.Timeout(limit, connect=10.0),
            trust_env=False,
            limits=httpx.Limits(max_connections=None),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        self._cache, self._lock = cache, threading.Lock()
        self._replies = _read(cache)

    def settings(self) -> dict[str, object]:
        """What its labels depend on."""
        prompt = hashlib.sha256(self._prompt.encode()).hexdigest()
        return {"model": self._model, "prompt": prompt, "tail": self._tail, "released": self._released}

    def labels(self, candidates: Sequence[Candidate]) -> list[str | None]:
        """A, B, C or "" (no label in the reply, or no room for the question) of each; None where nobody answered."""
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
                said = (self._ask("", c.answer, c.response) or "").strip()
                return said if said in WORDS.values() else ""
            final = c.response.rpartition("</think>")[2].strip()[-self._tail :]
            if c.truncated or not final:
                return "C"
            while (reply := self._ask(c.question, c.answer, final)) is None and len(final) > SHORTEST:
                final = final[len(final) // 2 :]
            return label(reply or "")
        except Unanswered as error:
            self.down = self.down or str(error)
            return None

    def _ask(self, question: str, answer: str, response: str) -> str | None:
        """The reply; None if the prompt is too long for the model.

        Raises:
          Unanswered.
        """
        text = self._prompt.format(question=question, gold_answer=answer, llm_response=response)
        with self._lock:  # one asks for the name; the others wait
            self._model = (
                self._model or self._request("GET", "/models", lambda found: found["data"][0]["id"]) or ""
            )
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

    def _request(self, method: str, route: str, read: Callable[[Any], str], body: Any = None) -> str | None:
        """What `read` finds in the answer; None if the endpoint says that it was asked too much."""
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
                    reason = f"{route} answered with something else: {answer.text[:200]}"
                    break
            reason = f"HTTP {answer.status_code}: {answer.text[:200]}"
            if answer.status_code in (400, 413) and re.search("context|too long|maximum", answer.text):
                return None
            if answer.status_code < 500 and answer.status_code != 429:
                break
        raise Unanswered(reason)

    def _keep(self, key: str, reply: str | None) -> None:
        with self._lock:
            if key not in self._replies:
                self._replies[key] = reply
                with self._cache.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "reply": reply}) + "\n")


@contextlib.contextmanager
def server(
    recipe: config.Recipe, model: Path, name: str, logs: Path, devices: servers.Devices
) -> Iterator[str]:
    """The URL of a vLLM server of a verifier model, which ends with the context; its key is `api_key`.

    Args:
      recipe: with vLLM's program and options, and the dtype.
      model: Hugging Face folder.
      name: what the model is called there.
      logs: folder for its log.
      devices: where it runs.
    """
    with servers.running(
        1,
        recipe.sampler.vllm,
        str(model),
        logs,
        devices=devices,
        dtype=recipe.model.dtype,
        max_tokens=0,
        chat=True,
        options=["--served-model-name", name, *recipe.sampler.vllm_options],
    ) as (started,):
        yield started.url


def _content(completion: Any) -> str:
    return completion["choices"][0]["message"]["content"] or ""


def read_prompt(path: Path) -> str:
    """A prompt with {question}, {gold_answer} and {llm_response}; braces of its own are written twice.

    Raises:
      InputError: if it has not just those three.
    """
    fields = {"question": "", "gold_answer": "", "llm_response": ""}
    try:
        prompt = path.read_text(encoding="utf-8")
        prompt.format(**fields)
    except (OSError, KeyError, IndexError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be used as the judge's prompt ({error!r}); it takes {{question}}, {{gold_answer}} and "
            "{llm_response}, and braces of its own written twice"
        ) from None
    missing = [name for name in fields if f"{{{name}}}" not in prompt]
    if missing:
        raise InputError(f"{path}: the judge's prompt has no {{{missing[0]}}}; put it where that belongs")
    return prompt


def label(reply: str) -> str:
    """A, B or C, or "": the last in a box, else the whole reply, else what comes last after "Final Judgment:".

    There, a letter in parentheses goes before CORRECT, INCORRECT or INVALID, and that before a letter alone.
    """
    text = reply.strip()
    if boxed := re.findall(r"boxed\{([A-C])\}", text):
        return boxed[-1]
    text = text.rpartition("Final Judgment:")[2]
    for pattern in (r"\(([A-C])\)", r"\b(CORRECT|INCORRECT|INVALID)\b", r"\b([A-C])\b"):
        if found := re.findall(pattern, text):
            return WORDS.get(found[-1], found[-1])
    return ""


def _read(cache: Path) -> dict[str, str | None]:
    replies: dict[str, str | None] = {}
    for line in cache.read_text(encoding="utf-8").splitlines() if cache.exists() else []:
        try:
            row = json.loads(line)
            replies[row["key"]] = row["reply"]
        except (ValueError, KeyError, TypeError):
            continue  # torn by a killed process: asked again
    return replies
