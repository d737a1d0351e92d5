r"""Comparison of Inception features and FID with the TorchScript network in PyTorch.

Example:
  python benchmarks/inception_parity.py --torchscript FILE.pt --images cifar10:test \
      --data cifar10 --count 2000
  python benchmarks/inception_parity.py --torchscript FILE.pt --images photographs --crops 40 \
      --size 256

PyTorch resizes the images and applies the network independently, in float32. From its features, the
FID between the two halves of the images is computed with NumPy and scipy.linalg.sqrtm. The exit
status is 1 if a feature differs by more than 1e-4 of the largest, or the FID by more than 0.01.
"""

import argparse
import sys
import time
from pathlib import Path

import jax
import numpy as np
import scipy.linalg
from PIL import Image

try:
    import torch
except ImportError:
    sys.exit("The peer requires PyTorch; run pip install torch.")

from aim_jax.configs.defaults import eval_defaults
from aim_jax.data.sources import images_in
from aim_jax.evaluation.distribution import Moments, frechet_distance
from aim_jax.evaluation.features import FeatureExtractor
from aim_jax.evaluation.references import open_set
from aim_jax.utils.logging import Progress
from aim_jax.weights.convert.inception import load_inception


def interpolate(x, axis: int, side: int = 299):
    """Resize one axis of a tensor with TensorFlow 1's bilinear interpolation."""
    size = x.shape[axis]
    position = torch.arange(side, dtype=torch.float64) * size / side
    low = position.floor().long()
    shape = [1] * x.ndim
    shape[axis] = side
    fraction = (position - low).float().reshape(shape)
    lower, upper = (x.index_select(axis, i.clamp(max=size - 1)) for i in (low, low + 1))
    return lower * (1 - fraction) + upper * fraction


def torch_features(network, images: np.ndarray) -> np.ndarray:
    """Compute the features of uint8 images (b, H, W, 3) with PyTorch."""
    x = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float()
    with torch.inference_mode():
        return network((interpolate(interpolate(x, 2), 3) - 128) / 128).numpy()


def fid_by_scipy(a: np.ndarray, b: np.ndarray) -> float:
    """Compute the FID between features (n, d) and (m, d) with scipy.linalg.sqrtm."""
    a = a.astype(np.float64)
    b = b.astype(np.float64)
    ca = np.cov(a.T)
    cb = np.cov(b.T)
    root = scipy.linalg.sqrtm(ca @ cb).real
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(ca + cb - 2 * root))


def random_crops(folder: str, count: int, side: int) -> np.ndarray:
    """Return `count` random squares of every image of a folder, in random order.

    The side of a square is at least half of the shorter side of the image.
    """
    rng = np.random.default_rng(0)
    squares = []
    for path in images_in(Path(folder)):
        with Image.open(path) as file:
            image = file.convert("RGB")
        shorter = min(image.size)
        for _ in range(count):
            size = int(rng.integers(shorter // 2, shorter + 1))
            left, top = (int(rng.integers(length - size + 1)) for length in image.size)
            square = image.crop((left, top, left + size, top + size))
            squares.append(np.asarray(square.resize((side, side), Image.Resampling.BICUBIC)))
    return rng.permutation(np.stack(squares))


def main():
    """Compare features and FID, print the differences and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torchscript", required=True, help="TorchScript file of the network")
    parser.add_argument(
        "--images", required=True, help="images, as in --reference of aim-jax evaluate"
    )
    parser.add_argument("--data", default="", help="directory of the dataset")
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels (32)")
    parser.add_argument("--count", type=int, default=2000, help="number of images (2000)")
    parser.add_argument("--crops", type=int, default=0, help="random crops per image; 0 for none")
    parser.add_argument("--batch", type=int, default=50, help="batch size (50)")
    args = parser.parse_args()
    config = eval_defaults()
    config.data.dir = args.data
    config.data.image_size = args.size
    if args.crops:
        images = random_crops(args.images, args.crops, args.size)
        take = images.__getitem__
        name = f"crops of {args.images} at {args.size}"
    else:
        images = open_set(args.images, None, config)
        take = images.take
        name = images.name
    index = np.linspace(0, len(images) - 1, min(args.count, len(images))).astype(int)
    network = torch.jit.load(args.torchscript, map_location="cpu").eval()
    extract = FeatureExtractor(load_inception(args.torchscript), args.batch)
    ours = []
    theirs = []
    seconds = np.zeros(2)
    progress = Progress("features, ours and torch's")
    done = 0
    for part in np.array_split(index, -(-len(index) // args.batch)):
        pixels = take(part)
        start = time.perf_counter()
        ours.append(extract(pixels).pool)
        middle = time.perf_counter()
        theirs.append(torch_features(network, pixels))
        if len(ours) > 1:  # the first batch compiles
            seconds += middle - start, time.perf_counter() - middle
        done += len(part)
        progress(done, len(index))
    ours = np.concatenate(ours)
    theirs = np.concatenate(theirs)
    worst = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    print(f"jax {jax.__version__}, torch {torch.__version__}; {len(index)} images of {name}")
    rates = (len(index) - args.batch) / np.maximum(seconds, 1e-9)
    print(f"largest difference of a feature: {worst:.1e} of the largest feature")
    print(f"images/s: ours {rates[0]:.1f}, torch {rates[1]:.1f}")
    if len(index) < 4096:
        print("note: each half has fewer images than features, so the covariances are singular")
    halves = []
    for half in (ours[::2], ours[1::2]):
        moments = Moments(half.shape[1])
        moments.add(half)
        halves.append(moments.gaussian())
    fids = frechet_distance(*halves), fid_by_scipy(theirs[::2], theirs[1::2])
    print(f"FID between the halves: ours {fids[0]:.4f}, torch and SciPy {fids[1]:.4f}")
    return int(worst > 1e-4 or abs(fids[0] - fids[1]) > 0.01)


if __name__ == "__main__":
    sys.exit(main())
