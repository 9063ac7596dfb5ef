"""Sampling by `vllm serve` processes, over their own HTTP API.

Token ids go out, token ids, their log-probabilities and the version of the weights come back. Every server has the
same weights: `publish` has each server load them while its requests stand still. A prompt's samples are one request,
so its prompt is prefilled once; requests go to the server with the fewest under way, and to another one where a server
fails.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Literal

import numpy as np

from jaxrl.errors import InputError
from jaxrl.sampling.client import Client, ServerError, each
from jaxrl.sampling.transports.base import Transport
from jaxrl.types import Prompt, Rollout, SamplingParams

SUPPORTED = "0.32"  # the minor version whose routes these are
PAUSE = {"keep": "keep", "drain": "wait"}  # what vLLM calls them


class VLLMSampler:
    """A Sampler in front of vLLM servers. It may publish while it generates.

    Log-probabilities are those of the distribution that was sampled: with top_p = 1 and top_k = 0, as in training, of
    the whole vocabulary at the sampling temperature.

    Attributes:
      dropped: prompts that every server refused, with the reason; they have no rollouts.
    """

    def __init__(
        self, urls: Sequence[str], transport: Transport, *, concurrency: int = 64, limit: float = 3600.0,
        publish_limit: float = 300.0, patience: float = 600.0, on_update: Literal["keep", "drain"] = "keep",
        restart: Callable[[str, float], bool] = lambda url, seconds: False, say: Callable[[str], None] = print,
    ):  # fmt: skip
        """
        Args:
          urls: of the servers.
          transport: carries weights to them.
          concurrency: requests under way at one server.
          limit: seconds for one request.
          publish_limit: seconds for one request of a publication.
          patience: seconds without any server that answers, after which `generate` and `publish` give up.
          on_update: what happens to requests that are under way when weights are published: they go on with the new
            ones, or end first.
          restart: is told of a server that has been unwell for some seconds; returns whether it started it again.

        Raises:
          InputError: if a server is not there, or is not one that this can work with.
        """
        self._urls, self._transport, self._pause = list(urls), transport, PAUSE[on_update]
        self._concurrency, self._limit, self._patience = concurrency, limit, patience
        self._publish_limit, self._restart, self._say = publish_limit, restart, say
        self._version: int | None = None  # newest, published or being published
        self._current: dict[str, int | None] = dict.fromkeys(urls)  # what each has, where that is known
        self._back: dict[str, float] = {}  # when each server was last found to be well
        self.dropped: dict[str, str] = {}
        # one thread does all the talking, so that nothing here needs a lock between threads
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="vLLM", daemon=True).start()
        self._loading = asyncio.Lock()
        self._asking: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._client = Client()
        self._closed = False
        try:
            self._run(self._inspect())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends whatever is under way."""
        if self._closed:
            return
        self._closed = True

        async def end() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await self._client.close()

        self._run(end())
        self._loop.call_soon_threadsafe(self._loop.stop)

    def publish(self, params: Any, version: int) -> None:
        """Has every server load the weights. One that fails gets them when it is back.

        Raises:
          InputError: when no server has taken them for `patience` seconds, or they are not fit to be published.
        """
        self._transport.prepare(params, version)
        try:
            self._run(self._everywhere(version))
        finally:
            self._transport.done()

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        params: SamplingParams,
        seed: tuple[int, ...],
        each: Callable[[Rollout], Rollout] = lambda rollout: rollout,
        first: int = 0,
    ) -> list[list[Rollout]]:
        """See `Sampler.generate`. Groups of prompts that servers refuse are empty; `dropped` says why.

        Raises:
          InputError: before `publish`, when no server has answered for `patience` seconds, or none took any prompt.
        """
        if self._version is None:
            raise InputError("the vLLM servers have no weights; publish some before generating")
        return self._run(self._generate(prompts, samples, params, seed, each, first))

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # on Ctrl-C
            raise

    async def _generate(self, prompts, samples, params, seed, each, first) -> list[list[Rollout]]:
        groups: list[list[Rollout]] = [[] for _ in prompts]
        waiting, open_ = deque(range(len(prompts))), set(range(len(prompts)))
        changed = asyncio.Condition()

        async def serve(url: str) -> None:
            """One lane of one server: takes prompts as long as there are any."""
            while True:
                async with changed:
                    await changed.wait_for(lambda: waiting or not open_)
                    if not open_:
                        return
                    p = waiting.popleft()
                try:
                    groups[p] = [
                        each(r) for r in await self._ask(url, prompts[p], samples, params, (*seed, first + p))
                    ]
                except ServerError as error:
                    async with changed:
                        waiting.appendleft(p)
                        changed.notify_all()
                    await self._revive(url, error)
                    continue
                async with changed:
                    open_.remove(p)
                    changed.notify_all()

        lanes = max(1, min(self._concurrency, -(-len(prompts) // len(self._urls))))
        tasks = {asyncio.create_task(serve(url)) for _ in range(lanes) for url in self._urls}
        pending = tasks
        try:
            while open_:  # a server that is down does not hold up what others can finish
                done, pending = await asyncio.wait(pending, timeout=0.2, return_when=asyncio.FIRST_COMPLETED)
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
        self, url: str, prompt: Prompt, samples: int, params: SamplingParams, seed: tuple[int, ...]
    ) -> list[Rollout]:
        """All samples of one prompt.

        Raises:
          ServerError: if the server does not answer, or with other weights than it should have.
        """
        oldest = self._current[url]
        if oldest is None:
            raise ServerError("it does not have the current weights")
        body = {
            "token_ids": prompt.tokens.tolist(),
            "cache_salt": str(oldest),  # a cached prefix is of one version
            "sampling_params": {
                "n": samples if params.temperature else 1, "temperature": params.temperature, "top_p": params.top_p,
                "top_k": params.top_k, "max_tokens": params.max_tokens, "stop_token_ids": list(params.stop_ids),
                "ignore_eos": True, "seed": request_seed(seed), "logprobs": 0, "detokenize": False,
            },
        }  # fmt: skip
        answer = await self._client.post(url, "/inference/v1/generate", body, self._limit)
        if isinstance(answer, str):  # refused: it would be refused everywhere
            self.dropped[prompt.id] = answer
            self._say(f"prompt {prompt.id} was refused and is left out: {answer}")
            return []
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            rollouts = [self._rollout(url, prompt, params, choice, oldest) for choice in choices]
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError(f"it answered with something else than completions ({error!r})") from None
        return rollouts if params.temperature else rollouts * samples

    def _rollout(
        self, url: str, prompt: Prompt, params: SamplingParams, choice: dict[str, Any], oldest: int
    ) -> Rollout:
        tokens = np.array(choice["token_ids"], np.int32)
        logprobs = np.array([entry["logprob"] for entry in choice["logprobs"]["content"]], np.float32)
        versions, reason = {span["version"] for span in choice["weight_versions"]}, choice["finish_reason"]
        known = {str(version) for version in range(oldest, (self._version or 0) + 1)}
        if not versions <= known or len(tokens) != len(logprobs) or reason not in ("stop", "length"):
            raise ServerError(
                f"a completion of weights {versions}, not {known}, ended by {choice['finish_reason']}"
            )
        if reason == "length" and len(tokens) < params.max_tokens:
            raise InputError(
                f"{url} cut a completion at {len(prompt.tokens)} + {len(tokens)} tokens; start it with "
                f"--max-model-len {len(prompt.tokens) + params.max_tokens} or more"
            )
        return Rollout(prompt, tokens, logprobs, reason, min(map(int, versions)), server=url)

    async def _everywhere(self, version: int) -> None:
        self._version = version
        failed = await self._load(self._urls)
        for url, error in failed.items():
            self._say(f"{url} did not take weights {version}: {error}")
        if len(failed) == len(self._urls):
            await self._revive(*next(iter(failed.items())))

    async def _load(self, urls: Sequence[str]) -> dict[str, ServerError]:
        """vLLM's update protocol: pausing frees the cache; only a server that took everything goes on.

        Returns:
          why, for each server that did not take the newest weights.
        """
        failed: dict[str, ServerError] = {}
        order = functools.partial(self._client.order, limit=self._publish_limit)

        async def pause(url: str) -> None:
            limit = self._limit if self._pause == "wait" else self._publish_limit
            await self._client.order(url, f"/pause?mode={self._pause}", None, limit)
            await order(url, "/start_weight_update", None)

        async def resume(url: str) -> None:
            await order(url, "/finish_weight_update", {"weight_version": str(version)})
            await order(url, "/resume", None)
            self._current[url] = version

        async with self._loading:
            version = self._version
            await self._transport.connect(self._client, urls, failed)
            await each(urls, pause, failed)
            await self._transport.deliver(self._client, urls, failed)
            await each(urls, resume, failed)
        self._current |= dict.fromkeys(failed)
        return failed

    async def _revive(self, url: str, error: BaseException) -> None:
        """Waits until a server is back, and gives it the current weights before anything else.

        Raises:
          InputError: after `patience` seconds.
        """
        clock = self._loop.time
        async with self._asking[url]:  # one asks for all its lanes
            unwell = began = clock()
            if began < self._back.get(url, -1) + 5:
                return
            self._say(f"{url}: {error}; waiting for it")
            while clock() < began + self._patience:
                try:
                    info = await self._client.get(url, "/weight_info")
                    if self._current[url] is None or info.get("weight_version") != str(self._version):
                        # to its end, even if the batch ends without this server: it must not stay paused
                        failed = await asyncio.shield(self._load([url]))
                        if failed:
                            raise failed[url]
                    self._back[url] = clock()
                    self._say(f"{url} is back, with weights {self._version}")
                    return
                except ServerError as again:
                    error = again
                if await asyncio.to_thread(self._restart, url, clock() - unwell):
                    self._say(f"{url}: started again")
                    unwell = clock()
                await asyncio.sleep(1.0)
        raise InputError(
            f"{url}: {error}; it was not back after {self._patience:.0f} s. Start it again and repeat the command"
        )

    async def _inspect(self) -> None:
        """Refuses servers that would give other numbers than they seem to."""
        backend = self._transport.backend
        for url in self._urls:
            try:
                version = str((await self._client.get(url, "/version")).get("version", "unknown"))
                if not version.startswith(SUPPORTED + "."):
                    raise InputError(f"{url} runs vLLM {version}; jaxrl works with {SUPPORTED}.*")
                info = await self._client.get(url, "/server_info?config_format=json", self._publish_limit)
                by = (info["vllm_config"]["weight_transfer_config"] or {}).get("backend")
                if by != backend:
                    raise InputError(
                        f"{url} takes weights by {by}; start it with --weight-transfer-config "
                        f'\'{{"backend": "{backend}"}}\', or choose another sampler.transport'
                    )
                await self._transport.greet(self._client, url)
                body = {
                    "token_ids": [0],
                    "sampling_params": {"top_k": 1, "max_tokens": 1, "logprobs": 0, "detokenize": False},
                }
                answer = await self._client.post(url, "/inference/v1/generate", body, self._limit)
            except ServerError as error:
                raise InputError(f"{url}: {error}; is a vLLM server of this run there?") from None
            if isinstance(answer, str):
                raise InputError(f"{url} takes no token ids ({answer}); start it with --enable-scale-out")
            # of one likeliest token alone the log-probability is 0, unless it is of the logits before sampling
            if answer["choices"][0]["logprobs"]["content"][0]["logprob"] != 0.0:
                raise InputError(
                    f"{url} gives log-probs of before sampling; start it with --logprobs-mode processed_logprobs"
                )


def request_seed(seed: tuple[int, ...]) -> int:
    """31 bits of a hash; vLLM gives sample g of a request this number + g."""
    return int.from_bytes(hashlib.blake2s(repr(seed).encode()).digest()[:4], "little") >> 1
