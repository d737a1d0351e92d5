r"""Write a Kubernetes JobSet that trains on TPU slices (GKE) or GPU nodes.

Example:
  python launch/jobset.py --name aim-xl --accelerator v5e-64 --slices 2 --image IMAGE \
    --claim CLAIM -- --config aim_xl --workdir /data/runs/aim_xl --config.accumulate=2 \
    --config.codes=/data/codes/imagenet --config.tokenizer=/data/runs/vq_f16 | kubectl apply -f -

The manifest is printed to standard output as JSON, which kubectl accepts. The program starts
nothing and requires no packages. Options of the training follow `--`. See docs/clusters.md.
"""

import argparse
import json
import math
import re
from pathlib import PurePosixPath

# For each TPU generation: its name on GKE, the topology of the smallest slice, the increment per
# chip in the number of an accelerator (v5p-128 has 64 chips), and the largest number.
TPUS = {
    "v4": ("tpu-v4-podslice", (2, 2, 1), 2, 8192),
    "v5e": ("tpu-v5-lite-podslice", (2, 2), 1, 256),
    "v5p": ("tpu-v5p-slice", (2, 2, 1), 2, 8192),
    "v6e": ("tpu-v6e-slice", (2, 2), 1, 256),
}
PORT = 8476


def parse(argv=None):
    """Parse the command line and return the manifest."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--name", required=True, help="name of the JobSet: lower-case letters, digits and -")
    add("--accelerator", required=True, help="v5e-64 for a TPU slice, gpu-8 for nodes with 8 GPUs")
    add("--slices", type=int, default=1, help="number of TPU slices (default: 1)")
    add("--nodes", type=int, default=1, help="number of GPU nodes (default: 1)")
    add("--image", required=True, help="container image; launch/Dockerfile builds one")
    add("--claim", required=True, help="PersistentVolumeClaim (ReadWriteMany) shared by all pods")
    add("--mount", default="/data", help="mount path of the claim (default: /data)")
    add("--program", default="train", help="program of aim-jax to run (default: train)")
    add("--max_restarts", type=int, default=20, help="maximum restarts of the set (default: 20)")
    add(
        "--node_selector",
        action="append",
        default=[],
        metavar="LABEL=VALUE",
        help="label that nodes must have; repeatable",
    )
    add("training", nargs="*", metavar="-- OPTIONS", help="options of the training")
    args = parser.parse_args(argv)
    try:
        return jobset(args)
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")


def tpu(accelerator: str):
    """Return GKE's name, the topology, hosts and chips per host of a slice such as v5e-64."""
    kind, _, number = accelerator.partition("-")
    if kind not in TPUS or not re.fullmatch(r"[1-9]\d*", number):
        raise ValueError(
            f"unknown accelerator {accelerator!r}; expected gpu-N or one of "
            f"{', '.join(f'{name}-N' for name in TPUS)}, such as v5e-64."
        )
    name, shape, cores, largest = TPUS[kind]
    shape = list(shape)
    while math.prod(shape) * cores < int(number):  # double the shortest side, the last if tied
        shape[max(range(len(shape)), key=lambda i: (-shape[i], i))] *= 2
    if math.prod(shape) * cores != int(number) or int(number) > largest:
        raise ValueError(
            f"there is no slice {accelerator}: expected a power of two from {4 * cores} to "
            f"{largest}."
        )
    chips = math.prod(shape)
    per_host = chips if len(shape) == 2 and chips <= 8 else 4
    return name, "x".join(map(str, shape)), chips // per_host, per_host


def jobset(args) -> dict:
    """Return the manifest of the JobSet for parsed arguments.

    Raises:
      ValueError: if an argument is invalid.
    """
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", args.name):
        raise ValueError(
            f"--name {args.name!r}: expected 1 to 40 lower-case letters, digits and -, beginning "
            "with a letter."
        )
    for option, minimum in (("slices", 1), ("nodes", 1), ("max_restarts", 0)):
        if getattr(args, option) < minimum:
            raise ValueError(f"--{option} {getattr(args, option)}: expected at least {minimum}.")
    trains = args.program.startswith("train")
    results = "--workdir" if trains else "--out"
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--config")
    options.add_argument(results, dest="results")
    parsed, _ = options.parse_known_args(args.training)
    if (trains and not parsed.config) or not parsed.results:
        needed = "--config NAME and --workdir DIR" if trains else "--out DIR"
        raise ValueError(f"{args.program} needs {needed} after `--`.")
    if not PurePosixPath(parsed.results).is_relative_to(args.mount):
        raise ValueError(
            f"{results} {parsed.results} is not on the volume that the pods share; put it below "
            f"{args.mount}, or change the mount path with --mount."
        )
    selector = dict(label.partition("=")[::2] for label in args.node_selector)
    if not all(selector.values()):
        raise ValueError("--node_selector: expected LABEL=VALUE.")

    training = list(args.training)
    environment = {"PYTHONUNBUFFERED": "1"}
    annotations = {}
    volumes = {"shared": ({"persistentVolumeClaim": {"claimName": args.claim}}, args.mount)}
    if gpus := re.fullmatch(r"gpu-([1-9]\d*)", args.accelerator):
        if args.slices != 1:
            raise ValueError("--slices is for TPUs; set the number of GPU nodes with --nodes.")
        hosts = args.nodes
        limits = {"nvidia.com/gpu": int(gpus[1])}
        environment["JAX_LOCAL_DEVICE_IDS"] = ",".join(map(str, range(int(gpus[1]))))
        if hosts > 1:  # Kubernetes sets JOB_COMPLETION_INDEX, the process index
            environment["JAX_COORDINATOR_ADDRESS"] = f"{args.name}-workers-0-0.{args.name}:{PORT}"
            environment["JAX_NUM_PROCESSES"] = str(hosts)
        # Shared memory for NCCL; the default of containers is 64 MB.
        volumes["shm"] = ({"emptyDir": {"medium": "Memory"}}, "/dev/shm")
    else:
        if args.nodes != 1:
            raise ValueError("--nodes is for GPUs; the size of a TPU slice determines its hosts.")
        # GKE connects the processes of a slice, and the slices.
        name, topology, hosts, per_host = tpu(args.accelerator)
        limits = {"google.com/tpu": per_host}
        selector["cloud.google.com/gke-tpu-accelerator"] = name
        selector["cloud.google.com/gke-tpu-topology"] = topology
        # A node pool is one slice, which no two jobs may share.
        annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] = "cloud.google.com/gke-nodepool"
        if trains and args.slices > 1:
            training.append(f"--config.mesh.slices={args.slices}")

    pod = {
        "restartPolicy": "Never",
        # Time between SIGTERM and SIGKILL, enough to save to slow storage.
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
        # One lost process ends the job, and the entire set restarts, ...
        "backoffLimit": 0,
        # ... but not after an error that a restart cannot fix.
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
            # Blocking, so that no process of the previous start still writes when the next one
            # reads.
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
