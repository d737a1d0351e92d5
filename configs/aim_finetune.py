r"""Fine-tuning of converted AiM-B weights on your images: class folders, encoded in advance.

20 epochs of 50,000 images at a tenth of the learning rate, with averaged parameters and the
positions that the weights were trained with. Another number of classes gets a new class table. The
side of larger images is named after a colon, aim_finetune:384 or aim_finetune:512; positions are
interpolated. Encode the images at the same size: aim-jax extract_codes --image_size 384.

aim-jax train --config aim_finetune --workdir runs/mine \
  --config.init=models/aim_b --config.tokenizer=models/aim_b --config.codes=codes/mine \
  --config.model.num_classes=10
"""

from ml_collections import ConfigDict

from aim_jax.configs.defaults import imagenet_recipe


def get_config(side: str = "256") -> ConfigDict:
    """Return the configuration for images of a side in pixels."""
    if not side.isdecimal() or int(side) % 16 or not int(side):
        raise ValueError(f"image size {side!r}: expected a multiple of 16, such as 384.")
    config = imagenet_recipe("B", epochs=300)
    config.data.image_size = int(side)
    config.model.num_tokens = (int(side) // 16) ** 2
    config.init = config.tokenizer = "models/aim_b"
    config.codes = "codes/mine"
    config.batch_size = 256
    config.steps = 20 * 50_000 // config.batch_size
    config.save_every = config.eval_every = config.sample_every = 500
    config.export_every = 0
    config.optimizer.update(lr=1e-5, schedule="cosine", warmup_steps=200)
    config.ema_decay = 0.999
    return config
