"""The array type of annotations. A shape and a dtype are written around it: Float32[Array, "G M N"] (jaxtyping)."""

from __future__ import annotations

from typing import TypeAlias

import jax
import numpy as np

Array: TypeAlias = np.ndarray | jax.Array  # on the host or on devices
