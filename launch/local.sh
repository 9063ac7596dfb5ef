#!/usr/bin/env bash
# A run on this host: launch/local.sh OPTIONS RECIPE [--section.key value ...]
#
#   launch/local.sh --trainer-gpus 4 --sampler-gpus 4 recipe.toml
#   launch/local.sh --trainer-processes 2 --devices 2 --samplers 2 recipe.toml     # on the CPU
#
# launch/local.sh --help lists the options; --dry-run prints the commands. PYTHON= is the trainer's (.venv/bin/python).
set -euo pipefail
exec "${PYTHON:-.venv/bin/python}" "$(dirname "$0")/entry.py" \
  --trainer-hosts 127.0.0.1 --sampler-hosts 127.0.0.1 --here 127.0.0.1 "$@"
