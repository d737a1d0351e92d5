#!/usr/bin/env bash
# Commands that launch/tpu_pod.sh runs on every TPU VM:
#   tpu_worker.sh setup [NFS]             install this checkout, mount NFS at /mnt/aim
#   tpu_worker.sh start PROGRAM OPTIONS   start the training unless it is running
#   tpu_worker.sh wait                    show its log until it ends, and return its exit code
#   tpu_worker.sh stop                    send SIGTERM: the training saves and exits
# The training is independent of the connection: a broken connection neither ends nor restarts it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
run=${AIM_JAX_RUN:-$HOME/aim_jax_run}  # outside the checkout, which setup replaces
mkdir -p "$run"

# Exit code for errors that a restart cannot fix (gcloud and ssh use 1 and 255 for their own errors).
final=3

setup() {
  # The VMs have Python 3.10.
  python3 -m pip install --quiet --user uv || return
  local uv=$HOME/.local/bin/uv
  "$uv" venv --quiet --allow-existing --python 3.12 .venv || return
  "$uv" pip install --quiet --python .venv --constraint constraints.txt --editable '.[tpu]' || return
  if [[ -n ${1-} ]] && ! mountpoint --quiet /mnt/aim; then
    sudo apt-get install --yes -qq nfs-common || return
    sudo mkdir -p /mnt/aim || return
    sudo mount -t nfs "$1" /mnt/aim || return
  fi
}

# The training holds $run/lock while it runs. Unlike a process id, the lock stays valid after a reboot.
case ${1-} in
  setup)
    shift
    setup "$@" || { echo "error: the setup of $HOSTNAME failed; see the messages above." >&2; exit "$final"; }
    ;;
  start)
    shift
    exec 9> "$run/lock"
    flock --nonblock 9 || { echo "$HOSTNAME: already running"; exit 0; }
    rm -f "$run/status"
    # shellcheck disable=SC2016  # expanded by the inner shell
    setsid bash -c '
      run=$1
      shift
      "$@" 9>&- &
      echo $! > "$run/pid"
      status=0
      wait $! || status=$?
      echo $status > "$run/status"
    ' - "$run" .venv/bin/python -m aim_jax "$@" < /dev/null > "$run/log" 2>&1 &
    echo "$HOSTNAME: started"
    ;;
  wait)
    tail -n +1 --sleep-interval=0.1 -F "$run/log" 2> /dev/null &
    flock "$run/lock" true
    sleep 0.3  # let tail print the last lines
    kill $!
    status=$(cat "$run/status") || { echo "error: the training on $HOSTNAME was killed." >&2; exit 137; }
    case $status in 1 | 2) status=$final ;; esac
    exit "$status"
    ;;
  stop)
    flock --nonblock "$run/lock" true && { echo "$HOSTNAME: no training is running"; exit 0; }
    kill -TERM "$(cat "$run/pid")"
    flock --timeout 300 "$run/lock" true
    ;;
  *)
    echo "error: unknown command '${1-}'; expected setup, start, wait or stop." >&2
    exit "$final"
    ;;
esac
