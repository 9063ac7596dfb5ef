"""Sampling by `vllm serve` processes, over their own HTTP API.

Token ids go out; token ids, their log-probabilities and the version of the model weights come back. Every server has
the same weights: `publish` makes each load them while its requests are paused. A prompt's samples are one request, so
its prompt is prefilled once. Requests go to the server with the fewest under way, and to another one where it fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import queue
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import TypeVar

import numpy as np

from jaxrl import config
from jaxrl.errors import InputError, RunError
from jaxrl.models.decoder import Params
from jaxrl.sampling.client import SUPPORTED, Client, Failures, ServerError, ask_all, taken, this_run
from jaxrl.sampling.sampler import unchanged
from jaxrl.sampling.transports.base import Transport
from jaxrl.sampling.vllm_plugin import SILENCE
from jaxrl.types import JsonObject, OnRollout, OnUpdate, Prompt, Rollout, SamplingParams, Say

PAUSE: dict[OnUpdate, str] = {"keep": "keep", "drain": "wait"}  # vLLM's names for them
LOOK = 0.2  # seconds between looks whether a batch is complete while a server is down
RETRY = 1.0  # seconds between requests to a server that is down
JUST_BACK = 5.0  # seconds for which a server that was found well is not asked again
BEAT = 10.0  # seconds from one sign of life at the servers to the next

T = TypeVar("T")
Ask = Callable[[str, int], Awaitable[None]]  # has a server answer the prompt of an index
# (server, seconds that it has been unwell) to whether it was restarted
Restart = Callable[[str, float], bool]


def never(url: str, unwell: float) -> bool:
    """The `Restart` that leaves servers to whoever started them."""
    return False


class VLLMSampler:
    """A Sampler in front of vLLM servers. It may publish while it generates.

    Log-probabilities are those of the distribution that was sampled: with top_p = 1 and top_k = 0, as in training, of
    the whole vocabulary at the sampling temperature.

    Attributes:
      dropped: prompts that every server refused, with the reason; they have no rollouts.
    """

    def __init__(
        self,
        urls: Sequence[str],
        transport: Transport,
        section: config.Sampler | None = None,
        restart: Restart = never,
        say: Say = print,
    ) -> None:
        """
        Args:
          urls: of the servers.
          transport: carries model weights to them.
          section: `concurrency`, `on_update` and the limits in seconds of requests, publications and patience, after
            which `generate` and `publish` give up; a recipe's defaults where None.
          restart: called with a server that is down; returns whether it restarted it.
          say: prints a line.

        Raises:
          InputError: if a server is not there, or is not one that this can work with.
        """
        self._urls, self._transport, self._restart, self._say = list(urls), transport, restart, say
        self._settings = section or config.Sampler()
        self._version: int | None = None  # newest, published or being published
        self._current: dict[str, int | None] = dict.fromkeys(urls)  # what each has, where that is known
        self._back: dict[str, float] = {}  # when each server was last found to be well
        self._claimed: list[str] = []  # the servers that keep other runs away
        self.dropped: dict[str, str] = {}
        # one thread does everything with servers, so that nothing here needs a lock between threads
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="vLLM", daemon=True).start()
        self._loading = asyncio.Lock()
        self._reviving: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._client = Client()
        self._closed = False
        try:
            self._run(self._claim_all())
            self._run(self._inspect_all())
        except BaseException:  # Ctrl-C too: nothing may go on in the thread
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
            give_back = [self._client.owner(url, "DELETE", limit=2) for url in self._claimed]
            await asyncio.gather(*give_back, return_exceptions=True)
            await self._client.close()

        self._run(end())
        self._loop.call_soon_threadsafe(self._loop.stop)

    def publish(self, params: Params, version: int) -> None:
        """Has every server load the parameters. One that fails gets them when it is back.

        Raises:
          InputError: if the parameters are not the model's, or not finite.
          RunError: if no server has taken them within the patience, or the transport fails.
        """
        self._transport.prepare(params, version)
        try:
            self._run(self._load_everywhere(version))
        finally:
            self._transport.done()

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        params: SamplingParams,
        seed: tuple[int, ...],
        on_rollout: OnRollout = unchanged,
        first: int = 0,
    ) -> list[list[Rollout]]:
        """See `Sampler.generate`. Groups of prompts that servers refuse are empty; `dropped` has the reason.

        The thread that calls this calls `on_rollout`, with all that arrived before an error too. Meanwhile requests go
        on.

        Raises:
          InputError: before `publish`, if no server takes any of the prompts, or if one cuts completions short.
          RunError: if no server has answered within the patience.
        """
        if self._version is None:
            raise InputError("the vLLM servers have no weights; publish some before generating")
        groups: list[list[Rollout]] = [[] for _ in prompts]
        arrived: queue.SimpleQueue[tuple[int, list[Rollout]] | None] = queue.SimpleQueue()  # None is the end

        async def ask(url: str, p: int) -> None:
            arrived.put((p, await self._ask(url, prompts[p], samples, params, (*seed, first + p))))

        work = asyncio.run_coroutine_threadsafe(self._generate(len(prompts), ask), self._loop)
        work.add_done_callback(lambda _: arrived.put(None))
        try:
            while answer := arrived.get():
                p, rollouts = answer
                groups[p] = [on_rollout(rollout) for rollout in rollouts]
            work.result()
        except BaseException as error:  # on Ctrl-C the work would go on
            work.cancel()
            if isinstance(error, KeyboardInterrupt):  # what has been generated is kept
                arrived.put(None)  # the end may have been read
                while answer := arrived.get():
                    for rollout in answer[1]:
                        on_rollout(rollout)
            raise
        if prompts and not any(groups):
            raise InputError(f"the servers refused every prompt; the last: {list(self.dropped.values())[-1]}")
        return groups

    def _run(self, work: Coroutine[None, None, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:  # on Ctrl-C the work would go on
            future.cancel()
            raise

    async def _generate(self, count: int, ask: Ask) -> None:
        """Shares `count` prompts out among lanes of all servers, each with one request under way."""
        waiting, open_, failures = deque(range(count)), set(range(count)), Counter[int]()
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
                    await ask(url, p)
                except ServerError as error:
                    async with changed:  # another lane may take it
                        waiting.appendleft(p)
                        changed.notify_all()
                    await self._revive(url, error)
                    failures[p] += 1
                    if failures[p] * RETRY > self._settings.patience_seconds:
                        raise RunError(
                            f"{url}: {error}, at attempt {failures[p]}; see the server's log"
                        ) from None
                    await asyncio.sleep(RETRY)  # it may be well, and fail at this prompt again
                    continue
                async with changed:
                    open_.remove(p)
                    changed.notify_all()

        lanes = max(1, min(self._settings.concurrency, -(-count // len(self._urls))))
        tasks = {asyncio.create_task(serve(url)) for _ in range(lanes) for url in self._urls}
        pending = tasks
        try:
            while open_:  # a server that is down does not hold up what others can finish
                done, pending = await asyncio.wait(pending, timeout=LOOK, return_when=asyncio.FIRST_COMPLETED)
                errors = [error for task in done if (error := task.exception())]
                if errors and (not pending or not isinstance(errors[0], RunError)):
                    raise errors[0]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(
        self, url: str, prompt: Prompt, samples: int, params: SamplingParams, seed: tuple[int, ...]
    ) -> list[Rollout]:
        """All samples of one prompt.

        Raises:
          InputError: if the server cuts completions short.
          ServerError: if the server does not answer, or with other model weights than it should have.
        """
        oldest = self._current[url]
        if oldest is None:
            raise ServerError("it does not have the current weights")
        sampling = {
            "n": samples if params.temperature else 1,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "max_tokens": params.max_tokens,
            "stop_token_ids": list(params.stop_ids),
            "ignore_eos": True,
            "seed": request_seed(seed),
            "logprobs": 0,
            "detokenize": False,
        }
        body = {
            "token_ids": prompt.tokens.tolist(),
            "cache_salt": str(oldest),  # a cached prefix is of one version
            "sampling_params": sampling,
        }
        limit = self._settings.request_seconds
        answer = await self._client.post(url, "/inference/v1/generate", body, limit)
        if isinstance(answer, str):  # refused: it would be refused everywhere
            self.dropped[prompt.id] = answer
            self._say(f"prompt {prompt.id} was refused and is left out: {answer}")
            return []
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            rollouts = [self._rollout(url, prompt, params, choice, oldest) for choice in choices]
        except InputError:  # is a ValueError
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise ServerError(f"it answered with something else than completions ({error!r})") from None
        return rollouts if params.temperature else rollouts * samples

    def _rollout(
        self, url: str, prompt: Prompt, params: SamplingParams, choice: JsonObject, oldest: int
    ) -> Rollout:
        tokens = np.array(choice["token_ids"], np.int32)
        logprobs = np.array([entry["logprob"] for entry in choice["logprobs"]["content"]], np.float32)
        versions, reason = {span["version"] for span in choice["weight_versions"]}, choice["finish_reason"]
        known = {version_name(version) for version in range(oldest, (self._version or 0) + 1)}
        if any(map(is_foreign, versions)):
            raise taken(url, "")
        if not versions <= known or len(tokens) != len(logprobs) or reason not in ("stop", "length"):
            raise ServerError(f"a completion of weights {versions}, not {known}, ended by {reason}")
        if reason == "length" and len(tokens) < params.max_tokens:
            raise InputError(
                f"{url} cut a completion at {len(prompt.tokens)} + {len(tokens)} tokens; start it with "
                f"--max-model-len {len(prompt.tokens) + params.max_tokens} or more"
            )
        return Rollout(prompt, tokens, logprobs, reason, min(map(version_number, versions)), server=url)

    async def _load_everywhere(self, version: int) -> None:
        self._version = version
        failed = await self._load(self._urls)
        for url, error in failed.items():
            self._say(f"{url} did not take weights {version}: {error}")
        if len(failed) == len(self._urls):
            await self._revive(*next(iter(failed.items())))

    async def _load(self, urls: Sequence[str]) -> Failures:
        """Follows vLLM's update protocol: pausing frees the cache; only a server that took everything resumes.

        Returns:
          the reason, for each server that did not take the newest model weights.
        """
        failed: Failures = {}
        publish_limit = self._settings.publish_seconds
        order = functools.partial(self._client.order, limit=publish_limit)

        async def pause(url: str) -> None:
            mode = PAUSE[self._settings.on_update]
            limit = self._settings.request_seconds if mode == "wait" else publish_limit
            await self._client.order(url, f"/pause?mode={mode}", None, limit)
            await order(url, "/start_weight_update", None)

        async def resume(url: str) -> None:
            await order(url, "/finish_weight_update", {"weight_version": version_name(version)})
            await order(url, "/resume", None)
            self._current[url] = version

        async with self._loading:
            version = self._version
            await self._transport.connect(self._client, urls, failed)
            await ask_all(urls, pause, failed)
            await self._transport.deliver(self._client, urls, failed)
            await ask_all(urls, resume, failed)
        self._current |= dict.fromkeys(failed)
        return failed

    async def _revive(self, url: str, error: ServerError) -> None:
        """Waits until a server is back, and gives it the current model weights before anything else.

        Raises:
          RunError: after `patience_seconds`.
        """
        clock, patience = self._loop.time, self._settings.patience_seconds
        async with self._reviving[url]:  # one lane asks for all of its server's
            unwell = began = clock()
            if began < self._back.get(url, -1) + JUST_BACK:
                return
            self._say(f"{url}: {error}; waiting for it")
            while clock() < began + patience:
                try:
                    info = await self._client.get(url, "/weight_info")
                    found = str(info.get("weight_version"))
                    if self._current[url] is not None and is_foreign(found):
                        raise taken(url, "")
                    if self._current[url] is None or found != version_name(self._version):
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
                await asyncio.sleep(RETRY)
        raise RunError(
            f"{url}: {error}; it was not back after {patience:.0f} s. Start it again and repeat the command"
        )

    async def _claim_all(self) -> None:
        for url in self._urls:
            with contextlib.suppress(
                ServerError
            ):  # of no Guard; what else may be wrong is found by the inspection
                await self._claim(url)
                self._claimed.append(url)
        self._beating = asyncio.create_task(self._beat())

    async def _claim(self, url: str) -> None:
        """Takes a server for this run, at once or when an owner that has crashed has been silent for long enough.

        Raises:
          InputError: if another run is at work there.
          ServerError: if it does not keep runs apart.
        """
        before, silent = "", -1.0
        while (answer := await self._client.owner(url))["owner"] != this_run():
            owner, silence = str(answer["owner"]), float(answer["silent"])
            if owner == before and silence < silent:
                raise taken(url, owner)
            if owner != before:
                self._say(
                    f"{url}: {owner.partition(' ')[2]} has not given it back; watching for {SILENCE:.0f} s whether "
                    "it lives"
                )
            before, silent = owner, silence
            await asyncio.sleep(RETRY)

    async def _beat(self) -> None:
        """Shows, also during a long update, that this run lives."""
        while True:
            await asyncio.sleep(BEAT)
            signs = [self._client.owner(url) for url in self._claimed]
            await asyncio.gather(*signs, return_exceptions=True)

    async def _inspect_all(self) -> None:
        for url in self._urls:
            try:
                await self._inspect(url)
            except ServerError as error:
                raise InputError(f"{url}: {error}; is a vLLM server of this run there?") from None

    async def _inspect(self, url: str) -> None:
        """Rejects a server whose settings would silently change the log-probabilities.

        Raises:
          InputError: with the option that it has to be started with.
          ServerError: if it does not answer.
        """
        version = str((await self._client.get(url, "/version")).get("version", "unknown"))
        if not version.startswith(SUPPORTED + "."):
            raise InputError(f"{url} runs vLLM {version}; jaxrl works with {SUPPORTED}.*")
        limit = self._settings.publish_seconds
        info = await self._client.get(url, "/server_info?config_format=json", limit)
        found = (info["vllm_config"]["weight_transfer_config"] or {}).get("backend")
        backend = self._transport.backend
        if found != backend:
            raise InputError(
                f"{url} takes weights by {found}; start it with --weight-transfer-config "
                f'\'{{"backend": "{backend}"}}\', or choose another sampler.transport'
            )
        await self._transport.greet(self._client, url)
        sampling = {"top_k": 1, "max_tokens": 1, "logprobs": 0, "detokenize": False}
        body = {"token_ids": [0], "sampling_params": sampling}
        limit = self._settings.request_seconds
        answer = await self._client.post(url, "/inference/v1/generate", body, limit)
        if isinstance(answer, str):
            raise InputError(f"{url} takes no token ids ({answer}); start it with --enable-scale-out")
        # with one candidate token the log-probability is 0, unless it is that of the logits before sampling
        if answer["choices"][0]["logprobs"]["content"][0]["logprob"] != 0.0:
            raise InputError(
                f"{url} gives log-probs from before sampling; start it with --logprobs-mode processed_logprobs"
            )


def version_name(version: int | None) -> str:
    """What servers call a version of this run's weights; no other run's has the same name."""
    return f"{this_run().partition(' ')[0]}:{version}"


def version_number(name: str) -> int:
    return int(name.rpartition(":")[2])


def is_foreign(name: str) -> bool:
    """Whether another run has published this version; a server that was started again has one without a run."""
    return name.rpartition(":")[0] not in ("", version_name(0).rpartition(":")[0])


def request_seed(seed: tuple[int, ...]) -> int:
    """31 bits of a hash; vLLM gives sample g of a request this number + g."""
    return int.from_bytes(hashlib.blake2s(repr(seed).encode()).digest()[:4], "little") >> 1
