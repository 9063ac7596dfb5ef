"""jaxrl: GRPO for reasoning models in JAX. Importing this package loads nothing heavy."""

__version__ = "0.1.0"
