"""Model weights from a file, inside vLLM's processes: `--weight-transfer-config '{"backend": "jaxrl_file"}'`.

vLLM finds `register` as an entry point of "vllm.general_plugins" in its own environment, which has torch but neither
JAX nor what jaxrl's other modules need. The engine follows vLLM's own update protocol (start, update, finish), so
tensor parallelism, compiled graphs and prepacked weights are vLLM's business: it is given a whole checkpoint at a time,
under Hugging Face's names.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hmac
import json
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypedDict

from jaxrl.rope import read_rope
from jaxrl.types import JsonObject

if TYPE_CHECKING:
    import torch
    from vllm.v1.worker.worker_base import WorkerBase

OWNER = "/jaxrl/owner"  # route of Guard
RUN = "jaxrl-run"  # header with the run's token, and who that is in words
IDENTITY = "JAXRL_SERVER"  # variable of a server, by which whoever started it recognizes it
RANK = "jaxrl_rank"  # method of vLLM's workers, for /collective_rpc: see `describe_rank`
SILENCE = 35.0  # seconds without a request after which an owner counts as dead


def register() -> None:
    """Registers the backend "jaxrl_file" and the method RANK; vLLM calls it in each of its processes."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, RANK, describe_rank)

    @dataclasses.dataclass
    class Model(WeightTransferInitInfo):
        model: JsonObject  # fields of the trainer's config.json

    @dataclasses.dataclass
    class File(WeightTransferUpdateInfo):
        path: str = ""  # a safetensors file that this process can read
        blake3: str = ""  # its digest

    class FileEngine(WeightTransferEngine):
        init_info_cls, update_info_cls = Model, File

        def init_transfer_engine(self, init_info: Model) -> None:
            require_same_model(init_info.model, self.model_config.hf_config)

        def start_weight_update(self) -> None:
            from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

            initialize_layerwise_reload(self.model)

        def update_weights(self, update_info: dict[str, str]) -> None:
            # the base class synchronizes an accelerator, which a CPU does not have
            self.receive_weights(self.parse_update_info(update_info))

        def receive_weights(self, update_info: File) -> None:
            load_file(self.model, Path(update_info.path), update_info.blake3, self.device)

        def finish_weight_update(self) -> None:
            from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

            finalize_layerwise_reload(self.model, self.model_config)
            # a CPU multiplies by a packed copy of the weights; that of a tied LM head is still of the old embedding,
            # because no weight came under its name
            if self.device.type == "cpu" and self.model_config.hf_config.tie_word_embeddings:
                self.model.lm_head.quant_method.process_weights_after_loading(self.model.lm_head)

        def shutdown(self) -> None:
            pass

    WeightTransferEngineFactory.register_engine("jaxrl_file", FileEngine)


def describe_rank(worker: WorkerBase) -> JsonObject:
    """What NCCL compares before ranks join: the version of the library that this worker loads, its GPU's UUID.

    Without NCCL, as in a build for CPUs, the version is 0.
    """
    import torch
    from vllm.utils.nccl import find_nccl_library

    version, gpu = ctypes.c_int(), ""
    with contextlib.suppress(ValueError, OSError):
        ctypes.CDLL(find_nccl_library()).ncclGetVersion(ctypes.byref(version))
    if worker.device.type == "cuda":
        gpu = str(torch.cuda.get_device_properties(worker.device).uuid)
    return {"version": version.value, "gpu": gpu}


class Loads(Protocol):
    """The part of a vLLM model that loads a checkpoint."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> object: ...


def load_file(model: Loads, path: Path, digest: str, device: torch.device) -> None:
    """Loads a safetensors file into a model on `device`.

    Raises:
      ValueError: see `verify_digest`.
    """
    import torch
    from safetensors import safe_open

    verify_digest(path, digest)
    with safe_open(path, framework="pt", device="cpu") as tensors:  # mapped, not read
        model.load_weights((name, tensors.get_tensor(name)) for name in tensors.keys())  # noqa: SIM118
    if device.type != "cpu":
        torch.accelerator.synchronize()


def require_same_model(model: JsonObject, served: object) -> None:
    """Raises: ValueError if the server has another model: vLLM keeps layers that a file does not have as they were."""
    theirs = {key: getattr(served, key, None) for key in model}
    different = [
        f"{key} is {theirs[key]!r}, not {value!r}"
        for key, value in model.items()
        if theirs[key] not in (None, value) and not (key == "rope_parameters" and _same_rope(value, served))
    ]
    if different:
        raise ValueError(f"this server has another model: {', '.join(different)}")


def _same_rope(ours: JsonObject, served: object) -> bool:
    """Whether positions turn alike, however that is written: defaults may be left out.

    Raises:
      ValueError: if the server's scaling is none that the trainer has.
    """
    theirs, positions = served.rope_parameters, served.max_position_embeddings  # type: ignore[attr-defined]
    return read_rope("the trainer", ours, positions) == read_rope("this server", theirs, positions)


def verify_digest(path: Path, digest: str) -> None:
    """Raises: ValueError if the file is not what was written."""
    from blake3 import blake3

    found = blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()
    if found != digest:
        raise ValueError(f"{path}: digest {found}, not {digest}; the file was damaged on its way")


class Scope(TypedDict):
    """What is used of an ASGI connection's scope."""

    type: str
    method: str  # of HTTP
    path: str
    headers: Iterable[tuple[bytes, bytes]]


Receive = Callable[[], Awaitable[Mapping[str, object]]]
Send = Callable[[Mapping[str, object]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Guard:
    """Requires VLLM_API_KEY on every route but /health; vLLM's own middleware guards only those that generate.

    ASGI, by `--middleware jaxrl.sampling.vllm_plugin.Guard`. Without a key in the environment it rejects everything.

    It also keeps runs apart, which would overwrite each other's weights: the first whose requests have the header RUN
    owns the server, until it gives it back or has sent none for SILENCE seconds. Requests of other runs are rejected
    (HTTP 423). OWNER answers who owns it; DELETE gives it back.
    """

    def __init__(self, app: App, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._clock = app, clock
        self._key = os.environ.get("VLLM_API_KEY", "").encode()
        self._owner, self._seen = "", clock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = None if scope["type"] == "lifespan" or scope["path"] == "/health" else self._answer(scope)
        if not answer:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": answer[0], "headers": []})
            await send({"type": "http.response.body", "body": answer[1].encode()})
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _answer(self, scope: Scope) -> tuple[int, str] | None:
        """Status and body of what is answered here; None passes the request on."""
        headers = dict(scope["headers"])
        run = headers.get(RUN.encode(), b"").decode("latin-1")
        if not self._has_key(headers):
            return 401, "this server wants its run's API key"
        owned = self._claim(run)
        if scope["path"] == OWNER:
            return 200, self._show(run, scope.get("method", ""))
        return None if owned else (423, self._owner)

    def _has_key(self, headers: Mapping[bytes, bytes]) -> bool:
        given = headers.get(b"authorization", b"")
        return bool(self._key) and hmac.compare_digest(given, b"Bearer " + self._key)

    def _claim(self, run: str) -> bool:
        """Whether this run may go on; requests without the header may, such as those for metrics."""
        now = self._clock()
        if run and (self._owner in ("", run) or now > self._seen + SILENCE):
            self._owner, self._seen = run, now
        return run in ("", self._owner)

    def _show(self, run: str, method: str) -> str:
        if method == "DELETE" and run == self._owner:
            self._owner = ""
        silent = self._clock() - self._seen
        return json.dumps({"server": os.environ.get(IDENTITY, ""), "owner": self._owner, "silent": silent})
