"""Defaults of training and evaluation, which the recipes in `configs/` start from.

A configuration describes a run; modules never see it. Every field can be overridden on the command
line: `--config.optimizer.lr=3e-4`.
"""

import dataclasses

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from aim_jax.models.config import AiMConfig
from aim_jax.models.lora import LoRA
from aim_jax.sampling.config import SETTINGS, SamplingConfig


def _common() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.batch_size = 256  # over all devices
    config.steps = 100_000
    config.log_every = 50
    config.eval_every = 1000
    config.sample_every = 1000
    config.save_every = 1000
    config.save_minutes = 10.0  # minutes between saves, beside those by steps; 0: none by time
    config.export_every = 0  # steps between exports of the model directory; 0: only at the end
    config.keep = 2  # number of newest checkpoints to keep
    config.profile = ""  # "FIRST:LAST" steps to trace into workdir/profile
    config.ema_decay = 0.0  # 0: no averaged copy of the parameters
    config.accumulate = 1  # micro-batches per step
    config.init = ""  # model directory or bundled model whose weights training starts from
    config.export_dtype = "float32"  # storage dtype of the exported model directory

    config.optimizer = ConfigDict()
    config.optimizer.lr = 1e-4
    config.optimizer.end_lr = 0.0
    config.optimizer.schedule = "linear"  # or "cosine", "constant"
    config.optimizer.warmup_steps = 0
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.95
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip_norm = 1.0  # 0: no clipping
    config.optimizer.spike_factor = 0.0  # skip gradients this many times the usual norm; 0: off
    config.optimizer.skip_limit = 10  # number of consecutive skipped steps that ends the run

    config.data = ConfigDict()
    config.data.name = "imagenet2012"  # see aim_jax.data.open_images
    config.data.dir = ""  # directory of the images; "": the default of tensorflow-datasets
    config.data.image_size = 256
    config.data.channels = 3
    config.data.fit = "resize"  # or "pad"
    config.data.resize_size = 0  # shorter side before the crop; 0: default of the pipeline
    config.data.random_crop = False
    config.data.random_flip = False
    config.data.workers = 0  # processes that decode images; 0 uses threads

    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices along the batch; -1: all remaining devices
    config.mesh.model = 1  # devices along heads, inner channels and vocabulary
    config.mesh.slices = 1  # slices of a TPU pod, or other device groups, also along the batch
    config.mesh.fsdp = False  # shard the embed axis of parameters over "data" as well
    return config


def aim_defaults() -> ConfigDict:
    """Return the defaults of training AiM on tokens."""
    config = _common()
    config.stage = "aim"
    config.tokenizer = ""  # model directory of the tokenizer, or the name of a bundled model
    # Directory with train/ and validation/ token caches, or several to mix: "codes/a,codes/b:0.5"
    # samples images of b half as often as those of a. "": encode images on the fly.
    config.codes = ""
    # File of the text tokenizer of a model with condition="text"; see aim-jax train_text_tokenizer.
    config.text_tokenizer = ""
    # File of the captions' features, instead, of a model with caption_features; see
    # docs/text_to_image.md.
    config.caption_features = ""
    config.model = ConfigDict(dataclasses.asdict(AiMConfig()))
    config.model.scan_implementation = placeholder(str)  # None chooses by the devices
    # Adapters of config.init, which is kept as it is; see docs/training.md. rank 0: none, all
    # parameters are trained. alpha 0: twice the rank.
    config.lora = ConfigDict(dataclasses.asdict(LoRA()))
    config.sample = ConfigDict(SamplingConfig().numbers() | {"per_class": 8, "classes": 10})
    return config


def imagenet_recipe(size: str, epochs: int) -> ConfigDict:
    """Return the paper's training recipe for ImageNet at 256 pixels (arXiv 2408.12245, 4.1).

    AdamW with betas 0.9 and 0.95 and weight decay 0.05, learning rate 1e-4 per 256 images of a
    global batch of 2048, linear decay without warm-up, class dropout 0.1, bfloat16, no averaged
    parameters.

    Args:
      size: "B", "L", "XL" or "1B".
      epochs: Passes over the 1,281,167 training images.
    """
    from aim_jax.models import PRESETS

    config = aim_defaults()
    config.tokenizer = "runs/vq_f16"
    config.codes = "codes/imagenet"
    config.batch_size = 2048
    config.steps = epochs * 1_281_167 // config.batch_size
    config.save_every = config.eval_every = config.sample_every = 5000
    config.export_every = 50_000
    config.optimizer.lr = 1e-4 * config.batch_size / 256
    config.mesh.fsdp = True
    config.model.update(dataclasses.asdict(PRESETS[size]))
    # Choices of computation only; benchmarks/footprints.py compares them.
    config.model.compute_dtype = "bfloat16"
    config.model.chunk_size = 256
    config.model.remat = "dots"
    return config


def text_recipe(size: str, steps: int) -> ConfigDict:
    """Return a recipe for text to image at 256 pixels, with the optimization of `imagenet_recipe`.

    Captions have up to 64 of 16,384 tokens.

    Args:
      size: "B", "L", "XL" or "1B".
      steps: Steps of 1024 images.
    """
    config = imagenet_recipe(size, epochs=1)
    config.codes = "codes/captioned"
    config.text_tokenizer = "runs/text_tokenizer.json"
    config.batch_size = 1024
    config.steps = steps
    config.optimizer.lr = 1e-4 * config.batch_size / 256
    config.optimizer.warmup_steps = 5000
    config.ema_decay = 0.9999
    config.model.update(condition="text", num_classes=0, max_caption=64, caption_vocab=16384)
    return config


def vq_defaults() -> ConfigDict:
    """Return the defaults of training the VQ tokenizer on images, with the squared error alone."""
    from aim_jax.models.config import VQConfig
    from aim_jax.training.losses import LossConfig

    config = _common()
    config.stage = "vq"
    config.batch_size = 128
    config.optimizer.schedule = "constant"
    config.optimizer.weight_decay = 0.0
    config.model = ConfigDict(dataclasses.asdict(VQConfig()))
    config.loss = ConfigDict(dataclasses.asdict(LossConfig()))
    config.discriminator = ConfigDict({"ch": 64, "depth": 3})  # fields of PatchGAN
    config.lpips = ""  # weights of the perceptual loss; "": the file that AIM_JAX_LPIPS names
    config.restart_codes = 0  # steps between resets of dead codes; 0: never
    config.decoder_only = False  # keep config.init's encoder and codebook, and so its tokens
    # Weights of the Inception network, for rFID at every evaluation; "": none.
    config.inception = ""
    config.sample = ConfigDict({"images": 16})
    return config


def eval_defaults() -> ConfigDict:
    """Return the defaults of evaluation; unset sampling settings are those of the model."""
    config = ConfigDict()
    config.stage = "eval"
    config.num_samples = 10_000
    config.batch_size = 64  # per process
    config.seed = 0
    # Prompts of a model of captions: a text file of one caption per line, or NAME:SPLIT of a
    # dataset. "": those of the reference.
    config.captions = ""
    config.neighbour_images = 10_000  # per set, for precision, recall, KID and neighbours
    config.sample = ConfigDict()
    for name, setting in SETTINGS.items():
        config.sample[name] = placeholder(setting.kind)
    config.sample.cfg_schedule = placeholder(str)
    # Preprocessing of the reference images where the model does not define it.
    config.data = _common().data
    config.data.image_size = 0
    for name in ("name", "workers", "random_crop", "random_flip"):  # used in training only
        del config.data[name]
    return config


def llamagen_recipe() -> ConfigDict:
    """Return LlamaGen's training recipe of tokenizers on ImageNet at 256 pixels.

    The source is arXiv 2406.06525, section 2.1. 400k steps of batch 128 are 40 epochs. The losses
    are squared error and LPIPS and, from step 20,000 on, a discriminator. Needs the weights of
    LPIPS (config.lpips).
    """
    config = vq_defaults()
    config.steps = 400_000
    config.save_every = config.eval_every = config.sample_every = 5000
    config.export_every = 50_000
    config.loss.perceptual = 1.0
    config.loss.adversarial = 0.5
    config.loss.adversarial_start = 20_000
    config.data.workers = 8
    config.data.random_crop = True
    config.data.random_flip = True
    config.mesh.fsdp = True
    config.model.compute_dtype = "bfloat16"
    return config
