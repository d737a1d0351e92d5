"""Small AiM on CIFAR-10: 64 tokens, 10 classes.

aim-jax train --config cifar10 --workdir runs/cifar10
"""

from ml_collections import ConfigDict

from aim_jax.configs.defaults import aim_defaults


def get_config() -> ConfigDict:
    """Return the configuration."""
    config = aim_defaults()
    config.tokenizer = "runs/cifar10_vq_full"
    config.codes = "codes/cifar10"
    config.batch_size = 64
    config.steps = 4000
    config.log_every = 50
    config.eval_every = config.save_every = config.export_every = 400
    config.sample_every = 1000
    config.export_dtype = "float16"
    config.ema_decay = 0.998
    config.optimizer.lr = 2e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 200
    config.data.name = "cifar10"
    config.data.image_size = 32
    config.data.random_flip = True
    config.model.update(
        vocab_size=1024, num_classes=10, num_tokens=64, d_model=192, n_layer=6, d_state=32,
        headdim=64, adaln="group", num_groups=2, class_dropout=0.1, scan_unroll=6,
    )  # fmt: skip
    return config
