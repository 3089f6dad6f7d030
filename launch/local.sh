#!/usr/bin/env bash
# Trains with several processes of this machine, under the supervisor, to try what a cluster will do.
#
# usage: launch/local.sh [--dry-run] PROCESSES --config=RECIPE [--workdir=DIR] [--config.KEY=VALUE ...]
#
#   launch/local.sh 2 --config=configs/digits.py
#
# Environment: DEVICES, fake CPU devices of each process (default 1); PYTHON (default python); JAX_PLATFORMS (default
# cpu: one process drives all GPUs of a machine and needs no launcher). Exit codes: those of cskd_jax.supervise.
set -euo pipefail

usage() {
  sed -n '/^# usage/,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2
  exit 2
}

run=()
if [[ ${1:-} == --dry-run ]]; then
  run=(echo)
  shift
fi
[[ ${1:-} =~ ^[1-9][0-9]*$ && $# -ge 2 ]] || usage
processes=$1
shift
# The package beside this script, installed or not.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}
"${run[@]}" exec env \
  JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" \
  XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${DEVICES:-1}" \
  PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" \
  "$python" -m cskd_jax.supervise --processes="$processes" -- "$python" -m cskd_jax.main "$@"
