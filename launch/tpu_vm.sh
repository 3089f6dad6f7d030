#!/usr/bin/env bash
# Trains on a TPU VM or a pod slice: creates it or takes the one that is there, installs, runs on all workers with
# their output here, and starts again where the run stopped when the VM was preempted. Needs gcloud, logged in.
#
# usage: launch/tpu_vm.sh [--dry-run] run NAME --config=RECIPE [--config.KEY=VALUE ...]
#        launch/tpu_vm.sh [--dry-run] delete NAME
#
#   BUCKET=gs://mine/cskd launch/tpu_vm.sh run first --config=configs/cifar100.py
#
#   v5e: ZONE=us-west4-a TYPE=v5litepod-8 VERSION=v2-alpha-tpuv5-lite
#   v6e: ZONE=us-east5-b TYPE=v6e-8 VERSION=v2-alpha-tpuv6e
#
# Environment: BUCKET, where the workdir of NAME is kept (needed by run; copied every minute); ZONE (default
# us-central2-b), TYPE (v4-8), VERSION of the image (tpu-ubuntu2204-base), SPOT (1: a preemptible one; 0), ATTEMPTS
# (20: how often to create a VM before giving up), DELAY (30: seconds between them).
#
# With --dry-run the commands are printed, as for a VM that is not there yet. The VM is not deleted at the end.
# Exit codes: of gcloud for the run (0 done).
set -euo pipefail

usage() {
  sed -n '/^# usage/,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2
  exit 2
}

dry_run=false
if [[ ${1:-} == --dry-run ]]; then
  dry_run=true
  shift
fi
[[ $# -ge 2 && ($1 == run || $1 == delete) ]] || usage
action=$1 name=$2
shift 2
zone=${ZONE:-us-central2-b}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

tpu() {
  local command=(gcloud compute tpus tpu-vm "$1" --zone="$zone" "${@:2}")
  if $dry_run; then
    printf '%q ' "${command[@]}"
    echo
  else
    "${command[@]}"
  fi
}

state() {
  if ! $dry_run; then
    gcloud compute tpus tpu-vm describe "$name" --zone="$zone" --format='value(state)' 2>/dev/null || true
  fi
}

# Until the VM is ready; one that was preempted is of no more use.
create() {
  local attempt found spot=()
  [[ ${SPOT:-1} == 1 ]] && spot=(--spot)
  for ((attempt = 1; attempt <= ${ATTEMPTS:-20}; attempt++)); do
    found=$(state)
    [[ $found == READY ]] && return
    if [[ -n $found && ! $found =~ ^(CREATING|STARTING|RESTARTING|DELETING)$ ]]; then
      tpu delete "$name" --quiet
      found=
    fi
    if [[ -z $found ]] && tpu create "$name" --accelerator-type="${TYPE:-v4-8}" \
      --version="${VERSION:-tpu-ubuntu2204-base}" "${spot[@]}"; then
      return
    fi
    sleep "${DELAY:-30}"
  done
  echo "error: no TPU VM after ${ATTEMPTS:-20} attempts" >&2
  exit 1
}

# Commands are joined by &&, because set -e has no effect where the caller uses the code. uv brings a Python, because
# that of the image is older than the package allows.
install() {
  local archive
  archive=$(mktemp) &&
    tar -czf "$archive" -C "$here" cskd_jax configs setup.cfg pyproject.toml README.md LICENSE &&
    tpu ssh "$name" --worker=all --command='mkdir -p cskd_jax' &&
    tpu scp "$archive" "$name:cskd_jax/source.tar.gz" --worker=all &&
    rm "$archive" &&
    tpu ssh "$name" --worker=all --command='set -e; cd cskd_jax; tar -xzf source.tar.gz
curl -LsSf https://astral.sh/uv/install.sh | sh
~/.local/bin/uv venv --quiet --allow-existing --python 3.12 .venv
~/.local/bin/uv pip install --quiet --python .venv/bin/python "jax[tpu]" -e .'
}

run() {
  local workdir=runs/$name arguments
  arguments=$(printf '%q ' "$@")
  # The first worker alone reads and writes the workdir; it brings it to the bucket while the run goes on, and at its end.
  tpu ssh "$name" --worker=all --command="cd cskd_jax; mkdir -p $workdir
keep() { gcloud storage rsync --recursive --delete-unmatched-destination-objects $workdir $BUCKET/$name; }
case \$(hostname) in *-w-0)
  # The file gives the first copy something to copy, so that any failure is a real one.
  : | gcloud storage cp - $BUCKET/$name/lock && gcloud storage rsync --recursive $BUCKET/$name $workdir || exit 1
  while sleep 60; do keep; done >/dev/null 2>&1 & copying=\$!
esac
.venv/bin/python -m cskd_jax.supervise -- .venv/bin/python -m cskd_jax.main --cluster --workdir=$workdir $arguments
code=\$?
if [ -n \"\${copying:-}\" ]; then kill \$copying; keep; fi
exit \$code"
}

if [[ $action == delete ]]; then
  tpu delete "$name" --quiet
  exit
fi
: "${BUCKET:?must name where the workdir is kept, such as gs://mine/cskd}"
for ((start = 1; start <= ${ATTEMPTS:-20}; start++)); do
  create
  code=0
  { install && run "$@"; } || code=$?
  # A failure on a VM that still runs is not a preemption, and the supervisor has tried again already.
  if $dry_run || [[ $code == 0 || $(state) == READY ]]; then
    exit "$code"
  fi
  echo "the TPU VM is gone ($(state)): again, from what is in $BUCKET/$name" >&2
done
exit "$code"
