"""Arrays on meshes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl.parallel import mesh
from jaxrl.telemetry.profile import Compilations


def test_a_published_copy_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    compilations = Compilations()
    over = NamedSharding(mesh.make_mesh(), P(mesh.make_mesh().axis_names))
    params = {"w": jax.device_put(jnp.arange(24.0).reshape(8, 3), over)}
    first = mesh.local_copy(params, "bfloat16")
    assert compilations.new()
    again = mesh.local_copy(params, "bfloat16")
    assert not compilations.new()
    for copy in (first, again):
        np.testing.assert_array_equal(copy["w"], params["w"].astype("bfloat16"))
