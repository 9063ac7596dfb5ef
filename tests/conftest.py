"""Settings of every test: one thread per library, no network, eight virtual devices, no silent broadcasting.

The devices are set in this process only: a program that a test starts sees the machine as it is.
"""

import os
import signal
from pathlib import Path

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.update(
    HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1"
)
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)  # arrays without a mesh still lie on the first one
jax.config.update("jax_numpy_rank_promotion", "raise")

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook(["jaxrl.grpo", "jaxrl.models"], "shapes.check")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tries", type=int, default=30, help="faults of the chaos test")
    parser.addoption("--seed", type=int, default=0, help="of its random order")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model as a Hugging Face folder, see `tiny_run.make_base`; the compilation cache lies beside it."""
    import tiny_run

    return tiny_run.make_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="session")
def uninterrupted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run that nothing happened to; see `tiny_run.write_recipe`."""
    import tiny_run

    folder = tmp_path_factory.mktemp("uninterrupted")
    tiny_run.finish("train", tiny_run.write_recipe(folder, base))
    return folder / "run"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> object:
    """See `tiny.tiny_tokenizer`."""
    from tiny import tiny_tokenizer

    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
