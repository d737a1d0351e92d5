r"""Fine-tuning of converted AiM-B weights on your images: class folders, encoded in advance.

20 epochs of 50,000 images at a tenth of the learning rate, with averaged parameters and the
positions that the weights were trained with. Another number of classes gets a new class table.

aim-jax train --config aim_finetune --workdir runs/mine \
  --config.init=models/aim_b --config.tokenizer=models/aim_b --config.codes=codes/mine \
  --config.model.num_classes=10
"""

from ml_collections import ConfigDict

from aim_jax.configs.defaults import imagenet_recipe


def get_config() -> ConfigDict:
    """Return the configuration."""
    config = imagenet_recipe("B", epochs=300)
    config.init = config.tokenizer = "models/aim_b"
    config.codes = "codes/mine"
    config.batch_size = 256
    config.steps = 20 * 50_000 // config.batch_size
    config.save_every = config.eval_every = config.sample_every = 500
    config.export_every = 0
    config.optimizer.update(lr=1e-5, schedule="cosine", warmup_steps=200)
    config.ema_decay = 0.999
    return config
