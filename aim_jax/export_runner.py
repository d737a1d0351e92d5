"""Draws images with an exported sampler; needs jax, flatbuffers, safetensors and pillow.

Example:
  python sample.py --labels 3,5,8 --seed 1 --out images.png
"""

import argparse
import json
from pathlib import Path

import numpy as np
from jax import export
from PIL import Image
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
DTYPES = {"cfg_scale": "float32", "temperature": "float32", "top_k": "int32", "top_p": "float32"}


def sample(labels, seed=0, **settings):
    """Class ids (b,) -> tokens int32 (b, t), images uint8 (b, H, W, c).

    Args:
      seed: with the image's number it decides the randomness of the image.
      settings: cfg_scale, temperature, top_k, top_p; by default those of settings.json.
    """
    program = export.deserialize((HERE / "sampler.jax").read_bytes())
    settings = json.loads((HERE / "settings.json").read_text()) | settings
    labels = np.asarray(labels, np.int32)
    each = [np.full(len(labels), settings[name], dtype) for name, dtype in DTYPES.items()]
    index = np.arange(len(labels), dtype=np.int32)
    weights = load_file(HERE / "weights.safetensors")
    return program.call(weights, labels, np.uint32(seed), index, *each)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--labels", default="0,1,2", help="class ids")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cfg_scale", type=float, help="guidance; 1 is none")
    parser.add_argument("--out", default="images.png")
    args = parser.parse_args()
    given = {} if args.cfg_scale is None else {"cfg_scale": args.cfg_scale}
    _, images = sample([int(label) for label in args.labels.split(",")], args.seed, **given)
    Image.fromarray(np.concatenate(list(np.asarray(images)), axis=1).squeeze()).save(args.out)
    print(args.out)
