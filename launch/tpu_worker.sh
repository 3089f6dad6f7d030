#!/usr/bin/env bash
# What launch/tpu_vm.sh runs on the workers of a TPU VM, where it has unpacked the package.
#
# usage: launch/tpu_worker.sh start NAME BUCKET --config=RECIPE ...   starts the run, which needs nobody connected
#        launch/tpu_worker.sh follow NAME    shows its log from the beginning, until it ends
#        launch/tpu_worker.sh status NAME    prints "runs", its exit code when it has ended, or "none"
#
# The log, the exit code and the number of the process are in state/NAME.
set -uo pipefail

[[ $# -ge 2 && $1 =~ ^(start|follow|status|work)$ ]] || {
  sed -n '/^# usage/,/^set/p' "$0" | sed '$d; s/^# \{0,1\}//' >&2
  exit 2
}
action=$1 name=$2
shift 2
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
state=state/$name
mkdir -p "$state"

is_running() {
  ! flock --nonblock "$state/lock" true
}

work() {
  local bucket=$1 workdir=runs/$name folder copying code
  shift
  # Prepared data and compiled programs outlive a VM that is preempted, and serve other runs of the bucket.
  export TFDS_DATA_DIR=$PWD/data XDG_CACHE_HOME=$PWD/cache
  # One process alone writes the workdir, and its worker brings to the bucket what is new. Which one it is follows from
  # the topology of the slice. Fails if the workdir could not be copied; data and programs can be made again.
  keep() {
    local status=0
    [[ -n $(find "$workdir" -type f -newer "$state/started" -print -quit) ]] || return 0
    # Nothing is deleted before everything new is there: the machine may be gone at any time.
    gcloud storage rsync --recursive "$workdir" "$bucket/$name" &&
      gcloud storage rsync --recursive --delete-unmatched-destination-objects "$workdir" "$bucket/$name" || status=1
    for folder in data cache; do
      gcloud storage rsync --recursive --exclude='.*\.(incomplete|part).*' $folder "$bucket/$folder"
    done
    return "$status"
  }
  # When it is told to end, a copy that is being made is finished first, because two at a time could undo each other.
  keep_every_minute() {
    trap exit TERM
    while true; do
      sleep 60 &
      wait $!
      keep
    done
  }
  # The file gives the first copy something to copy, so that any failure is a real one. What is newer here, because it
  # could not be copied to the bucket, is kept.
  fetch() {
    mkdir -p "$2"
    : | gcloud storage cp - "$bucket/$1/lock" &&
      gcloud storage rsync --recursive --skip-if-dest-has-newer-mtime "$bucket/$1" "$2"
  }
  fetch data data && fetch cache cache || return 1
  fetch "$name" "$workdir" || return 1
  touch "$state/started"
  keep_every_minute >/dev/null 2>&1 &
  copying=$!
  .venv/bin/python -m cskd_jax.supervise -- .venv/bin/python -m cskd_jax.main --cluster --workdir="$workdir" "$@"
  code=$?
  kill "$copying"
  wait "$copying"
  if ! keep; then
    echo "error: $workdir could not be copied to $bucket/$name; its last state is only on this VM" >&2
    [[ $code == 0 ]] && code=1
  fi
  return "$code"
}

case $action in
  start)
    if ! is_running; then
      rm -f "$state/code" "$state/pid"
      # A session of its own: that of ssh ends when the laptop sleeps.
      setsid flock --close "$state/lock" launch/tpu_worker.sh work "$name" "$@" >"$state/log" 2>&1 </dev/null &
      until [[ -e $state/pid ]]; do sleep 0.1; done
    fi
    ;;
  work)
    echo $$ >"$state/pid"
    work "$@"
    echo $? >"$state/code"
    ;;
  follow)
    tail --lines=+1 --follow --pid="$(cat "$state/pid")" "$state/log"
    ;;
  status)
    if is_running; then
      echo runs
    else
      cat "$state/code" 2>/dev/null || echo none
    fi
    ;;
esac
