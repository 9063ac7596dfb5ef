#!/usr/bin/env bash
# A run on hosts reached by ssh: launch/ssh.sh HOSTFILE OPTIONS RECIPE [--section.key value ...]
#
# HOSTFILE has a line for each, as the others can reach it; the first trainer coordinates:
#
#   10.0.0.1 trainer
#   10.0.0.2 sampler
#
#   launch/ssh.sh hosts --trainer-gpus 8 --sampler-gpus 8 recipe.toml --sampler.folder /shared/weights
#
# All hosts have this folder under one path, which is the working directory. LAUNCH_SSH= replaces ssh.
set -euo pipefail
fail() { echo "launch: $1" && exit 2; }
[ $# != 0 ] || fail "usage: launch/ssh.sh HOSTFILE OPTIONS RECIPE"
hosts=$1 && shift
text=$(cat -- "$hosts" 2>&1) || fail "$text"
text=${text//$'\r'/}
those() { awk -v role="$1" '$1 !~ /^#/ && $2 == role { print $1 }' <<<"$text" | paste -sd,; }
wrong=$(awk 'NF && $1 !~ /^#/ && (NF != 2 || $2 !~ /^(trainer|sampler)$/) { print; exit }' <<<"$text")
[ -z "$wrong" ] || fail "$hosts: not a host and 'trainer' or 'sampler': $wrong"
[ -n "$(those trainer)" ] || fail "$hosts: no line names a trainer"
exec "${PYTHON:-.venv/bin/python}" "$(dirname "$0")/entry.py" \
  --ssh "${LAUNCH_SSH:-ssh -o BatchMode=yes -o ConnectTimeout=30 -o ServerAliveInterval=15}" \
  --trainer-hosts "$(those trainer)" --sampler-hosts "$(those sampler)" "$@"
