"""What NCCL would refuse is refused before its first call; the libraries and servers here are no real ones."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from jaxrl.errors import InputError
from jaxrl.sampling.transports import nccl
from jaxrl.sampling.transports.nccl import NCCL, Rank
from jaxrl.sampling.vllm import VLLMSampler
from jaxrl.sampling.vllm_plugin import describe_rank
from json_server import serving
from vllm_stand_in import Nothing, Server

REAL = nccl._this_rank
OURS, GPU = 23203, str(uuid.UUID(bytes=bytes(range(16))))
# of libnccl.so.2 and libcuda.so.1: GPU i has the UUID of the bytes from i on
LIBRARIES = f"""
int ncclGetVersion(int *version) {{ *version = {OURS}; return 0; }}
const char *ncclGetErrorString(int code) {{ return "failed"; }}
int ncclCommInitRank(void) {{ return 0; }}
int cuInit(unsigned flags) {{ return 0; }}
int cuDeviceGet(int *device, int ordinal) {{ *device = ordinal; return 0; }}
int cuDeviceGetUuid_v2(unsigned char *bytes, int device) {{
  for (int i = 0; i < 16; i++) bytes[i] = device + i;
  return 0;
}}
"""


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Server]]:
    monkeypatch.setattr(Nothing, "backend", "nccl")
    monkeypatch.setattr(nccl, "_this_rank", lambda: Rank(OURS, GPU))
    with ExitStack() as stack:
        yield [stack.enter_context(serving(Server())) for _ in range(2)]


def inspect(servers: list[Server]) -> None:
    VLLMSampler([server.url for server in servers], NCCL(None)).close()  # type: ignore[arg-type]


def rank(version: int = OURS, gpu: str = "another") -> dict[str, object]:
    return {"version": version, "gpu": gpu}


@pytest.mark.parametrize(
    ("ranks", "reason"),
    [
        ([rank(), rank(22907)], r"has NCCL 2\.29\.7 and this trainer 2\.32\.3, .*; pip install .*==2\.29\.7 here"),
        ([rank(23204)], r"has NCCL 2\.32\.4 and this trainer 2\.32\.3"),
        ([rank(0)], r"has no NCCL; it needs NVIDIA GPUs, or set sampler\.transport = .files."),
        ([rank(), rank(gpu=GPU)], rf"and this trainer are on one GPU \({GPU}\), which NCCL refuses; give each its own"),
        (["22907"], r": /collective_rpc answered \{'results': \['22907'\]\}"),
        ([{"version": "22907", "gpu": GPU}], ": /collective_rpc answered"),
        ([rank() | {"gpu": []}], ": /collective_rpc answered"),
        ([], ": /collective_rpc answered"),
        (None, ": /collective_rpc answered"),
    ],
)  # fmt: skip
def test_a_server_that_nccl_would_refuse_is_refused_at_the_start(
    ranks: object, reason: str, servers: list[Server]
) -> None:
    servers[0].ranks = ranks
    with pytest.raises(InputError, match=f"{servers[0].url}:? ?{reason}"):
        inspect(servers[:1])


def test_servers_of_one_version_with_a_gpu_each_are_accepted(servers: list[Server]) -> None:
    for server in servers:
        server.ranks = [rank(gpu=server.url)]
    inspect(servers)
    servers[1].ranks = servers[0].ranks
    with pytest.raises(InputError, match=f"{servers[1].url} and {servers[0].url} are on one GPU"):
        inspect(servers)


def test_a_server_without_this_jaxrl_is_told_to_install_it(servers: list[Server]) -> None:
    servers[0].broken.add("/collective_rpc")
    with pytest.raises(InputError, match=r"/collective_rpc answered 500: .*; it needs this version of jaxrl"):
        inspect(servers[:1])


def test_no_library_is_named_at_the_start(servers: list[Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "_this_rank", REAL)
    monkeypatch.setitem(sys.modules, "nvidia.nccl", None)
    with pytest.raises(InputError, match=r"needs NVIDIA GPUs and jax\[cuda\] .*; use \"files\""):
        inspect(servers[:1])


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """The NCCL of an environment; the driver is beside it."""
    if not shutil.which("cc"):
        pytest.skip("needs a C compiler")
    path = tmp_path / "nvidia" / "nccl" / "lib" / "libnccl.so.2"
    path.parent.mkdir(parents=True)
    source = tmp_path / "libraries.c"
    source.write_text(LIBRARIES)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", path, source], check=True)
    shutil.copy(path, tmp_path / "libcuda.so.1")
    return path


def test_the_trainer_reports_the_library_that_it_loads(library: Path, tmp_path: Path) -> None:
    program = "from jaxrl.sampling.transports import nccl; print(*nccl._this_rank())"
    environment = {"PYTHONPATH": f"{tmp_path}:{':'.join(sys.path)}", "LD_LIBRARY_PATH": str(tmp_path)}
    environment |= {"JAX_PLATFORMS": "cpu"}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert ran.stdout.split() == [str(OURS), GPU], ran.stderr


def test_a_worker_reports_the_library_that_vllm_loads(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find() -> str:
        if worker.device.type == "cpu":
            raise ValueError("NCCL only supports CUDA and ROCm backends.")
        return str(library)

    module = ModuleType("vllm.utils.nccl")
    module.find_nccl_library = find  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(uuid=f"of {gpu.index}")
    )
    worker = SimpleNamespace(device=torch.device("cuda:3"))
    assert describe_rank(worker) == {"version": OURS, "gpu": "of 3"}  # type: ignore[arg-type]
    worker.device = torch.device("cpu")
    assert describe_rank(worker) == {"version": 0, "gpu": ""}  # type: ignore[arg-type]


def test_both_extras_pin_one_nccl_and_one_cudnn() -> None:
    root = Path(nccl.__file__).parents[3]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    versions = [
        sorted(name.replace(f"-cu{cuda}==", "==") for name in extras[extra] if name.startswith("nvidia-"))
        for extra, cuda in (("cuda", 12), ("cuda13", 13))
    ]
    assert versions[0] == versions[1] and all("==" in name for name in versions[0])
    cudnn, pinned = (name.partition("==")[2] for name in versions[0])
    assert f"torch ({pinned})" in (root / "docs" / "vllm.md").read_text()
    assert f"cuDNN to {cudnn}," in (root / "docs" / "performance.md").read_text()
