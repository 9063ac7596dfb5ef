"""The decoder (decoder.py), attention over packed tokens (attention.py), Hugging Face folders (hf.py)."""

from jaxrl.models.decoder import Config, forward, initialize
from jaxrl.models.hf import Model, load, save

__all__ = ["Config", "Model", "forward", "initialize", "load", "save"]
