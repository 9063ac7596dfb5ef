"""Sampling by `vllm serve` processes, over their own HTTP API.

Token ids go out, token ids, their log-probabilities and the version of the weights come back. Every server has the
same weights: `publish` writes them once and has each server load them, between requests. A prompt's samples are one
request, so its prompt is prefilled once; requests go to the server with the fewest under way, and to another one
where a server fails.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from jaxrl.errors import InputError
from jaxrl.models.decoder import Config
from jaxrl.sampling import publish
from jaxrl.sampling.sampler import Prompt, Rollout, SamplingParams

SUPPORTED = "0.32"  # the minor version whose routes these are
CONNECT, UPDATE = 10.0, 600.0  # seconds


class ServerError(Exception):
    """A server that did not answer, or not with what was asked."""


class VLLMSampler:
    """A Sampler in front of vLLM servers.

    Log-probabilities are those of the distribution that was sampled: with top_p = 1 and top_k = 0, as in training, of
    the whole vocabulary at the sampling temperature.

    Attributes:
      dropped: prompts that every server refused, with the reason; they have no rollouts.
    """

    def __init__(
        self, urls: Sequence[str], config: Config, folder: Path, *, dtype: str = "bfloat16", concurrency: int = 64,
        limit: float = 3600.0, patience: float = 600.0, say: Callable[[str], None] = print,
    ):  # fmt: skip
        """
        Args:
          urls: of the servers.
          folder: where published weights go; every server must be able to read it (/dev/shm, a shared file system).
          dtype: of the published weights.
          concurrency: requests under way at one server.
          limit: seconds for one request.
          patience: seconds without any server that answers, after which `generate` and `publish` give up.

        Raises:
          InputError: if a server is not there, or is not one that this can work with.
        """
        self._urls, self._config, self._folder, self._dtype = list(urls), config, folder, dtype
        self._concurrency, self._limit, self._patience, self._say = concurrency, limit, patience, say
        self._published: publish.Published | None = None
        self._current: Counter[str] = Counter()  # version + 1 that each server has; 0: none of ours
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._back: dict[str, float] = {}  # when each server was last found to be well
        self.dropped: dict[str, str] = {}
        asyncio.run(self._inspect())

    def publish(self, params: Any, version: int) -> None:
        """Writes the weights and has every server load them. A server that fails gets them when it is back."""
        self._published = publish.write(params, self._config, self._folder, version, self._dtype)
        asyncio.run(self._everywhere())

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        params: SamplingParams,
        seed: tuple[int, ...],
        on_rollout: Callable[[Rollout], None] | None = None,
    ) -> list[list[Rollout]]:
        """See `Sampler.generate`. Groups of prompts that servers refuse are empty; `dropped` says why.

        Raises:
          InputError: before `publish`, when no server has answered for `patience` seconds, or none took any prompt.
        """
        if self._published is None:
            raise InputError("the vLLM servers have no weights; publish some before generating")
        return asyncio.run(self._generate(prompts, samples, params, seed, on_rollout))

    async def _generate(self, prompts, samples, params, seed, on_rollout) -> list[list[Rollout]]:
        groups: list[list[Rollout]] = [[] for _ in prompts]
        waiting, open_ = deque(range(len(prompts))), set(range(len(prompts)))
        changed, self._locks = asyncio.Condition(), defaultdict(asyncio.Lock)

        async def serve(url: str) -> None:
            """One lane of one server: takes prompts as long as there are any."""
            while True:
                async with changed:
                    await changed.wait_for(lambda: waiting or not open_)
                    if not open_:
                        return
                    p = waiting.popleft()
                try:
                    groups[p] = await self._ask(client, url, prompts[p], samples, params, (*seed, p))
                except ServerError as error:
                    async with changed:
                        waiting.appendleft(p)
                        changed.notify_all()
                    await self._revive(client, url, error)
                    continue
                if on_rollout:
                    for rollout in groups[p]:
                        on_rollout(rollout)
                async with changed:
                    open_.remove(p)
                    changed.notify_all()

        lanes = max(1, min(self._concurrency, -(-len(prompts) // len(self._urls))))
        async with self._client() as client:
            tasks = {asyncio.create_task(serve(url)) for _ in range(lanes) for url in self._urls}
            pending = tasks
            try:
                while open_:  # a server that is down does not hold up what others can finish
                    done, pending = await asyncio.wait(
                        pending, timeout=0.2, return_when=asyncio.FIRST_COMPLETED
                    )
                    errors = [task.exception() for task in done if task.exception()]
                    if errors and (not pending or not isinstance(errors[0], InputError)):
                        raise errors[0]  # type: ignore[misc]
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        if prompts and not any(groups):
            raise InputError(f"the servers refused every prompt; the last: {list(self.dropped.values())[-1]}")
        return groups

    async def _ask(
        self, client: httpx.AsyncClient, url: str, prompt: Prompt, samples: int, params: SamplingParams,
        seed: tuple[int, ...],
    ) -> list[Rollout]:  # fmt: skip
        """All samples of one prompt.

        Raises:
          ServerError: if the server does not answer, or with other weights than the newest.
        """
        assert self._published
        version = str(self._published.version)
        if self._current[url] != self._published.version + 1:
            raise ServerError("it does not have the current weights")
        body = {
            "token_ids": prompt.tokens.tolist(),
            "cache_salt": version,  # a cached prefix is of one version
            "sampling_params": {
                "n": samples if params.temperature else 1, "temperature": params.temperature, "top_p": params.top_p,
                "top_k": params.top_k, "max_tokens": params.max_tokens, "stop_token_ids": list(params.stop_ids),
                "ignore_eos": True, "seed": request_seed(seed), "logprobs": 0, "detokenize": False,
            },
        }  # fmt: skip
        answer = await self._post(client, url, "/inference/v1/generate", body, self._limit)
        if isinstance(answer, str):  # refused: it would be refused everywhere
            self.dropped[prompt.id] = answer
            self._say(f"prompt {prompt.id} was refused and is left out: {answer}")
            return []
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            rollouts = [self._rollout(prompt, choice, version) for choice in choices]
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError(f"it answered with something else than completions ({error!r})") from None
        return rollouts if params.temperature else rollouts * samples

    def _rollout(self, prompt: Prompt, choice: dict[str, Any], version: str) -> Rollout:
        tokens = np.array(choice["token_ids"], np.int32)
        logprobs = np.array([entry["logprob"] for entry in choice["logprobs"]["content"]], np.float32)
        versions = {span["version"] for span in choice["weight_versions"]}
        if (
            versions != {version}
            or len(tokens) != len(logprobs)
            or choice["finish_reason"] not in ("stop", "length")
        ):
            raise ServerError(
                f"a completion of weights {versions}, not {version}, ended by {choice['finish_reason']}"
            )
        return Rollout(prompt, tokens, logprobs, choice["finish_reason"], int(version))

    async def _everywhere(self) -> None:
        self._locks = defaultdict(asyncio.Lock)  # a lock belongs to its event loop
        async with self._client() as client:
            results = await asyncio.gather(
                *(self._load(client, url) for url in self._urls), return_exceptions=True
            )
            errors = [
                (url, e) for url, e in zip(self._urls, results, strict=True) if isinstance(e, BaseException)
            ]
            for _, error in errors:
                if not isinstance(error, ServerError):
                    raise error
            if len(errors) == len(self._urls):
                await self._revive(client, *errors[0])
            for url, error in errors:
                self._say(f"{url} did not take weights {self._published.version}: {error}")  # type: ignore[union-attr]

    async def _load(self, client: httpx.AsyncClient, url: str) -> None:
        """vLLM's update protocol: pausing frees the cache; only a server that took everything goes on."""
        assert self._published
        path, digest, version = self._published
        steps: list[tuple[str, Any]] = [
            ("/pause?mode=keep", None),
            ("/start_weight_update", None),
            ("/update_weights", {"update_info": {"path": str(path.absolute()), "blake3": digest}}),
            ("/finish_weight_update", {"weight_version": str(version)}),
            ("/resume", None),
        ]
        self._current[url] = 0
        for route, body in steps:
            answer = await self._post(client, url, route, body, UPDATE)
            if isinstance(answer, str):
                raise ServerError(f"{route}: {answer}")
        self._current[url] = version + 1

    async def _revive(self, client: httpx.AsyncClient, url: str, error: BaseException) -> None:
        """Waits until a server is back, and gives it the current weights before anything else.

        Raises:
          InputError: after `patience` seconds.
        """
        assert self._published
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._patience
        async with self._locks[url]:  # one asks for all its lanes
            if clock() < self._back.get(url, -1) + 5:
                return
            self._say(f"{url}: {error}; waiting for it")
            while clock() < deadline:
                try:
                    info = await self._get(client, url, "/weight_info")
                    current = self._current[url] == self._published.version + 1
                    if not current or info.get("weight_version") != str(self._published.version):
                        await self._load(client, url)
                    self._back[url] = clock()
                    return
                except ServerError as again:
                    error = again
                    await asyncio.sleep(1.0)
        raise InputError(
            f"{url}: {error}; it was not back after {self._patience:.0f} s. Start it again and repeat the command"
        )

    async def _inspect(self) -> None:
        """Refuses servers that would give other numbers than they seem to."""
        async with self._client() as client:
            for url in self._urls:
                try:
                    found = await self._get(client, url, "/version")
                    version = str(found.get("version", "unknown"))
                    if not version.startswith(SUPPORTED + "."):
                        raise InputError(f"{url} runs vLLM {version}; jaxrl works with {SUPPORTED}.*")
                    await self._get(client, url, "/weight_info")
                    body = {
                        "token_ids": [0],
                        "sampling_params": {"top_k": 1, "max_tokens": 1, "logprobs": 0, "detokenize": False},
                    }
                    answer = await self._post(client, url, "/inference/v1/generate", body, self._limit)
                except ServerError as error:
                    raise InputError(f"{url}: {error}; is a vLLM server of this run there?") from None
                if isinstance(answer, str):
                    raise InputError(f"{url} takes no token ids ({answer}); start it with --enable-scale-out")
                # of one likeliest token alone the log-probability is 0, unless it is of the logits before sampling
                if answer["choices"][0]["logprobs"]["content"][0]["logprob"] != 0.0:
                    raise InputError(
                        f"{url} gives log-probs of before sampling; start it with --logprobs-mode processed_logprobs"
                    )

    def _client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx.AsyncClient(
            limits=limits, timeout=httpx.Timeout(self._limit, connect=CONNECT), trust_env=False
        )

    async def _get(self, client: httpx.AsyncClient, url: str, route: str) -> dict[str, Any]:
        try:
            answer = await client.get(url + route, timeout=CONNECT)
        except httpx.HTTPError as error:
            raise ServerError(f"no answer ({type(error).__name__})") from None
        if answer.status_code != 200:
            raise ServerError(f"{route} answered {answer.status_code}")
        return answer.json() if answer.content else {}

    async def _post(
        self, client: httpx.AsyncClient, url: str, route: str, body: Any, limit: float
    ) -> dict[str, Any] | str:
        """The answer, or the reason why the request itself was refused (HTTP 4xx).

        Raises:
          ServerError: for everything else.
        """
        try:
            answer = await client.post(url + route, json=body, timeout=httpx.Timeout(limit, connect=CONNECT))
        except httpx.HTTPError as error:
            raise ServerError(f"no answer ({type(error).__name__})") from None
        if 400 <= answer.status_code < 500:
            return f"HTTP {answer.status_code}: {answer.text[:300]}"
        if answer.status_code != 200:
            raise ServerError(f"{route} answered {answer.status_code}: {answer.text[:300]}")
        return answer.json() if answer.content else {}


def request_seed(seed: tuple[int, ...]) -> int:
    """31 bits of a hash; vLLM gives sample g of a request this number + g."""
    return int.from_bytes(hashlib.blake2s(repr(seed).encode()).digest()[:4], "little") >> 1
