"""The decoder of the bundled CIFAR-10 tokenizer, with LPIPS too: sharper pictures, same codes.

python launch/train_vq.py --config configs/cifar10_decoder.py --workdir runs/cifar10_decoder \
  --config.lpips=lpips.safetensors
"""

from aim_jax.config import vq_defaults


def get_config():
    config = vq_defaults()
    config.init = "cifar10"
    config.decoder_only = True
    config.batch_size = 32
    config.steps = 420
    config.log_every = 50
    config.eval_every = config.sample_every = config.save_every = config.export_every = 210
    config.export_dtype = "float16"
    config.ema_decay = 0.99
    config.loss.perceptual = 1.0
    # A discriminator as well was worse here: docs/tokenizer.md.
    config.optimizer.lr = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 50
    config.data.name = "cifar10"
    config.data.image_size = 32
    config.data.random_flip = True
    config.model.update(
        ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=64, embed_dim=8, n_embed=1024,
        entropy_loss_ratio=0.05,
    )  # fmt: skip
    return config
