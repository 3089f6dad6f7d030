#!/usr/bin/env bash
# Trains on a TPU VM or a pod slice: creates it or uses the existing one, installs, starts the run on all workers, shows
# its log here, and resumes the run after the VM has been preempted. Needs gcloud, logged in.
#
# The run does not need this machine: when it sleeps or loses its connection, the run goes on, and the same command
# shows its log again. Only a new VM in the place of a preempted one needs this script to be at work.
#
# usage: launch/tpu_vm.sh [--dry-run] run NAME --config=RECIPE [--config.KEY=VALUE ...]
#        launch/tpu_vm.sh [--dry-run] follow NAME     shows the log again
#        launch/tpu_vm.sh [--dry-run] delete NAME
#
#   BUCKET=gs://mine/cskd launch/tpu_vm.sh run first --config=configs/cifar100.py
#   BUCKET=gs://mine/cskd ZONE=us-west4-a TYPE=v5litepod-8 launch/tpu_vm.sh run first --config=configs/cifar100.py   # v5e
#   BUCKET=gs://mine/cskd ZONE=us-east5-b TYPE=v6e-8 launch/tpu_vm.sh run first --config=configs/cifar100.py
#
# Environment:
#   BUCKET    where the workdir of NAME is kept, and the data and compiled programs of all runs (needed by run; copied
#             every minute)
#   ZONE      (us-central2-b) a zone that has the type; `gcloud compute tpus accelerator-types list --zone=ZONE`
#   TYPE      (v4-8) type of accelerator, as Google writes it: v5e is v5litepod-CHIPS, v6e is v6e-CHIPS, but the number
#             of v4 and v5p counts two cores for each chip
#   VERSION   image of the VM. Each generation has its own, which is chosen by TYPE: v2-alpha-tpuv5-lite for v5e,
#             v2-alpha-tpuv5 for v5p, v2-alpha-tpuv6e for v6e, tpu-ubuntu2204-base for v4 and older. A VM with the
#             image of another generation starts, but finds no TPU.
#   SPOT      (1) a preemptible VM; 0: one that is not
#   QUEUED    (0) 1: requests it as a queued resource of the same name, which waits for capacity, for days if need be;
#             otherwise the request fails while there is no capacity. For v5e and v6e Google advises the queue.
#   ATTEMPTS  (20) how often to try what fails before giving up; DELAY (30): seconds between them
#   WORKER    (0) whose log follow shows; only one of them speaks, unless something fails: on some slices another
#
# With --dry-run the commands are printed, as for a VM that is not there yet. The VM is not deleted at the end.
# Exit codes: of the run, as cskd_jax.supervise ends it (0 done); 1 if there is no VM or no connection, or if the results
# could not be copied to BUCKET.
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
[[ $# -ge 2 && $1 =~ ^(run|follow|delete)$ ]] || usage
action=$1 name=$2
if [[ $name == data || $name == cache ]]; then
  echo "error: a run cannot be named $name, because $name in BUCKET belongs to all runs" >&2
  exit 2
fi
shift 2
zone=${ZONE:-us-central2-b} type=${TYPE:-v4-8} queued=${QUEUED:-0} attempts=${ATTEMPTS:-20} delay=${DELAY:-30}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
case $type in
  v5litepod-*) version=v2-alpha-tpuv5-lite ;;
  v5p-*) version=v2-alpha-tpuv5 ;;
  v6e-*) version=v2-alpha-tpuv6e ;;
  *) version=tpu-ubuntu2204-base ;;
esac
version=${VERSION:-$version}

tpus() {
  local command=(gcloud compute tpus "$1" "$2" --zone="$zone" "${@:3}")
  if $dry_run; then
    printf '%q ' "${command[@]}"
    echo
  else
    "${command[@]}"
  fi
}

# Prints the state of the VM, or of the queue while it is not through; nothing if there is none.
state() {
  local found=ACTIVE
  $dry_run && return
  if [[ $queued == 1 ]]; then
    found=$(tpus queued-resources describe "$name" --format='value(state.state)' 2>/dev/null || true)
  fi
  if [[ $found == ACTIVE ]]; then
    found=$(tpus tpu-vm describe "$name" --format='value(state)' 2>/dev/null || true)
  fi
  echo "$found"
}

request() {
  local options=(--accelerator-type="$type")
  [[ ${SPOT:-1} == 1 ]] && options+=(--spot)
  if [[ $queued == 1 ]]; then
    tpus queued-resources create "$name" --node-id="$name" --runtime-version="$version" "${options[@]}"
  else
    tpus tpu-vm create "$name" --version="$version" "${options[@]}"
  fi
}

remove() {
  if [[ $queued == 1 ]]; then
    tpus queued-resources delete "$name" --force --quiet
  else
    tpus tpu-vm delete "$name" --quiet
  fi
}

# Waits until the VM is ready, and replaces one that was preempted. Waiting in any other state is not a failed attempt;
# a VM that somebody has stopped is left alone.
create() {
  local failures=0 found
  while true; do
    found=$(state)
    case $found in
      PREEMPTED | TERMINATED | FAILED | SUSPENDED)
        remove || true
        found=
        ;;
      STOPPED)
        echo "error: TPU VM $name is stopped: start it with gcloud compute tpus tpu-vm start $name --zone=$zone, or" \
          "remove it with $0 delete $name" >&2
        exit 1
        ;;
    esac
    if [[ -z $found ]]; then
      if ! request; then
        ((++failures < attempts)) || break
      elif $dry_run; then
        return
      fi
      found=$(state)
    fi
    [[ $found == READY ]] && return
    sleep "$delay"
  done
  echo "error: no TPU VM after $attempts attempts" >&2
  exit 1
}

# The connection notices within two minutes that it is lost.
on_worker() {
  local worker=$1
  shift
  tpus tpu-vm ssh "$name" --worker="$worker" --ssh-flag='-o ServerAliveInterval=30' \
    --command="cskd_jax/launch/tpu_worker.sh $(printf '%q ' "$@")"
}

# Prints "runs", the exit code of the run, "none", or nothing without a connection.
status() {
  $dry_run || on_worker 0 status "$name" 2>/dev/null | tail --lines=1 || true
}

# Commands are joined by &&, because set -e has no effect where the caller uses the code. uv brings a Python, because
# that of the image is older than the package allows.
install() {
  local archive
  archive=$(mktemp) &&
    tar -czf "$archive" -C "$here" cskd_jax configs launch setup.cfg pyproject.toml README.md LICENSE &&
    tpus tpu-vm ssh "$name" --worker=all --command='mkdir -p cskd_jax' &&
    tpus tpu-vm scp "$archive" "$name:cskd_jax/source.tar.gz" --worker=all &&
    rm "$archive" &&
    tpus tpu-vm ssh "$name" --worker=all --command='set -e; cd cskd_jax; tar -xzf source.tar.gz
curl -LsSf https://astral.sh/uv/install.sh | sh
~/.local/bin/uv venv --quiet --allow-existing --python 3.12 .venv
~/.local/bin/uv pip install --quiet --python .venv/bin/python "jax[tpu]" -e .'
}

# Shows the log until the run has ended, and ends with its code; returns if the VM or the run on it is gone.
follow() {
  local lost=0 found
  while true; do
    on_worker "${WORKER:-0}" follow "$name" || true
    $dry_run && exit 0
    found=$(status)
    [[ $found =~ ^[0-9]+$ ]] && exit "$found"
    if [[ $found == runs ]]; then
      lost=0
    elif [[ $found == none || $(state) != READY ]]; then
      return 0
    else
      ((++lost < attempts)) || exit 1
    fi
    sleep "$delay"
  done
}

case $action in
  delete)
    remove
    exit
    ;;
  follow)
    follow
    echo "error: no run $name on a TPU VM in $zone" >&2
    exit 1
    ;;
esac
: "${BUCKET:?must name where the workdir is kept, such as gs://mine/cskd}"
for ((start = 1; start <= attempts; start++)); do
  create
  if [[ $(status) != runs ]]; then
    code=0
    { install && on_worker all start "$name" "$BUCKET" "$@"; } || code=$?
    if [[ $code != 0 && $(state) == READY ]]; then
      exit "$code"
    fi
  fi
  follow
  echo "the run is gone (TPU VM: $(state)); restarting it from what is in $BUCKET/$name" >&2
done
exit 1
