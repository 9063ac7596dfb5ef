"""The commands of the command line, one a file; `jaxrl eval` is evals/command.py."""
