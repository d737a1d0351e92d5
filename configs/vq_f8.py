"""LlamaGen's VQ-f8 on ImageNet at 256 pixels (arXiv 2406.06525, table 1: rFID 0.59).

That figure needs the perceptual and adversarial losses, which this configuration does not have: it
trains reconstruction, codebook and commitment alone. 40 epochs of batch 128 are 400k steps.

python launch/train_vq.py --config configs/vq_f8.py --workdir runs/vq_f8
"""

from aim_jax.config import vq_defaults


def get_config():
    config = vq_defaults()
    config.steps = 400_000
    config.save_every = config.eval_every = config.sample_every = 5000
    config.optimizer.lr = 1e-4
    config.data.workers = 8
    config.data.random_crop = True
    config.data.random_flip = True
    config.model.update(ch=128, ch_mult=(1, 2, 2, 4))
    config.model.compute_dtype = "bfloat16"
    return config
