"""Tokenizer f4 for CIFAR-10: 32x32 colour, 64 tokens of 1024 codes.

python launch/train_vq.py --config configs/cifar10_vq.py --workdir runs/cifar10_vq

After a colon, which part: whole (the default); decoder, which gets sharper with LPIPS while the
codes stay the same; or adversarial, the decoder once more, with a discriminator as well:

python launch/train_vq.py --config configs/cifar10_vq.py:decoder --workdir runs/cifar10_decoder \
  --config.lpips=lpips.safetensors
python launch/train_vq.py --config configs/cifar10_vq.py:adversarial \
  --workdir runs/cifar10_adversarial --config.lpips=lpips.safetensors
"""

from aim_jax.config import vq_defaults

MODEL = ("whole", "decoder", "adversarial")


def get_config(part="whole"):
    if part not in MODEL:
        raise ValueError(f"part {part!r}; expected one of {', '.join(MODEL)}.")
    config = vq_defaults()
    config.batch_size = 32
    config.steps = {"whole": 1200, "decoder": 420, "adversarial": 2400}[part]
    config.log_every = 50
    every = {"whole": 200, "decoder": 210, "adversarial": 400}[part]
    config.eval_every = config.sample_every = config.save_every = config.export_every = every
    config.export_dtype = "float16"
    config.ema_decay = 0.995 if part == "adversarial" else 0.99
    config.optimizer.lr = 3e-4 if part == "adversarial" else 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100 if part == "whole" else 50
    config.data.name = "cifar10"
    config.data.image_size = 32
    config.data.random_flip = True
    config.model.update(
        ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=64, embed_dim=8, n_embed=1024,
        entropy_loss_ratio=0.05,
    )  # fmt: skip
    if part != "whole":
        config.init = "runs/cifar10_vq" if part == "decoder" else "runs/cifar10_decoder"
        config.decoder_only = True
        config.loss.perceptual = 1.0
    if part == "adversarial":
        config.loss.adversarial = 0.5
        config.discriminator.depth = 2  # at depth 3 a patch is larger than the picture
    return config
