"""Weights from a file, inside vLLM's processes: `--weight-transfer-config '{"backend": "jaxrl_file"}'`.

vLLM finds `register` as an entry point of "vllm.general_plugins" in whatever environment it runs; there is torch there
and no JAX. The engine follows vLLM's own update protocol (start, update, finish), so tensor parallelism, compiled
graphs and prepacked weights are vLLM's business: it is given Hugging Face's names, a whole checkpoint at a time.
"""

from __future__ import annotations

import dataclasses
import hmac
import os
from pathlib import Path


def register() -> None:
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )

    @dataclasses.dataclass
    class Model(WeightTransferInitInfo):
        model: dict  # the trainer's, as config.json has it

    @dataclasses.dataclass
    class File(WeightTransferUpdateInfo):
        path: str = ""  # a safetensors file that this process can read
        blake3: str = ""  # its digest

    class FileEngine(WeightTransferEngine):
        init_info_cls, update_info_cls = Model, File

        def init_transfer_engine(self, init_info) -> None:
            same(init_info.model, self.model_config.hf_config)

        def start_weight_update(self) -> None:
            from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

            initialize_layerwise_reload(self.model)

        def update_weights(self, update_info: dict) -> None:
            # the base class synchronizes an accelerator, which a CPU has not
            self.receive_weights(self.parse_update_info(update_info))

        def receive_weights(self, file) -> None:
            import torch
            from safetensors import safe_open

            check(Path(file.path), file.blake3)
            with safe_open(file.path, framework="pt", device="cpu") as tensors:  # mapped, not read
                self.model.load_weights((name, tensors.get_tensor(name)) for name in tensors.keys())  # noqa: SIM118
            if self.device.type != "cpu":
                torch.accelerator.synchronize()

        def finish_weight_update(self) -> None:
            from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

            finalize_layerwise_reload(self.model, self.model_config)
            # a CPU multiplies by a packed copy of the weights; a tied LM head's is of the old embedding, as no weight
            # came under its name
            if self.device.type == "cpu" and self.model_config.hf_config.tie_word_embeddings:
                self.model.lm_head.quant_method.process_weights_after_loading(self.model.lm_head)

        def shutdown(self) -> None:
            pass

    WeightTransferEngineFactory.register_engine("jaxrl_file", FileEngine)


def same(model: dict, served: object) -> None:
    """Raises: ValueError if this is another model: vLLM keeps a layer that is missing in a file as it was."""
    theirs = {key: getattr(served, key, None) for key in model}
    different = [
        f"{key} is {theirs[key]!r}, not {value!r}"
        for key, value in model.items()
        if theirs[key] not in (None, value)
    ]
    if different:
        raise ValueError(f"this server has another model: {', '.join(different)}")


def check(path: Path, digest: str) -> None:
    """Raises: ValueError if the file is not what was written."""
    from blake3 import blake3

    found = blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()
    if found != digest:
        raise ValueError(f"{path}: digest {found}, not {digest}; the file was damaged on its way")


class Guard:
    """Asks for VLLM_API_KEY on every route but /health; vLLM's own middleware knows only those that generate.

    ASGI, by `--middleware jaxrl.sampling.vllm_plugin.Guard`. Without a key nobody is let in.
    """

    def __init__(self, app):
        self._app = app
        self._key = os.environ.get("VLLM_API_KEY", "").encode()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan" or scope["path"] == "/health" or self._knows(scope["headers"]):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b"this server wants its run's API key"})
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _knows(self, headers) -> bool:
        given = dict(headers).get(b"authorization", b"")
        return bool(self._key) and hmac.compare_digest(given, b"Bearer " + self._key)
