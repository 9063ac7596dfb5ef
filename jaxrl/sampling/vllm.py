"""Sampling by `vllm serve` processes, over their own HTTP API.

Token ids go out; token ids, their log-probabilities and the version of the model weights come back. Every server has
the same weights: `publish` makes each load them while its requests are paused. A prompt's samples are one request, so
its prompt is prefilled once; or a few requests where one's answer would be too large to hold. Requests go to the server
with the fewest under way, and to another one where it fails.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import hashlib
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from typing import TypeVar

from jaxrl import config
from jaxrl.errors import InputError, RunError
from jaxrl.json_fields import LARGEST, shown
from jaxrl.lock import BEAT
from jaxrl.models.decoder import Params
from jaxrl.sampling.answers import Needs, read_answer
from jaxrl.sampling.client import (
    PROCESSED,
    SUPPORTED,
    BadAnswer,
    Client,
    Failures,
    Refused,
    ServerError,
    ask_all,
    taken,
    this_run,
)
from jaxrl.sampling.lanes import RETRY, share_out
from jaxrl.sampling.sampler import no_more, unchanged
from jaxrl.sampling.transports.base import Transport
from jaxrl.sampling.vllm_plugin import OWNER, SILENCE
from jaxrl.types import JsonObject, OnGroup, OnRollout, OnUpdate, Prompt, Rollout, SamplingParams, Say

PAUSE: dict[OnUpdate, str] = {"keep": "keep", "drain": "wait"}  # vLLM's names for them
RAW = f"gives log-probs from before sampling; start it with --logprobs-mode {PROCESSED}"
ANYTHING = Needs()
AT_ONCE = 1 << 19  # tokens that the samples of a request may have; each is up to 150 bytes of its answer
JUST_BACK = 5.0  # seconds for which a server that was found well is not asked again

T = TypeVar("T")
# (server, seconds that it has been unwell) to whether it was restarted
Restart = Callable[[str, float], bool]


def going_on() -> bool:
    """The `stopping` of what is stopped by exceptions alone."""
    return False


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
        needs: Needs = ANYTHING,
        stopping: Callable[[], bool] = going_on,
    ) -> None:
        """
        Args:
          urls: of the servers.
          transport: carries model weights to them.
          section: `concurrency`, `on_update` and the limits in seconds of requests, publications and patience, after
            which `generate` and `publish` give up; a recipe's defaults where None.
          restart: called with a server that is down; returns whether it restarted it.
          say: prints a line.
          needs: what the servers have to serve.
          stopping: whether no server is to be waited for any more.

        Raises:
          InputError: if a server is not there, or is not one that this can work with.
        """
        self._urls, self._transport, self._restart, self._say = list(urls), transport, restart, say
        self._settings, self._needs, self._stopping = section or config.Sampler(), needs, stopping
        self._version: int | None = None  # newest, published or being published
        self._current: dict[str, int | None] = dict.fromkeys(urls)  # what each has, where that is known
        self._instances: dict[str, object] = {}  # of each server: a number that each start of vLLM draws
        self._wrong: dict[str, InputError] = {}  # servers that came back other than they have to be
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
        on_group: OnGroup = no_more,
    ) -> list[list[Rollout]]:
        """See `Sampler.generate`. Groups of prompts that servers refuse are empty; `dropped` has the reason.

        The thread that calls this calls `on_rollout` and `on_group`, with all that arrived before an error too.
        Meanwhile requests go on, and those of prompts that `on_group` returns begin at once.

        Raises:
          InputError: before `publish`, if no server takes any of the prompts, or if all that are left came back other
            than they have to be.
          RunError: if no server is left: each is gone for longer than the patience, or answered with what it must not.
        """
        if self._version is None:
            raise InputError("the vLLM servers have no weights; publish some before generating")
        given, groups = list[Prompt](), list[list[Rollout]]()
        Work = concurrent.futures.Future[None]
        arrived: queue.SimpleQueue[tuple[int, list[Rollout]] | Work] = (
            queue.SimpleQueue()
        )  # a work once it ends
        free = {url: asyncio.Semaphore(self._settings.concurrency) for url in self._urls}
        works: list[Work] = []

        async def ask(start: int, url: str, p: int) -> None:
            place = start + p
            async with free[url]:
                asked = await self._ask(url, given[place], samples, params, (*seed, first + place))
            arrived.put((place, asked))

        async def ask_for(start: int, count: int) -> None:
            lanes = max(1, min(self._settings.concurrency, -(-count // len(self._urls))))
            patience = self._settings.patience_seconds
            of_these = functools.partial(ask, start)
            refused = await share_out(count, self._urls, lanes, of_these, self._revive, patience, self._left)
            for p, error in refused.items():
                prompt = given[start + p]
                self.dropped[prompt.id] = str(error)
                self._say(f"prompt {prompt.id} was refused and is left out: {error}")
                arrived.put((start + p, []))

        def begin(more: Sequence[Prompt]) -> None:
            start = len(given)
            given.extend(more)
            groups.extend([] for _ in more)
            work = asyncio.run_coroutine_threadsafe(ask_for(start, len(more)), self._loop)
            works.append(work)
            work.add_done_callback(arrived.put)

        begin(prompts)
        under_way = len(works)
        try:
            while under_way:
                answer = arrived.get()
                if isinstance(answer, concurrent.futures.Future):
                    answer.result()
                    under_way -= 1
                    continue
                place, rollouts = answer
                groups[place] = [on_rollout(rollout) for rollout in rollouts]
                if more := on_group(place, groups[place]):
                    begin(more)
                    under_way += 1
        except BaseException as error:  # on Ctrl-C the work would go on
            for work in works:
                work.cancel()
            if isinstance(error, KeyboardInterrupt):  # what has been generated is kept
                while not arrived.empty():
                    if not isinstance(answer := arrived.get(), concurrent.futures.Future):
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

    async def _ask(
        self, url: str, prompt: Prompt, samples: int, params: SamplingParams, seed: tuple[int, ...]
    ) -> list[Rollout]:
        """All samples of one prompt; sample g has the same noise in whichever request it is.

        Raises:
          InputError: if the server is not what it has to be.
          BadAnswer: if it answers with something else than completions of the prompt.
          Refused: if it does not take the prompt.
          ServerError: if it does not answer, or has been started anew.
        """
        if url in self._wrong:
            raise self._wrong[url]
        oldest = self._current[url]
        if oldest is None:
            raise ServerError("it does not have the current weights")
        different = samples if params.temperature else 1
        size, number = max(1, AT_ONCE // params.max_tokens), request_seed(seed)
        requests = [
            asyncio.ensure_future(
                self._ask_some(url, prompt, min(size, different - first), params, number + first, oldest)
            )
            for first in range(0, different, size)
        ]
        try:
            rollouts = [rollout for some in await asyncio.gather(*requests) for rollout in some]
        finally:
            for request in requests:  # one has failed, or none is left
                request.cancel()
        return rollouts if params.temperature else rollouts * samples

    async def _ask_some(
        self, url: str, prompt: Prompt, samples: int, params: SamplingParams, seed: int, oldest: int
    ) -> list[Rollout]:
        """Samples of one prompt, the first of which has the noise of `seed`; see `_ask`."""
        sampling = {
            "n": samples,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "max_tokens": params.max_tokens,
            "stop_token_ids": list(params.stop_ids),
            "ignore_eos": True,
            "seed": seed,
            "logprobs": 0,
            "detokenize": False,
        }
        body = {
            "token_ids": prompt.tokens.tolist(),
            "cache_salt": str(oldest),  # a cached prefix is of one version
            "sampling_params": sampling,
        }
        limit = self._settings.request_seconds
        try:
            answer = await self._client.post(url, "/inference/v1/generate", body, limit)
            known = self._names_since(oldest)
            return read_answer(answer, prompt, samples, params, self._needs.vocab_size, known, url)
        except (Refused, BadAnswer, InputError):
            found = await self._weights_of(url)
            if is_foreign(found):
                raise taken(url, "") from None
            if found not in self._names_since(oldest):
                self._current[url] = None
                raise ServerError(f"it was started anew: it has weights {shown(found)}") from None
            raise

    def _names_since(self, oldest: int) -> dict[str, int]:
        """The versions that a server may have, by name."""
        return {version_name(version): version for version in range(oldest, (self._version or 0) + 1)}

    async def _weights_of(self, url: str) -> str:
        """What a server calls its weights: the version that it was given, or else vLLM's "default"."""
        return str((await self._client.get(url, "/weight_info")).get("weight_version"))

    def _left(self, url: str, error: Exception) -> None:
        if self._wrong.get(url) is not error:  # said when it was found
            self._say(f"{error}; it is not asked again for this batch")

    async def _load_everywhere(self, version: int) -> None:
        self._version = version
        failed = await self._load(self._urls)
        for url, error in failed.items():
            if url not in self._wrong:
                self._say(f"{url} did not take weights {version}: {error}")

        async def ask(url: str, _: int) -> None:
            if url in self._wrong:
                raise self._wrong[url]
            if self._current[url] is None:
                raise failed[url]

        if len(failed) == len(self._urls):  # until one has them
            patience = self._settings.patience_seconds
            await share_out(1, self._urls, 1, ask, self._revive, patience, self._left)

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
            try:
                await order(url, "/start_weight_update", None)
            except ServerError:  # a run that was killed on the way may have left one open
                await order(url, "/finish_weight_update", None)
                await order(url, "/start_weight_update", None)

        async def resume(url: str) -> None:
            await order(url, "/finish_weight_update", {"weight_version": version_name(version)})
            await order(url, "/resume", None)
            self._current[url] = version

        async with self._loading:
            version = self._version
            await ask_all(urls, self._recognize, failed)
            await self._transport.connect(self._client, urls, failed)
            await ask_all(urls, pause, failed)
            await self._transport.deliver(self._client, urls, failed)
            await ask_all(urls, resume, failed)
        self._current |= dict.fromkeys(failed)
        return failed

    async def _recognize(self, url: str) -> None:
        """Inspects a server unless it is as it was left: it may have been started anew, with other options.

        Raises:
          InputError, ServerError: see `_inspect`.
        """
        found = await self._weights_of(url)
        has = self._current[url]  # before the first publication all weights are called "default"
        if has is not None and url not in self._wrong and found == version_name(has):
            return
        try:
            if has is not None and is_foreign(found):
                raise taken(url, "")
            await self._inspect(url)
        except InputError as error:
            if len(self._urls) > 1 and str(error) != str(self._wrong.get(url)):
                self._say(f"{error}; it is left out until it is right")
            self._wrong[url] = error
            raise
        self._wrong.pop(url, None)

    async def _revive(self, url: str, error: ServerError) -> None:
        """Waits until a server is back, and gives it the current model weights before anything else.

        Raises:
          InputError: if it came back other than it has to be.
          RunError: after `patience_seconds`, or when the run is to stop.
        """
        clock, patience = self._loop.time, self._settings.patience_seconds
        async with self._reviving[url]:
            unwell = began = clock()
            just_back = self._current[url] is not None and began < self._back.get(url, -1) + JUST_BACK
            if just_back and not self._stopping():
                return
            self._say(f"{url}: {error}; waiting for it")
            reason: Exception = error
            while clock() < began + patience and not self._stopping():
                try:
                    newest = version_name(self._version)
                    if self._current[url] is None or await self._weights_of(url) != newest:
                        # to its end, even if the batch ends without this server: it must not stay paused
                        failed = await asyncio.shield(self._load([url]))
                        if failed:
                            raise failed[url]
                    self._back[url] = clock()
                    self._say(f"{url} is back, with weights {self._version}")
                    return
                except ServerError as again:
                    reason = again
                if await asyncio.to_thread(self._restart, url, clock() - unwell):
                    self._say(f"{url}: started again")
                    unwell = clock()
                await asyncio.sleep(RETRY)
        waited = f"{min(clock() - began, patience):.0f} s"
        raise RunError(
            f"{url}: {reason}; it was not back after {waited}. Start it again and repeat the command"
        )

    async def _claim_all(self) -> None:
        for url in self._urls:
            # it may have no Guard; what else may be wrong is found by the inspection
            with contextlib.suppress(ServerError):
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
        while (answer := await self._client.owner(url)).get("owner") != this_run():
            owner, silence = str(answer.get("owner")), answer.get("silent")
            if not isinstance(silence, int | float):
                raise BadAnswer(f"{OWNER} answered {shown(answer)}")
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
        """Rejects a server that cannot serve the run, or whose settings would silently change log-probabilities.

        Raises:
          InputError: with the option that it has to be started with.
          ServerError: if it does not answer.
        """
        version = str((await self._client.get(url, "/version")).get("version", "unknown"))
        if not version.startswith(SUPPORTED + "."):
            raise InputError(f"{url} runs vLLM {version}; jaxrl works with {SUPPORTED}.*")
        limit = self._settings.publish_seconds
        info = await self._client.get(url, "/server_info?config_format=json", limit)
        self._require_settings(url, _part(info, "vllm_config"))
        await self._transport.greet(self._client, url)
        if not await self._paused(url):
            await self._require_processed(url)

    def _require_settings(self, url: str, served: JsonObject) -> None:
        """Rejects a server by the settings that it reports. Raises: InputError."""
        found, backend = _part(served, "weight_transfer_config").get("backend"), self._transport.backend
        if found != backend:
            raise InputError(
                f"{url} takes weights by {found}; start it with --weight-transfer-config "
                f'\'{{"backend": "{backend}"}}\', or choose another sampler.transport'
            )
        model, needs = _part(served, "model_config"), self._needs
        positions, dtype = model.get("max_model_len"), str(model.get("dtype", needs.dtype))
        if isinstance(positions, int) and positions < needs.max_tokens:
            raise InputError(
                f"{url} takes {positions} tokens of a prompt and its completion, and the recipe needs "
                f"{needs.max_tokens}; start it with --max-model-len {needs.max_tokens} or more"
            )
        if needs.dtype and dtype.removeprefix("torch.") != needs.dtype:
            raise InputError(
                f"{url} computes in {dtype.removeprefix('torch.')}, and the trainer in {needs.dtype}; start it with "
                f"--dtype {needs.dtype}, or set model.dtype"
            )
        if model.get("logprobs_mode", PROCESSED) != PROCESSED:
            raise InputError(f"{url} {RAW}")
        self._instances[url] = instance = served.get("instance_id")
        for other in self._urls:
            if other != url and instance and self._instances.get(other) == instance:
                raise InputError(f"{url} and {other} are the same server; name it once in sampler.urls")

    async def _paused(self, url: str) -> bool:
        """Whether a run was killed while the server waited for its weights: a request would wait too."""
        try:
            return (await self._client.get(url, "/is_paused")).get("is_paused") is True
        except ServerError:  # whatever is wrong with it, the next request meets too
            return False

    async def _require_processed(self, url: str) -> None:
        """Has one token sampled.

        Raises:
          InputError: if the server takes no token ids, has fewer than the model, or gives other log-probabilities.
          ServerError: if it does not answer.
        """
        sampling: JsonObject = {"top_k": 1, "max_tokens": 1, "logprobs": 0, "detokenize": False}
        if self._needs.vocab_size < LARGEST:
            sampling["stop_token_ids"] = [self._needs.vocab_size - 1]
        body = {"token_ids": [0], "sampling_params": sampling}
        limit = (
            self._settings.publish_seconds
        )  # a publication waits for it, where the server was started anew
        try:
            answer = await self._client.post(url, "/inference/v1/generate", body, limit)
            logprob = answer["choices"][0]["logprobs"]["content"][0]["logprob"]
        except Refused as error:
            raise InputError(f"{url} does not serve the recipe's model ({error})") from None
        except BadAnswer as error:
            raise InputError(
                f"{url} takes no token ids ({error}); start it with --enable-scale-out"
            ) from None
        except (IndexError, KeyError, TypeError):
            raise BadAnswer(f"no completion came, but {shown(answer)}") from None
        # with one candidate token the log-probability is 0, unless it is that of the logits before sampling
        if logprob != 0.0:
            raise InputError(f"{url} {RAW}")


def _part(value: JsonObject, name: str) -> JsonObject:
    """An object in a JSON object; empty where there is none."""
    found = value.get(name)
    return found if isinstance(found, dict) else {}


def version_name(version: int | None) -> str:
    """What servers call a version of this run's weights; no other run's has the same name."""
    return f"{this_run().partition(' ')[0]}:{version}"


def is_foreign(name: str) -> bool:
    """Whether another run has published this version; a server that was started again has one without a run."""
    return name.rpartition(":")[0] not in ("", version_name(0).rpartition(":")[0])


def request_seed(seed: tuple[int, ...]) -> int:
    """31 bits of a hash; vLLM gives sample g of a request this number + g."""
    return int.from_bytes(hashlib.blake2s(repr(seed).encode()).digest()[:4], "little") >> 1
