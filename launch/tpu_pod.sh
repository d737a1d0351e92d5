#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'END'
Train on Cloud TPU, on one slice or several, as a queued resource.

Example:
  launch/tpu_pod.sh all --name aim-xl --zone us-west4-a --accelerator_type v5litepod-64 --spot \
    --nfs 10.0.0.2:/share -- --config aim_xl --workdir /mnt/aim/runs/aim_xl --config.accumulate=4 \
    --config.codes=/mnt/aim/codes/imagenet --config.tokenizer=/mnt/aim/runs/vq_f16

Usage: launch/tpu_pod.sh COMMAND OPTIONS [-- OPTIONS OF THE TRAINING]

  create   request the TPUs, or use those of this name, and wait until they are active
  setup    copy the committed state of this checkout to all hosts and install it
  train    train on all hosts and show the log; attach if it already runs. Ctrl-C leaves it running
  all      create, setup and train; repeat after a preemption or a lost slice, from the newest
           checkpoint
  status   show the state of the TPUs and the last lines of the log
  delete   stop the training (it saves) and delete the TPUs

  --name NAME               name of the queued resource
  --zone ZONE               zone, such as us-west4-a
  --project PROJECT         project (default: that of gcloud config)
  --accelerator_type TYPE   type of one slice, such as v5litepod-64, v5p-128, v6e-64
  --slices N                number of slices (default: 1)
  --runtime_version VERSION runtime of the VMs (default: the one for the type)
  --spot | --reserved       use spot TPUs, which are cheaper and may be preempted | use your
                            reservation (default: on demand)
  --create_flag=FLAG        additional flag for gcloud ... create, such as
                            --create_flag=--network=NAME; repeatable
  --nfs HOST:/SHARE         share to mount at /mnt/aim on all hosts, for data and workdir
  --ref REF                 commit to copy (default: HEAD)
  --program NAME            program to run (default: train); extract_codes has its own options
  --wait_minutes N          maximum time to wait for the TPUs, in minutes (default: 240)
  --max_restarts N          maximum number of restarts of `all` (default: 20)
  --poll_seconds N          time between two queries of the state, in seconds (default: 30)
  --delete_at_end           let `all` delete the TPUs at the end, whatever the result
  --dry_run                 print the commands without running them
  --help                    show this text

Requires gcloud, logged in, and the ssh key of Compute Engine in the agent:
ssh-add ~/.ssh/google_compute_engine. Exit codes: docs/clusters.md.
END
}

fail() {
  echo "error: $1" >&2
  exit 1
}

say() {
  echo "$(date +%T) $1" >&2
}

# Runs a command, or prints it quoted for a shell.
run() {
  if $dry_run; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

on_all_hosts() {  # command line of a remote shell
  # Keep-alive messages, so that the call ends if a host is lost.
  run gcloud compute tpus queued-resources ssh "$name" "${where[@]}" --worker=all --node=all \
    --batch-size=all --ssh-flag='-o ServerAliveInterval=30' --command="$1"
}

state() {
  "${describe[@]}" 2> /dev/null || true
}

create() {
  local started=$SECONDS now
  if $dry_run; then
    run "${describe[@]}"
    run "${create_command[@]}"
    run "${describe[@]}"
    return
  fi
  now=$(state)
  case $now in
    FAILED | SUSPENDING | SUSPENDED)
      say "$name is $now: requesting it again"
      remove || return
      now=
      ;;
  esac
  if [[ -z $now ]]; then
    "${create_command[@]}" || return "$final"
  fi
  while now=$(state); [[ $now != ACTIVE ]]; do
    case $now in
      FAILED) say "error: $name is FAILED; see gcloud compute tpus queued-resources describe."; return "$final" ;;
      SUSPENDED) say "$name was preempted before it was used"; return 75 ;;
    esac
    if ((SECONDS - started >= wait_minutes * 60)); then
      say "error: $name is ${now:-unknown} after $wait_minutes minutes, the limit of --wait_minutes. The request is still queued: run the same command to keep waiting, or 'delete' to withdraw it."
      return "$final"
    fi
    say "$name: ${now:-unknown}, $(((SECONDS - started) / 60)) of at most $wait_minutes minutes"
    sleep "$poll_seconds"
  done
  say "$name is active"
}

setup() {
  local command='rm -rf aim_jax/aim_jax && mkdir -p aim_jax && tar -xzf aim_jax.tgz -C aim_jax && bash aim_jax/launch/tpu_worker.sh setup'
  [[ -z $nfs ]] || command+=" $(printf %q "$nfs")"
  run git -C "$root" archive --format=tar.gz --output="$archive/aim_jax.tgz" "$ref" || return "$final"
  run gcloud compute tpus queued-resources scp "$archive/aim_jax.tgz" "$name:" "${where[@]}" \
    --worker=all --node=all --batch-size=all || return
  on_all_hosts "$command"
}

train() {
  local command
  command="bash aim_jax/launch/tpu_worker.sh start $(printf '%q ' "$program" --coordinator=auto "$@")"
  on_all_hosts "${command% }" || return
  on_all_hosts 'bash aim_jax/launch/tpu_worker.sh wait'
}

all() {
  local status restart unreachable=0
  for ((restart = 0; ; restart++)); do
    status=0
    create || status=$?
    ((status != 0)) || setup || status=$?
    ((status != 0)) || train "$@" || status=$?
    ((status != 0 && status != final && restart < max_restarts)) || break
    say "ended with code $status: restarting (restart $((restart + 1)) of $max_restarts)"
    sleep "$poll_seconds"
    # gcloud and ssh return 1 and 255 if a host does not answer. The state may stay ACTIVE for long
    # after that.
    case $status in 1 | 255) ((unreachable += 1)) ;; *) unreachable=0 ;; esac
    if ((unreachable == 2)); then
      say "$name does not answer: deleting it"
      remove || true
      unreachable=0
    fi
  done
  if $delete_at_end; then
    remove || say "error: $name could not be deleted and is still billed."
  elif ! $dry_run; then
    say "$name still exists and is billed; delete it with launch/tpu_pod.sh delete --name $name --zone $zone"
  fi
  return "$status"
}

remove() {
  run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
final=3  # exit code for errors that a restart cannot fix

name='' zone='' project='' accelerator_type='' slices=1 runtime_version='' tier='' nfs='' ref=HEAD
program=train wait_minutes=240 max_restarts=20 poll_seconds=30
delete_at_end=false dry_run=false create_flags=()
help='see launch/tpu_pod.sh --help'
command=${1-}
case $command in
  create | setup | train | all | status | delete) shift ;;
  --help) usage; exit 0 ;;
  *) fail "unknown command '$command'; expected create, setup, train, all, status or delete; $help" ;;
esac
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
    --help) usage; exit 0 ;;
    --dry_run | --delete_at_end) printf -v "${1#--}" true; shift ;;
    --spot | --reserved)
      [[ -z $tier ]] || fail "--spot and --reserved exclude each other; pass only one."
      tier=$1
      shift
      ;;
    --create_flag=*) create_flags+=("${1#*=}"); shift ;;
    --name | --zone | --project | --accelerator_type | --slices | --runtime_version | --nfs | --ref | \
      --program | --wait_minutes | --max_restarts | --poll_seconds)
      [[ $# -gt 1 && $2 != -- ]] || fail "$1 needs a value; $help"
      printf -v "${1#--}" %s "$2"
      shift 2
      ;;
    *) fail "unknown option '$1'; options of the training come after '--'; $help" ;;
  esac
done
[[ ${1-} == -- ]] && shift

[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || fail "--name '$name': expected lower-case letters, digits and -, beginning with a letter; $help"
[[ -n $zone ]] || fail "--zone is missing, such as --zone us-west4-a; $help"
for number in slices wait_minutes max_restarts poll_seconds; do
  [[ ${!number} =~ ^[0-9]+$ ]] || fail "--$number: expected an integer, got '${!number}'."
done
((slices > 0)) || fail "--slices 0: expected at least 1."
case $command in
  create | all)
    case $accelerator_type in
      '') fail "--accelerator_type is missing, such as v5litepod-64; $help" ;;
      v5litepod-*) : "${runtime_version:=v2-alpha-tpuv5-lite}" ;;
      v5p-*) : "${runtime_version:=v2-alpha-tpuv5}" ;;
      v6e-*) : "${runtime_version:=v2-alpha-tpuv6e}" ;;
      v[234]-*) : "${runtime_version:=tpu-ubuntu2204-base}" ;;
      *) [[ -n $runtime_version ]] || fail "no runtime is known for '$accelerator_type'; pass one with --runtime_version." ;;
    esac
    ;;
esac
case $command in
  train | all)
    if [[ $program == train* ]]; then
      [[ " $* " == *" --config"[\ =]* && " $* " == *" --workdir"[\ =]* ]] ||
        fail "the training needs --config FILE and --workdir DIR after '--'; $help"
      # Only data parallelism spans the slices, because the network between them is slow.
      ((slices == 1)) || set -- "$@" "--config.mesh.slices=$slices"
    fi
    ;;
  *) [[ $# -eq 0 ]] || fail "'$command' does not accept options of the training; $help" ;;
esac
$dry_run || command -v gcloud > /dev/null || fail "gcloud is not installed; see https://cloud.google.com/sdk/docs/install"

where=("--zone=$zone")
[[ -z $project ]] || where+=("--project=$project")
describe=(gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)')
if ((slices == 1)); then nodes=("--node-id=$name"); else nodes=("--node-count=$slices" "--node-prefix=$name"); fi
create_command=(gcloud compute tpus queued-resources create "$name" "${where[@]}" "${nodes[@]}"
  "--accelerator-type=$accelerator_type" "--runtime-version=$runtime_version" ${tier:+"$tier"}
  ${create_flags[@]+"${create_flags[@]}"})
archive=${TMPDIR:-/tmp}
if ! $dry_run && [[ $command == setup || $command == all ]]; then
  archive=$(mktemp -d)
  trap 'rm -rf "$archive"' EXIT
  [[ -z $(git -C "$root" status --porcelain --untracked-files=no) ]] || say "warning: uncommitted changes are not copied; the hosts get $ref"
fi

status=0
case $command in
  create) create || status=$? ;;
  setup) setup || status=$? ;;
  train) train "$@" || status=$? ;;
  all) all "$@" || status=$? ;;
  status)
    run "${describe[@]}"
    run gcloud compute tpus queued-resources ssh "$name" "${where[@]}" --worker=0 --node=0 \
      --command='tail -n 5 aim_jax_run/log'
    ;;
  delete)
    on_all_hosts 'bash aim_jax/launch/tpu_worker.sh stop' || say "could not stop a training; deleting"
    remove || status=$?
    ;;
esac
((status != final)) || status=1
exit "$status"
