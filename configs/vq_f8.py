"""LlamaGen's VQ-f8 on ImageNet at 256 pixels (arXiv 2406.06525, table 1: rFID 0.59).

python launch/train_vq.py --config configs/vq_f8.py --workdir runs/vq_f8 --data DIR

Needs the weights of LPIPS, in config.lpips or AIM_JAX_LPIPS (docs/tokenizer.md).
"""

from aim_jax.config import llamagen_recipe


def get_config():
    config = llamagen_recipe()
    config.model.update(ch=128, ch_mult=(1, 2, 2, 4))
    return config
