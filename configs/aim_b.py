"""AiM-B (148M parameters) on ImageNet 256x256 (arXiv 2408.12245, table 2: FID 3.52, IS 250.1).

300 epochs of global batch 2048; learning rate 1e-4 per 256 images, linear decay, bfloat16.

python launch/train.py --config configs/aim_b.py --workdir runs/aim_b
"""

import dataclasses

from aim_jax.config import aim_defaults
from aim_jax.models import PRESETS

EPOCHS, BATCH_SIZE, IMAGES = 300, 2048, 1_281_167


def get_config():
    config = aim_defaults()
    config.tokenizer = "runs/vq_f16"
    config.codes = "codes/imagenet"
    config.batch_size = BATCH_SIZE
    config.steps = EPOCHS * IMAGES // BATCH_SIZE
    config.save_every = config.eval_every = config.sample_every = 5000
    config.optimizer.lr = 1e-4 * BATCH_SIZE / 256
    config.mesh.fsdp = True
    config.model.update(dataclasses.asdict(PRESETS["B"]))
    config.model.compute_dtype = "bfloat16"
    config.model.remat = "dots"
    config.model.chunk_size = 256  # one chunk: no states in memory
    return config
