"""The benchmarks and their grader. Importing this package loads nothing heavy."""

from evals.grade import grade

__all__ = ["grade"]
