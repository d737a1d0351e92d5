"""Generate images with an exported sampler; requires jax, flatbuffers, safetensors and pillow.

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


def sample(labels, seed=0, **settings):
    """Generate one image per class id.

    Args:
      labels: class ids (b,).
      seed: integer that determines the randomness, together with the index of each image.
      **settings: cfg_scale, temperature, top_k, top_p, min_p; by default those of settings.json.

    Returns:
      Tokens int32 (b, t) and images uint8 (b, H, W, c).

    Raises:
      ValueError: if labels, seed or settings are out of range.
      TypeError: if a setting is unknown.
    """
    stored = json.loads((HERE / "settings.json").read_text())
    unknown = sorted(settings.keys() - stored["settings"].keys())
    if unknown:
        raise TypeError(f"{', '.join(unknown)}: unknown setting")
    settings = stored["settings"] | settings
    classes = stored["num_classes"]
    checks = {
        f"labels: expected class ids 0..{classes - 1}, or {classes} for the null class": len(labels)
        and all(0 <= label <= classes for label in labels),
        "seed: expected an integer from 0 to 2**32 - 1": 0 <= seed < 2**32,
        "temperature: expected a positive number": settings["temperature"] > 0,
        "top_k: expected 0 (off) or more": settings["top_k"] >= 0,
        "top_p: expected a number in (0, 1]": 0 < settings["top_p"] <= 1,
        "min_p: expected a number in [0, 1]": 0 <= settings["min_p"] <= 1,
    }
    for message, passed in checks.items():
        if not passed:
            raise ValueError(message)
    program = export.deserialize((HERE / "sampler.jax").read_bytes())
    labels = np.asarray(labels, np.int32)
    index = np.arange(len(labels), dtype=np.int32)
    per_image = {
        name: np.full(len(labels), settings[name], dtype)
        for name, dtype in stored["dtypes"].items()
    }
    weights = load_file(HERE / "weights.safetensors")
    return program.call(weights, labels, np.uint32(seed), index, per_image)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--labels", default="0,1,2", help="class ids")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cfg_scale", type=float, help="guidance scale; 1 disables guidance")
    parser.add_argument("--out", default="images.png")
    args = parser.parse_args()
    overrides = {} if args.cfg_scale is None else {"cfg_scale": args.cfg_scale}
    try:
        _, images = sample([int(label) for label in args.labels.split(",")], args.seed, **overrides)
    except ValueError as error:
        parser.error(str(error))
    Image.fromarray(np.concatenate(list(np.asarray(images)), axis=1).squeeze()).save(args.out)
    print(args.out)
