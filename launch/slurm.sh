#!/usr/bin/env bash
# One process on every node, which sees all its GPUs, CPUs and memory.
#SBATCH --job-name=aim_jax
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
# The log goes on where the job is requeued.
#SBATCH --open-mode=append
# Slurm may requeue the job by itself when a node fails or the job is preempted.
#SBATCH --requeue
# Before the time limit SIGTERM goes to the training on every node (not to this script, which would
# take a "B:"). Five minutes are enough to save to slow storage.
#SBATCH --signal=TERM@300
set -euo pipefail

usage() {
  cat <<'END'
Trains on the GPU nodes of a Slurm cluster; submitted from the checkout with sbatch.

Example:
  sbatch --nodes=4 --gpus-per-node=8 --time=24:00:00 launch/slurm.sh -- \
    --config aim_xl --workdir /shared/runs/aim_xl --config.accumulate=8 \
    --config.codes=/shared/codes/imagenet --config.tokenizer=/shared/runs/vq_f16

Usage: sbatch [OPTIONS OF SBATCH] launch/slurm.sh [OPTIONS] -- OPTIONS OF THE TRAINING

  --program NAME      what runs (train); extract_codes takes its own options
  --python FILE       its interpreter, on storage that the nodes share (.venv/bin/python)
  --max_restarts N    how often the job may be requeued (20)
  --dry_run           print the commands and run nothing; without Slurm:
                      SLURM_GPUS_ON_NODE=8 bash launch/slurm.sh --dry_run -- ...
  --help              this text

When the training saved and stopped (SIGTERM: time limit, preemption) or lost a process, the job is
requeued and goes on from the newest checkpoint. Exit codes: docs/clusters.md.
END
}

fail() {
  echo "error: $1" >&2
  exit 1
}

program=train python=.venv/bin/python max_restarts=20 dry_run=false
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    --help) usage; exit 0 ;;
    --dry_run) dry_run=true; shift ;;
    --program | --python | --max_restarts)
      [[ $# -gt 1 ]] || fail "$1 needs a value; see bash launch/slurm.sh --help"
      printf -v "${1#--}" %s "$2"
      shift 2
      ;;
    *) fail "unknown option '$1'. Options of the training come after '--'; see bash launch/slurm.sh --help" ;;
  esac
done
[[ ${1-} == -- ]] && shift
[[ $program != train* || " $* " == *" --config"[\ =]* && " $* " == *" --workdir"[\ =]* ]] ||
  fail "the training needs --config NAME and --workdir DIR after '--'; see bash launch/slurm.sh --help"
[[ $max_restarts =~ ^[0-9]+$ ]] || fail "--max_restarts takes a whole number, not '$max_restarts'."
[[ ${SLURM_GPUS_ON_NODE-} =~ ^[1-9][0-9]*$ ]] ||
  fail "no GPUs (SLURM_GPUS_ON_NODE is not set). Submit with sbatch --gpus-per-node=N; see bash launch/slurm.sh --help"

# Slurm runs a copy of this script, so the checkout is where sbatch was called.
cd "${SLURM_SUBMIT_DIR:-.}"
[[ $dry_run == true || $python != .venv/bin/python || -x $python ]] ||
  fail "$PWD has no $python. Call sbatch in the checkout, or name another --python."
$dry_run || [[ -x $python ]] || fail "$PWD has no $python. Install with make venv, or name another with --python."

# By itself JAX gives every Slurm task a single GPU; this names them all.
JAX_LOCAL_DEVICE_IDS=$(seq --separator=, 0 $((SLURM_GPUS_ON_NODE - 1)))
export JAX_LOCAL_DEVICE_IDS

# Processes that stop together do not stop in the same instant: the first to end must not kill the
# others. One that hangs is ended by the heartbeats of the training. srun ends with the highest code
# of all; where one process met an error (1, 2) and the others were lost by it, a file tells so.
met_error=$PWD/slurm-${SLURM_JOB_ID-}.error
# shellcheck disable=SC2016  # expanded by the inner shell
task='trap : TERM; "$@"; status=$?; case $status in 1 | 2) touch "$0" ;; esac; exit $status'
command=(srun --kill-on-bad-exit=0 --cpu-bind=none bash -c "$task" "$met_error" "$python" -m aim_jax "$program" "$@")

if $dry_run; then
  printf 'export JAX_LOCAL_DEVICE_IDS=%q\n' "$JAX_LOCAL_DEVICE_IDS"
  printf '%q ' "${command[@]}"
  printf '\n'
  # shellcheck disable=SC2016  # to be read, not expanded
  echo 'scontrol requeue "$SLURM_JOB_ID"  # unless the exit code is 0, 1 or 2'
  exit
fi

status=0
"${command[@]}" || status=$?
if [[ -f $met_error ]]; then
  rm -f "$met_error"
  echo "error: a process ended with an error that repeating will not mend; the log above says which." >&2
  exit 1
fi
case $status in
  0 | 1 | 2) exit "$status" ;;  # complete, or an error that repeating will not mend
esac
restarts=${SLURM_RESTART_COUNT:-0}
if ((restarts >= max_restarts)); then
  echo "error: the training ended with code $status after $restarts restarts, which is --max_restarts. The same sbatch command goes on." >&2
  exit "$status"
fi
echo "The training ended with code $status: requeueing the job (restart $((restarts + 1)) of $max_restarts)."
scontrol requeue "$SLURM_JOB_ID"
exit "$status"
