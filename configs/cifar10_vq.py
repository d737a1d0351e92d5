"""Tokenizer f4 for CIFAR-10: 32x32 colour, 64 tokens of 1024 codes.

python launch/train_vq.py --config configs/cifar10_vq.py --workdir runs/cifar10_vq

After a colon, which part: whole (the default), or decoder, which gets sharper with LPIPS while the
codes stay the same:

python launch/train_vq.py --config configs/cifar10_vq.py:decoder --workdir runs/cifar10_decoder \
  --config.lpips=lpips.safetensors
"""

from aim_jax.config import vq_defaults

MODEL = ("whole", "decoder")


def get_config(part="whole"):
    if part not in MODEL:
        raise ValueError(f"part {part!r}; expected one of {', '.join(MODEL)}.")
    config = vq_defaults()
    config.batch_size = 32
    config.steps = 1200
    config.log_every = 50
    config.eval_every = config.sample_every = config.save_every = config.export_every = 200
    config.export_dtype = "float16"
    config.ema_decay = 0.99
    config.optimizer.lr = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100
    config.data.name = "cifar10"
    config.data.image_size = 32
    config.data.random_flip = True
    config.model.update(
        ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=64, embed_dim=8, n_embed=1024,
        entropy_loss_ratio=0.05,
    )  # fmt: skip
    if part == "decoder":
        config.init = "runs/cifar10_vq"
        config.decoder_only = True
        # A discriminator as well was worse; the model's card has the figures.
        config.loss.perceptual = 1.0
        config.steps = 420
        config.eval_every = config.sample_every = config.save_every = config.export_every = 210
        config.optimizer.warmup_steps = 50
    return config
