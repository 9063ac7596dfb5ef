"""A judge: a model at an OpenAI-compatible endpoint, such as `vllm serve`, marks each answer from 0 to 10.

JUDGE_URL is the server's, http://localhost:8001 say; JUDGE_MODEL its model, by default the first that it serves;
JUDGE_KEY its key, if it has one.
"""

import asyncio
import functools
import os
import re

import httpx

ASKED = """Problem: {problem}

Reference answer: {answer}

Response: {response}

How good is the response, from 0 to 10? Reply with the number alone."""
TRIES, WAIT = 3, 1.0  # seconds before the second; twice as long before the third


@functools.cache
def client() -> httpx.AsyncClient:
    key = os.environ.get("JUDGE_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.AsyncClient(base_url=os.environ["JUDGE_URL"], headers=headers, timeout=120)


async def model() -> str:
    return os.environ.get("JUDGE_MODEL") or (await client().get("/v1/models")).json()["data"][0]["id"]


async def mark(response: str, answer: str, problem: str) -> float:
    """The judge's number over 10; `problem` is a column of the row. 0 where it names none."""
    shown = ASKED.format(problem=problem, answer=answer, response=response[-4000:])
    body = {"messages": [{"role": "user", "content": shown}], "temperature": 0, "max_tokens": 8}
    for attempt in range(TRIES):
        try:
            reply = await client().post("/v1/chat/completions", json=body | {"model": await model()})
            reply.raise_for_status()
            said = reply.json()["choices"][0]["message"]["content"] or ""
            number = re.search(r"\d+(\.\d+)?", said)
            return min(float(number[0]), 10.0) / 10 if number else 0.0
        except httpx.HTTPError as error:
            if attempt == TRIES - 1:
                raise ConnectionError(f"{os.environ['JUDGE_URL']}: {error!r}") from error
            await asyncio.sleep(WAIT * 2**attempt)
    raise AssertionError
