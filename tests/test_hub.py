"""What `jaxrl export --push` sends, to a stand-in for the Hub that huggingface_hub itself talks to."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

import tiny_run
from jaxrl import config, hub
from jaxrl.errors import BAD_INPUT, TRY_AGAIN
from json_server import JsonHandler, serving


class Hub(ThreadingHTTPServer):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.created = list[dict[str, object]]()
        self.stored = dict[str, bytes]()  # by SHA-256
        self.files = dict[str, bytes]()
        self.refuses = 0


class Handler(JsonHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.server.refuses:
            self.reply(self.server.refuses, {"error": "no"})
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.reply(200, {"url": f"{self.server.url}/me/sums", "name": "me/sums"})
        elif self.path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
        elif self.path == "/api/models/me/sums/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            large = (".safetensors", ".png")
            modes = [(name, "lfs" if name.endswith(large) else "regular") for name in names]
            files = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes]
            self.reply(200, {"files": files})
        elif self.path == "/me/sums.git/info/lfs/objects/batch":
            objects = [
                each | {"actions": {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self.reply(200, {"transfer": "basic", "objects": objects})
        else:
            assert self.path == "/api/models/me/sums/commit/main"
            for entry in map(json.loads, body.splitlines()):
                value = entry["value"]
                if entry["key"] == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    self.server.files[value["path"]] = self.server.stored[value["oid"]]
            self.reply(200, {"commitUrl": f"{self.server.url}/me/sums/commit/1", "commitOid": "1"})

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.stored[hashlib.sha256(body).hexdigest()] = body
        self.reply(200, {})


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    tiny_run.finish("train", tiny_run.write_recipe(folder, base, **{"run.steps": 2}))
    return folder / "run"


@pytest.fixture
def there() -> Iterator[Hub]:
    with serving(Hub()) as server:
        yield server


def export(run: Path, server: Hub, *options: str) -> tuple[int, str]:
    """Status and output of the command; the Hub is the stand-in."""
    more = {"HF_ENDPOINT": server.url, "HF_TOKEN": "hf_x", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    process = tiny_run.jaxrl("export", run, "--push", "me/sums", *options, **more)
    output, _ = process.communicate(timeout=200)
    return process.returncode, output


def test_a_repository_has_model_card_recipe_and_curves(run: Path, there: Hub) -> None:
    status, output = export(run, there)
    assert status == 0 and f"-> {there.url}/me/sums" in output, output
    (made,) = there.created
    assert made.get("private") is True or made.get("visibility") == "private"  # by version of huggingface_hub
    assert (made["organization"], made["name"]) == ("me", "sums")
    for path in (run / "hf").iterdir():
        assert there.files.pop(path.name) == path.read_bytes()
    card = there.files.pop("README.md").decode()
    assert there.files == {
        "recipe.toml": (run / "recipe.toml").read_bytes(),
        "training.png": (run / "report" / "training.png").read_bytes(),
    }
    _, head, text = card.split("---\n", 2)
    about = yaml.safe_load(head)
    assert about["library_name"] == "transformers" and "grpo" in about["tags"]
    assert "base_model" not in about and "datasets" not in about  # neither is on the Hub
    assert "# sums" in text and "after 2 steps" in text and "![training.png](training.png)" in text
    assert "| `rollout.prompts` | 256 | 8 |" in text and "run.directory" not in text
    assert "reward/accuracy" in text


def test_a_dry_run_shows_it_and_sends_nothing(run: Path, there: Hub) -> None:
    status, output = export(run, there, "--dry-run")
    assert status == 0 and "would send to me/sums (private" in output
    assert all(f"  {name}\n" in output for name in ("model.safetensors", "README.md", "recipe.toml"))
    assert "library_name: transformers" in output and there.created == []


@pytest.mark.parametrize(
    ("refuses", "status", "said"),
    [(403, BAD_INPUT, "is HF_TOKEN allowed to write there?"), (503, TRY_AGAIN, "the Hub answered 503")],
)
def test_a_refusal_is_one_line(refuses: int, status: int, said: str, run: Path, there: Hub) -> None:
    there.refuses = refuses
    found, output = export(run, there)
    assert found == status and "Traceback" not in output
    assert said in output.splitlines()[-1] and output.splitlines()[-1].startswith("jaxrl: --push me/sums")


def test_the_card_names_what_is_on_the_hub() -> None:
    changes = {"data": {"sources": [{"path": "org/a"}, {"path": "/here/b.jsonl"}]}}
    card = hub.model_card(config.from_dict(changes), 7, "me/sums", "", [])
    about = yaml.safe_load(card.split("---\n")[1])
    assert about["base_model"] == "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B" and about["datasets"] == [
        "org/a"
    ]
