"""Writes a Kubernetes JobSet that trains on TPU slices (GKE) or GPU nodes.

Example:
  python launch/jobset.py --name aim-xl --accelerator v5e-64 --slices 2 --image IMAGE \\
    --claim CLAIM -- --config aim_xl --workdir /data/runs/aim_xl --config.accumulate=2 \\
    --config.codes=/data/codes/imagenet --config.tokenizer=/data/runs/vq_f16 | kubectl apply -f -

The manifest goes to the standard output (as JSON, which kubectl takes); nothing is started, and no
package is needed. Options of the training come after `--`. docs/clusters.md tells more.
"""

import argparse
import json
import math
import re
from pathlib import PurePosixPath

# Per generation: its name on GKE, the shape of the smallest slice, how much a chip counts in the
# number of an accelerator (v5p-128 has 64 chips), the largest number.
TPUS = {
    "v4": ("tpu-v4-podslice", (2, 2, 1), 2, 8192),
    "v5e": ("tpu-v5-lite-podslice", (2, 2), 1, 256),
    "v5p": ("tpu-v5p-slice", (2, 2, 1), 2, 8192),
    "v6e": ("tpu-v6e-slice", (2, 2), 1, 256),
}
PORT = 8476


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--name", required=True, help="of the JobSet: lower-case letters, digits and -")
    add("--accelerator", required=True, help="v5e-64: a TPU slice; gpu-8: nodes with 8 GPUs")
    add("--slices", type=int, default=1, help="TPU slices (1)")
    add("--nodes", type=int, default=1, help="GPU nodes (1)")
    add("--image", required=True, help="container image; launch/Dockerfile builds one")
    add("--claim", required=True, help="PersistentVolumeClaim (ReadWriteMany) of all pods")
    add("--mount", default="/data", help="where the pods see it (/data)")
    add("--program", default="train", help="what runs (train)")
    add("--max_restarts", type=int, default=20, help="how often the set may start again (20)")
    add("--node_selector", action="append", default=[], metavar="LABEL=VALUE", help="repeatable")
    add("training", nargs="*", metavar="-- OPTIONS", help="options of the training")
    args = parser.parse_args(argv)
    try:
        return jobset(args)
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")


def tpu(accelerator: str):
    """GKE's name, topology, hosts and chips per host of a slice such as v5e-64."""
    kind, _, number = accelerator.partition("-")
    if kind not in TPUS or not re.fullmatch(r"[1-9]\d*", number):
        raise ValueError(
            f"unknown accelerator {accelerator!r}; expected gpu-N or one of "
            f"{', '.join(f'{name}-N' for name in TPUS)}, such as v5e-64."
        )
    name, shape, cores, largest = TPUS[kind]
    shape = list(shape)
    while math.prod(shape) * cores < int(number):  # double the last of the shortest sides
        shape[max(range(len(shape)), key=lambda i: (-shape[i], i))] *= 2
    if math.prod(shape) * cores != int(number) or int(number) > largest:
        raise ValueError(
            f"there is no slice {accelerator}: N is a power of two from {4 * cores} to {largest}."
        )
    chips = math.prod(shape)
    per_host = chips if len(shape) == 2 and chips <= 8 else 4
    return name, "x".join(map(str, shape)), chips // per_host, per_host


def jobset(args) -> dict:
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", args.name):
        raise ValueError(
            f"--name {args.name!r}: 1 to 40 lower-case letters, digits and -, from a letter on."
        )
    for option, least in (("slices", 1), ("nodes", 1), ("max_restarts", 0)):
        if getattr(args, option) < least:
            raise ValueError(f"--{option} {getattr(args, option)}: at least {least}.")
    trains = args.program.startswith("train")
    results = "--workdir" if trains else "--out"
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--config")
    options.add_argument(results, dest="results")
    given, _ = options.parse_known_args(args.training)
    if (trains and not given.config) or not given.results:
        needed = "--config NAME and --workdir DIR" if trains else "--out DIR"
        raise ValueError(f"{args.program} needs {needed} after `--`.")
    if not PurePosixPath(given.results).is_relative_to(args.mount):
        raise ValueError(
            f"{results} {given.results} is not on the volume that the pods share; put it below "
            f"{args.mount}, or mount the volume elsewhere with --mount."
        )
    selector = dict(label.partition("=")[::2] for label in args.node_selector)
    if not all(selector.values()):
        raise ValueError("--node_selector takes LABEL=VALUE.")

    training, environment, annotations = list(args.training), {"PYTHONUNBUFFERED": "1"}, {}
    volumes = {"shared": ({"persistentVolumeClaim": {"claimName": args.claim}}, args.mount)}
    if gpus := re.fullmatch(r"gpu-([1-9]\d*)", args.accelerator):
        if args.slices != 1:
            raise ValueError("--slices is for TPUs; GPU nodes are counted with --nodes.")
        hosts, limits = args.nodes, {"nvidia.com/gpu": int(gpus[1])}
        environment["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, range(int(gpus[1]))))
        if hosts > 1:  # the number of a process is JOB_COMPLETION_INDEX, which Kubernetes sets
            environment["JAX_COORDINATOR_ADDRESS"] = f"{args.name}-workers-0-0.{args.name}:{PORT}"
            environment["JAX_NUM_PROCESSES"] = str(hosts)
        # NCCL's shared memory; containers have 64 MB by themselves.
        volumes["shm"] = ({"emptyDir": {"medium": "Memory"}}, "/dev/shm")
    else:
        if args.nodes != 1:
            raise ValueError("--nodes is for GPUs; a TPU slice has the hosts that its size says.")
        # GKE tells the processes of a slice, and the slices, of each other.
        name, topology, hosts, per_host = tpu(args.accelerator)
        limits = {"google.com/tpu": per_host}
        selector["cloud.google.com/gke-tpu-accelerator"] = name
        selector["cloud.google.com/gke-tpu-topology"] = topology
        # A node pool is a slice; two halves of a job must not share one.
        annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] = "cloud.google.com/gke-nodepool"
        if trains and args.slices > 1:
            training.append(f"--config.mesh.slices={args.slices}")

    pod = {
        "restartPolicy": "Never",
        # Between SIGTERM and SIGKILL: enough to save to slow storage.
        "terminationGracePeriodSeconds": 300,
        "nodeSelector": selector,
        "tolerations": [{"key": key, "operator": "Exists"} for key in limits],
        "containers": [
            {
                "name": "training",
                "image": args.image,
                "command": ["python", "-m", "aim_jax", args.program, *training],
                "env": [{"name": key, "value": value} for key, value in environment.items()],
                "resources": {"limits": limits},
                "volumeMounts": [
                    {"name": key, "mountPath": path} for key, (_, path) in volumes.items()
                ],
            }
        ],
        "volumes": [{"name": key, **volume} for key, (volume, _) in volumes.items()],
    }
    final = {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [1, 2]}}
    job = {
        "completionMode": "Indexed",
        "completions": hosts,
        "parallelism": hosts,
        # One lost process ends the job, and the set starts again as a whole, ...
        "backoffLimit": 0,
        # ... but not after an error that repeating will not mend.
        "podFailurePolicy": {"rules": [final]},
        "template": {"spec": pod},
    }
    fail = {"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": args.name, "annotations": annotations},
        "spec": {
            "network": {"enableDNSHostnames": True},
            # Blocking: no process of the last start may still write when the next one reads.
            "failurePolicy": {
                "maxRestarts": args.max_restarts,
                "restartStrategy": "BlockingRecreate",
                "rules": [fail],
            },
            "replicatedJobs": [
                {"name": "workers", "replicas": args.slices, "template": {"spec": job}}
            ],
        },
    }


if __name__ == "__main__":
    print(json.dumps(parse(), indent=2))
