"""Tokenizer f4 for CIFAR-10: 32x32 colour, 64 tokens of 1024 codes.

python launch/train_vq.py --config configs/cifar10_vq.py --workdir runs/cifar10_vq

After a colon, which part: whole (the default), with the squared error; full, which goes on from
there with LPIPS and a discriminator; decoder, which gets sharper with LPIPS while the codes stay
the same; or adversarial, the decoder once more, with a discriminator as well:

python launch/train_vq.py --config configs/cifar10_vq.py:full --workdir runs/cifar10_vq_full \
  --config.lpips=lpips.safetensors

python launch/train_vq.py --config configs/cifar10_vq.py:decoder --workdir runs/cifar10_decoder \
  --config.lpips=lpips.safetensors
python launch/train_vq.py --config configs/cifar10_vq.py:adversarial \
  --workdir runs/cifar10_adversarial --config.lpips=lpips.safetensors
"""

from aim_jax.config import vq_defaults

PARTS = ("whole", "full", "decoder", "adversarial")


def get_config(part="whole"):
    if part not in PARTS:
        raise ValueError(f"part {part!r}; expected one of {', '.join(PARTS)}.")
    adversarial = part in ("full", "adversarial")
    config = vq_defaults()
    config.batch_size = 32
    config.steps = {"whole": 1200, "full": 4000, "decoder": 420, "adversarial": 2400}[part]
    config.log_every = 50
    every = {"whole": 200, "full": 400, "decoder": 210, "adversarial": 400}[part]
    config.eval_every = config.sample_every = config.save_every = config.export_every = every
    config.export_dtype = "float16"
    config.ema_decay = 0.995 if adversarial else 0.99
    config.optimizer.lr = 3e-4 if adversarial else 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup_steps = 100 if part in ("whole", "full") else 50
    config.data.name = "cifar10"
    config.data.image_size = 32
    config.data.random_flip = True
    config.model.update(
        ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=64, embed_dim=8, n_embed=1024,
        entropy_loss_ratio=0.05,
    )  # fmt: skip
    if part != "whole":
        config.init = "runs/cifar10_decoder" if part == "adversarial" else "runs/cifar10_vq"
        config.decoder_only = part != "full"
        config.loss.perceptual = 1.0
    if adversarial:
        config.loss.adversarial = 0.5
        config.discriminator.depth = 2  # at depth 3 a patch is larger than the picture
    return config
