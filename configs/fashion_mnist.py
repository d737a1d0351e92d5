"""Small AiM on Fashion-MNIST: 64 tokens, 10 classes.

aim-jax train --config fashion_mnist --workdir runs/fashion_mnist
"""

from ml_collections import ConfigDict

from aim_jax.configs.defaults import aim_defaults


def get_config() -> ConfigDict:
    """Return the configuration."""
    config = aim_defaults()
    config.tokenizer = "runs/fashion_mnist_vq"
    config.codes = "codes/fashion_mnist"
    config.batch_size = 64
    config.steps = 800
    config.log_every = 50
    config.eval_every = config.save_every = config.export_every = 200
    config.sample_every = 200
    config.export_dtype = "float16"
    config.ema_decay = 0.995
    config.optimizer.lr = 3e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100
    config.data.name = "fashion_mnist"
    config.data.image_size = 32
    config.data.channels = 1
    config.data.fit = "pad"
    config.model.update(
        vocab_size=512, num_classes=10, num_tokens=64, d_model=128, n_layer=6, d_state=32,
        headdim=64, adaln="group", num_groups=2, class_dropout=0.1, scan_unroll=6,
    )  # fmt: skip
    return config
