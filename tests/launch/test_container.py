"""launch/Dockerfile, built without a daemon by buildah on a Debian by debootstrap, and a step of training in it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import tiny_run

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
USER = 1234  # one that the image does not know
HOST_SETTINGS = ("/etc/ssl/certs", "/etc/pip.conf")  # of whoever stands between this machine and packages


def buildah(*args: object, check: bool = True) -> str:
    environment = os.environ | {"BUILDAH_ISOLATION": "chroot", "STORAGE_DRIVER": "vfs"}
    ran = subprocess.run(["buildah", *map(str, args)], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0 or not check, ran.stderr
    return ran.stdout.strip()


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    system = tmp_path_factory.mktemp("debian") / "root"
    packages = "--include=python3,python3-venv,ca-certificates"
    call = ["debootstrap", "--variant=minbase", packages, "bookworm", system]
    subprocess.run(call, check=True, capture_output=True)
    empty = buildah("from", "scratch")
    buildah("add", "-q", empty, system, "/")
    base = buildah("commit", "-q", "--rm", empty)
    volumes = [f"--volume={path}:{path}:ro" for path in HOST_SETTINGS if Path(path).exists()]
    what = ["--build-arg", f"BASE={base}", "--target", "cpu", "-f", ROOT / "launch" / "Dockerfile", ROOT]
    made = buildah("bud", "-q", "--network", "host", *volumes, *what)
    working = buildah("from", made)
    yield working
    buildah("rm", working)
    buildah("rmi", "-f", made, base, check=False)


def test_a_user_whom_the_image_does_not_know_trains(container: str, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "given"
    model = shutil.copytree(base, folder / "model")
    recipe = tiny_run.write_recipe(folder, model, **{"run.steps": 1, "run.compilation_cache": ""})
    recipe.write_text(recipe.read_text().replace(str(folder), "/given"))
    for path in (folder, *folder.rglob("*")):
        os.chown(path, USER, USER)
    in_it = ["run", "--user", USER, f"--volume={folder}:/given", container, "--"]
    said = buildah(*in_it, "jaxrl", "train", "/given/recipe.toml")
    assert "step 1/1" in said
    assert (folder / "run" / "checkpoints" / "1").is_dir()


def test_the_image_is_complete(container: str) -> None:
    assert "demo" in buildah("run", container, "--", "jaxrl", "recipes")
    assert "devices" in buildah("run", container, "--", "jaxrl", "doctor", check=False)
    assert buildah("inspect", "--format", "{{.OCIv1.Config.Entrypoint}}", container) == "[jaxrl]"
