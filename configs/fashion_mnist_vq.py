"""Tokenizer f4 for Fashion-MNIST: grey 28x28 images padded to 32x32, 64 tokens, 512 entries.

aim-jax train_vq --config fashion_mnist_vq --workdir runs/fashion_mnist_vq
"""

from ml_collections import ConfigDict

from aim_jax.configs.defaults import vq_defaults


def get_config() -> ConfigDict:
    """Return the configuration."""
    config = vq_defaults()
    config.batch_size = 32
    config.steps = 1000
    config.log_every = 50
    config.eval_every = config.sample_every = config.save_every = config.export_every = 200
    config.export_dtype = "float16"
    config.ema_decay = 0.99
    config.optimizer.lr = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100
    config.data.name = "fashion_mnist"
    config.data.image_size = 32
    config.data.channels = 1
    config.data.fit = "pad"
    config.model.update(
        in_channels=1, out_channels=1, ch=32, ch_mult=(1, 1, 2), num_res_blocks=1,
        z_channels=64, embed_dim=8, n_embed=512, entropy_loss_ratio=0.05,
    )  # fmt: skip
    return config
