"""What `pip install .` installs, used from another folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parents[1]
PACKAGES = ("jaxrl", "evals", "recipes")


def sources() -> set[str]:
    """The files of the packages, without what Python and others put beside them."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    return {str(path.relative_to(ROOT)) for path in files if "cache" not in str(path.relative_to(ROOT))}


def test_a_wheel_has_all_files_and_works_from_any_folder(tmp_path: Path) -> None:
    for name in (*sources(), "pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / "source" / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, tmp_path / "source"]
    subprocess.run(build, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert {name for name in ZipFile(wheel).namelist() if "dist-info" not in name} == sources()

    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    where = "import jaxrl, sys; from jaxrl.cli import main; print(jaxrl.__file__); main(sys.argv[1:])"
    call = [sys.executable, "-c", where, "recipes", "show", "demo"]
    ran = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    file, _, shown = ran.stdout.partition("\n")
    assert Path(file) == tmp_path / "site" / "jaxrl" / "__init__.py"
    assert shown == (ROOT / "recipes" / "demo.toml").read_text()
