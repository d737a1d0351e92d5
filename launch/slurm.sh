#!/usr/bin/env bash
# One process per node, with all GPUs, CPUs and memory of the node.
#SBATCH --job-name=aim_jax
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
# A requeued job appends to its log.
#SBATCH --open-mode=append
# Slurm may requeue the job when a node fails or the job is preempted.
#SBATCH --requeue
# Before the time limit, Slurm sends SIGTERM to the training on every node (not to this script, which
# would need "B:"). Five minutes are enough to save to slow storage.
#SBATCH --signal=TERM@300
set -euo pipefail

usage() {
  cat <<'END'
Train on the GPU nodes of a Slurm cluster. Submit from the checkout with sbatch.

Example:
  sbatch --nodes=4 --gpus-per-node=8 --time=24:00:00 launch/slurm.sh -- \
    --config aim_xl --workdir /shared/runs/aim_xl --config.accumulate=8 \
    --config.codes=/shared/codes/imagenet --config.tokenizer=/shared/runs/vq_f16

Usage: sbatch [OPTIONS OF SBATCH] launch/slurm.sh [OPTIONS] -- OPTIONS OF THE TRAINING

  --program NAME      program to run (default: train); extract_codes has its own options
  --python FILE       interpreter, on storage shared by the nodes (default: .venv/bin/python)
  --max_restarts N    maximum number of times the job is requeued (default: 20)
  --dry_run           print the commands without running them; outside Slurm:
                      SLURM_GPUS_ON_NODE=8 bash launch/slurm.sh --dry_run -- ...
  --help              show this text

If the training saved and stopped (SIGTERM: time limit, preemption) or lost a process, the job is
requeued and resumes from the newest checkpoint. Exit codes: docs/clusters.md.
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
    *) fail "unknown option '$1'; options of the training come after '--'. See bash launch/slurm.sh --help" ;;
  esac
done
[[ ${1-} == -- ]] && shift
[[ $program != train* || " $* " == *" --config"[\ =]* && " $* " == *" --workdir"[\ =]* ]] ||
  fail "the training needs --config NAME and --workdir DIR after '--'; see bash launch/slurm.sh --help"
[[ $max_restarts =~ ^[0-9]+$ ]] || fail "--max_restarts: expected an integer, got '$max_restarts'."
[[ ${SLURM_GPUS_ON_NODE-} =~ ^[1-9][0-9]*$ ]] ||
  fail "no GPUs (SLURM_GPUS_ON_NODE is not set). Submit with sbatch --gpus-per-node=N; see bash launch/slurm.sh --help"

# Slurm runs a copy of this script; the checkout is the directory in which sbatch was called.
cd "${SLURM_SUBMIT_DIR:-.}"
[[ $dry_run == true || $python != .venv/bin/python || -x $python ]] ||
  fail "$PWD has no $python. Call sbatch in the checkout, or pass another --python."
$dry_run || [[ -x $python ]] || fail "$PWD has no $python. Install with make venv, or pass another --python."

# By default, JAX uses a single GPU per Slurm task; this selects all of them.
JAX_LOCAL_DEVICE_IDS=$(seq --separator=, 0 $((SLURM_GPUS_ON_NODE - 1)))
export JAX_LOCAL_DEVICE_IDS

# Processes that stop together do not exit at the same instant, so the first to exit must not kill
# the others. The heartbeats of the training end a process that hangs. srun returns the highest exit
# code of all processes. A file records that a process ended with an error (1, 2), because the others
# are then lost and exit with higher codes.
met_error=$PWD/slurm-${SLURM_JOB_ID-}.error
# shellcheck disable=SC2016  # expanded by the inner shell
task='trap : TERM; "$@"; status=$?; case $status in 1 | 2) touch "$0" ;; esac; exit $status'
command=(srun --kill-on-bad-exit=0 --cpu-bind=none bash -c "$task" "$met_error" "$python" -m aim_jax "$program" "$@")

if $dry_run; then
  printf 'export JAX_LOCAL_DEVICE_IDS=%q\n' "$JAX_LOCAL_DEVICE_IDS"
  printf '%q ' "${command[@]}"
  printf '\n'
  # shellcheck disable=SC2016  # printed for the reader, not expanded
  echo 'scontrol requeue "$SLURM_JOB_ID"  # unless the exit code is 0, 1 or 2'
  exit
fi

status=0
"${command[@]}" || status=$?
if [[ -f $met_error ]]; then
  rm -f "$met_error"
  echo "error: a process ended with an error that a restart cannot fix; see the log above." >&2
  exit 1
fi
case $status in
  0 | 1 | 2) exit "$status" ;;  # complete, or an error that a restart cannot fix
esac
restarts=${SLURM_RESTART_COUNT:-0}
if ((restarts >= max_restarts)); then
  echo "error: the training ended with code $status after $restarts restarts, the limit of --max_restarts. Resume it with the same sbatch command." >&2
  exit "$status"
fi
echo "The training ended with code $status; requeueing the job (restart $((restarts + 1)) of $max_restarts)."
scontrol requeue "$SLURM_JOB_ID"
exit "$status"
