r"""Tokenizer f4 for CIFAR-10: 32x32 colour images, 64 tokens, 1024 codebook entries.

aim-jax train_vq --config cifar10_vq --workdir runs/cifar10_vq

The part is named after a colon: whole (the default) trains with the squared error alone; full
continues from its weights with LPIPS and a discriminator:

aim-jax train_vq --config cifar10_vq:full --workdir runs/cifar10_vq_full \
  --config.lpips=lpips.safetensors
"""

from ml_collections import ConfigDict

from aim_jax.configs.defaults import vq_defaults

PARTS = ("whole", "full")


def get_config(part: str = "whole") -> ConfigDict:
    """Return the configuration of one part."""
    if part not in PARTS:
        raise ValueError(f"unknown part {part!r}; expected one of {', '.join(PARTS)}.")
    full = part == "full"
    config = vq_defaults()
    config.batch_size = 32
    config.steps = 4000 if full else 1200
    config.log_every = 50
    every = 400 if full else 200
    config.eval_every = config.sample_every = config.save_every = config.export_every = every
    config.export_dtype = "float16"
    config.ema_decay = 0.995 if full else 0.99
    config.optimizer.lr = 3e-4 if full else 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100
    config.data.name = "cifar10"
    config.data.image_size = 32
    config.data.random_flip = True
    config.model.update(
        ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=64, embed_dim=8, n_embed=1024,
        entropy_loss_ratio=0.05,
    )  # fmt: skip
    if full:
        config.init = "runs/cifar10_vq"
        config.loss.perceptual = 1.0
        config.loss.adversarial = 0.5
        config.discriminator.depth = 2  # at depth 3 a patch is larger than the image
    return config
