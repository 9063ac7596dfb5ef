"""The public names of `jaxrl`, and the page that documents them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxrl
from jaxrl.models import Config, initialize

PAGE = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
HEAVY = ("jax", "flax", "numpy", "optax", "orbax", "transformers")


def test_importing_the_package_loads_nothing_heavy() -> None:
    program = f"import sys, jaxrl; print(*sorted(set({HEAVY}) & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == []


@pytest.mark.parametrize("name", jaxrl.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(jaxrl, name) is not None


def test_names_are_imported_as_they_are_listed() -> None:
    assert sorted(jaxrl.__all__) == sorted(jaxrl._PUBLIC)


def test_another_name_is_an_attribute_error() -> None:
    name = "nothing"
    with pytest.raises(AttributeError, match=name):
        getattr(jaxrl, name)


def test_the_page_documents_every_name_once() -> None:
    documented = re.findall(r"^::: jaxrl\.(\w+)$", PAGE, re.MULTILINE)
    assert sorted(documented) == sorted(jaxrl.__all__)


def test_the_page_updates_on_a_batch_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp_width": 48}
    more = {"vocab_size": 9, "rope_theta": 1e4, "norm_epsilon": 1e-6, "tied": True, "max_positions": 64}
    config = Config(family="qwen2", **sizes, **more)  # type: ignore[arg-type]
    before = jaxrl.Model(config, initialize(config, seed=0))
    jaxrl.save_model(before, "runs/demo/base")
    names: dict[str, Any] = {}
    exec(next(block for block in EXAMPLES if "make_update" in block), names)
    prompt, (better, worse) = names["prompt"], names["answers"]

    def margin(model: jaxrl.Model) -> float:
        """How much likelier the better answer is, in nats; the second token of the answers is all that differs."""
        logits = model.logits(model.params, np.concatenate([prompt.tokens, better[:1]]))[-1]
        return float(logits[better[1]] - logits[worse[1]])

    assert margin(jaxrl.load_model("runs/mine")) > margin(before)
