"""Throughput of each step from ImageNet images to training batches.

Example:
  python benchmarks/extraction.py --work /tmp/extraction --pictures 16 --examples 131072

Files with ImageNet's layout and image sizes are created in --work (0.3 GB; removed at the end) with
random images. The steps are measured one at a time:

  index     headers read from the tar of the training images, per second
  decode    JPEGs read from it, decoded, resized and cropped, per second, by one thread and by all
  encode    views encoded by the f16 tokenizer with random weights, per second, on JAX's devices
  write     writing a cache of random tokens, GB/s including its checksums
  open      opening this cache, GB/s including verification of its checksums
  batches   examples read from it in training batches of 256, per second, from one cache and from a
            mix of two

Rates are printed with the time that 1,281,167 images, or a cache of them, take.
"""

import argparse
import io
import itertools
import json
import shutil
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # find benchmarks/ from anywhere
from PIL import Image

IMAGES = 1_281_167
TOKENS = 256
CODES = 16_384
SIZE = (500, 375)
QUALITY = 92  # of JPEG; gives about 110 KB, ImageNet's mean


def random_jpeg(rng: np.random.Generator) -> bytes:
    """Return a JPEG file of coarse colours and fine noise."""
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(SIZE, Image.Resampling.BICUBIC))
    pixels = smooth + rng.normal(0, 12, (*smooth.shape[:2], 1))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def write_tar(path: Path, rng: np.random.Generator) -> float:
    """Write a tar of training images with two images per class; return their mean size in bytes."""
    from aim_jax.data.imagenet import wordnet_ids

    def add(archive, name, data):
        member = tarfile.TarInfo(name)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))

    jpegs = [random_jpeg(rng) for _ in range(50)]
    deck = itertools.cycle(jpegs)
    with tarfile.open(path, "w") as outer:
        for wordnet_id in wordnet_ids():
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for number in range(2):
                    add(archive, f"{wordnet_id}_{number}.JPEG", next(deck))
            add(outer, f"{wordnet_id}.tar", inner.getvalue())
    return float(np.mean([len(jpeg) for jpeg in jpegs]))


def seconds(work) -> float:
    """Return the seconds that `work()` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure_pictures(work: Path, pictures: int) -> dict[str, float]:
    """Measure images per second of index, decode and encode."""
    import jax

    from aim_jax.data import ImageSpec, open_images, preprocess
    from aim_jax.models import VQConfig
    from aim_jax.models.vq import init_params
    from aim_jax.weights.pretrained import Pretrained
    from aim_jax.weights.tokenizer import local_encoder

    rng = np.random.default_rng(0)
    tar = work / "ILSVRC2012_img_train.tar"
    print(f"{write_tar(tar, rng) / 1000:.0f} KB per image of {SIZE[0]}x{SIZE[1]}", flush=True)
    rates = {"index": 2000 / seconds(lambda: open_images("imagenet2012", "train", work))}
    source = open_images("imagenet2012", "train", work)
    spec = ImageSpec(256)
    load = lambda index: preprocess(source[index]["image"], spec)  # noqa: E731
    count = min(len(source), 20 * pictures)
    rates["decode, one thread"] = count / seconds(lambda: [load(i) for i in range(count)])
    with ThreadPoolExecutor() as pool:
        rates["decode, all threads"] = count / seconds(lambda: list(pool.map(load, range(count))))
    vq = VQConfig()
    tokenizer = Pretrained(
        "random",
        vq_config=vq,
        vq_params=jax.jit(init_params, static_argnums=0)(vq, jax.random.key(0)),
    )
    encode, devices = local_encoder(tokenizer)
    batches = np.stack([load(i) for i in range(pictures)]).reshape(-1, devices, 256, 256, 3)
    np.asarray(encode(batches[0]))  # compiles
    rates["encode"] = pictures / seconds(lambda: [np.asarray(encode(batch)) for batch in batches])
    return rates


def measure_cache(work: Path, views: int, examples: int) -> dict[str, float]:
    """Measure GB/s of writing and opening a cache of random tokens, and examples/s of batches."""
    from aim_jax.data import CacheWriter, TokenCache, token_batches

    rng = np.random.default_rng(0)
    writer = CacheWriter(
        work / f"codes_{views}", tokenizer="random", vocab_size=CODES, grid=(16, 16),
        class_names=map(str, range(1000)), views=map(str, range(views)), num_examples=examples,
    )  # fmt: skip
    size = len(writer.ranges[0])
    tokens = rng.integers(0, CODES, (size, views, TOKENS), dtype=np.uint16)
    labels = rng.integers(0, 1000, size, dtype=np.int32)

    def write():
        for shard, rows in enumerate(writer.ranges):
            writer.write(shard, tokens[: len(rows)], labels[: len(rows)])

    gigabytes = examples * (views * TOKENS * 2 + 4) / 1e9
    rates = {"write, GB/s": gigabytes / seconds(write)}
    writer.finish()
    rates["open, GB/s"] = gigabytes / seconds(lambda: TokenCache.open(writer.path))
    cache = TokenCache.open(writer.path)
    for name, caches in (("batches", [cache]), ("batches, mixed", [cache, cache])):
        batches = token_batches(caches, 256, train=True)
        next(batches)
        elapsed = seconds(lambda batches=batches: [next(batches) for _ in range(100)])
        rates[f"{name}, examples/s"] = 25_600 / elapsed
    return rates


def duration(seconds: float) -> str:
    """Format a duration in seconds, minutes or hours."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def main(argv=None) -> int:
    """Run the measurements and print the rates."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="directory for temporary files")
    parser.add_argument("--pictures", type=int, default=16, help="images to encode")
    parser.add_argument("--examples", type=int, default=131_072, help="examples per cache")
    args = parser.parse_args(argv)
    from benchmarks.decode_cpu import surroundings

    print(json.dumps(surroundings()))
    args.work.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=args.work))
    try:
        for name, rate in measure_pictures(work, args.pictures).items():
            print(f"{name:28}{rate:12,.1f} /s  {duration(IMAGES / rate):>10}", flush=True)
        for views in (2, 10):
            total = IMAGES * (views * TOKENS * 2 + 4) / 1e9
            print(f"{views} views: {total:.2f} GB")
            for name, rate in measure_cache(work, views, args.examples).items():
                needed = (total if "GB" in name else IMAGES) / rate
                print(f"{name:28}{rate:12,.2f}     {duration(needed):>10}", flush=True)
    finally:
        shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
