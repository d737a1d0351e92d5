#!/usr/bin/env bash
# One process per node, with all its GPUs, CPUs and memory.
#SBATCH --job-name=aim_jax
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
# A requeued job appends to the same log.
#SBATCH --open-mode=append
# Let Slurm requeue the job if a node fails or the job is preempted.
#SBATCH --requeue
# Before the time limit, send SIGTERM to the training on every node (with "B:" it would go to this
# script). Five minutes are enough to save to slow storage.
#SBATCH --signal=TERM@300
set -euo pipefail

usage() {
  cat <<'END'
Train on the GPU nodes of a Slurm cluster. Submit it from the checkout with sbatch.

Example:
  sbatch --nodes=4 --gpus-per-node=8 --time=24:00:00 launch/slurm.sh -- \
    --config aim_xl --workdir /shared/runs/aim_xl --config.accumulate=8 \
    --config.codes=/shared/codes/imagenet --config.tokenizer=/shared/runs/vq_f16

Usage: sbatch [OPTIONS OF SBATCH] launch/slurm.sh [OPTIONS] -- OPTIONS OF THE TRAINING

  --program NAME      program to run (default: train); extract_codes takes its own options
  --python FILE       Python interpreter, on storage that the nodes share (default: .venv/bin/python)
  --max_restarts N    maximum number of requeues (default: 20)
  --dry_run           print the commands and run nothing; without Slurm:
                      SLURM_GPUS_ON_NODE=8 bash launch/slurm.sh --dry_run -- ...
  --help              print this text

The job is requeued if the training saved and stopped (SIGTERM: time limit, preemption) or lost a
process. It resumes from the newest checkpoint. Exit codes: docs/clusters.md.
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

# Slurm runs a copy of this script. The checkout is the directory where sbatch was called.
cd "${SLURM_SUBMIT_DIR:-.}"
[[ $dry_run == true || $python != .venv/bin/python || -x $python ]] ||
  fail "$PWD has no $python. Call sbatch in the checkout, or name another --python."
$dry_run || [[ -x $python ]] || fail "$PWD has no $python. Install with make venv, or name another with --python."

# By default JAX gives every Slurm task a single GPU. Name all of them.
JAX_LOCAL_DEVICE_IDS=$(seq --separator=, 0 $((SLURM_GPUS_ON_NODE - 1)))
export JAX_LOCAL_DEVICE_IDS

# Processes that stop together do not stop at the same instant, so the first to exit must not kill the
# others. The heartbeats of the training end a process that hangs. srun exits with the highest code of
# all processes. A file records that one process had an error (1, 2), because the others then exit with
# higher codes.
met_error=$PWD/slurm-${SLURM_JOB_ID-}.error
# shellcheck disable=SC2016  # expanded by the inner shell
task='trap : TERM; "$@"; status=$?; case $status in 1 | 2) touch "$0" ;; esac; exit $status'
command=(srun --kill-on-bad-exit=0 --cpu-bind=none bash -c "$task" "$met_error" "$python" -m aim_jax "$program" "$@")

if $dry_run; then
  printf 'export JAX_LOCAL_DEVICE_IDS=%q\n' "$JAX_LOCAL_DEVICE_IDS"
  printf '%q ' "${command[@]}"
  printf '\n'
  # shellcheck disable=SC2016  # printed, not expanded
  echo 'scontrol requeue "$SLURM_JOB_ID"  # unless the exit code is 0, 1 or 2'
  exit
fi

status=0
"${command[@]}" || status=$?
if [[ -f $met_error ]]; then
  rm -f "$met_error"
  echo "error: a process failed with an error that a restart does not fix; see the log above." >&2
  exit 1
fi
case $status in
  0 | 1 | 2) exit "$status" ;;  # complete, or an error that a restart does not fix
esac
restarts=${SLURM_RESTART_COUNT:-0}
if ((restarts >= max_restarts)); then
  echo "error: the training ended with code $status after $restarts restarts, which is --max_restarts. The same sbatch command resumes." >&2
  exit "$status"
fi
echo "The training ended with code $status: requeueing the job (restart $((restarts + 1)) of $max_restarts)."
scontrol requeue "$SLURM_JOB_ID"
exit "$status"
