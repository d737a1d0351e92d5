"""Analytic floating-point operations of AiM and the tokenizer; a multiply-add is two.

XLA's own count includes the body of a loop only once, so it misses the layers of a scan.
"""

from aim_jax.models.config import AiMConfig, VQConfig
from aim_jax.ops.reference import split_length


def forward_flops(config: AiMConfig) -> float:
    """Count the operations of the forward pass over one sequence, with the training scan.

    The sequence of a text model begins with a caption of `max_caption` tokens, with its padding.
    Embedding lookups, norms, convolutions, gates and softmax are excluded: they are memory-bound
    and less than 1 % of the operations.
    """
    t, d, e, n = config.num_tokens, config.d_model, config.d_inner, config.d_state
    s = config.max_caption
    if config.mixer == "mamba2":
        projections = d * (2 * e + 2 * config.ngroups * n + config.n_heads) + e * d
    else:
        r = config.dt_rank
        projections = 2 * d * e + e * (r + 2 * n) + r * e + e * d
    mlp = 3 * d * config.mlp_hidden
    groups = config.num_groups if config.adaln == "group" else config.n_layer
    modulation = groups * config.modulation_parts * d * d + 2 * d * d
    products = (s + t) * config.n_layer * (projections + mlp) + t * d * config.vocab_size
    if config.is_text:
        products += modulation + d * d + s * d * config.caption_features  # the caption's own
        products += s * d * config.caption_vocab if config.text_loss_weight else 0
    return 2.0 * (products + modulation) + scan_flops(config, s + t)


def scan_flops(config: AiMConfig, tokens: int) -> float:
    """Count the operations of the scans, a part of `forward_flops`."""
    e, n = config.d_inner, config.d_state
    if config.mixer == "mamba2":
        chunks, q = split_length(tokens, config.chunk_size)
        # Per token: C B^T and the weighted sum within a chunk; the chunk's outgoing state and the
        # contribution of its incoming state (arXiv 2405.21060, sections 6 and 7).
        per_token = q * (config.ngroups * n + e) + (2 * e * n if chunks > 1 else 0)
    else:
        per_token = 4.5 * e * n  # elementwise: 9 operations per channel and state
    return 2.0 * config.n_layer * tokens * per_token


def training_flops(config: AiMConfig) -> float:
    """Count the operations of the forward and backward pass per image, without recomputation."""
    return 3 * forward_flops(config)


def executed_flops(config: AiMConfig) -> float:
    """Count `training_flops` plus recomputation by `config.remat` and `config.logits_chunk`."""
    t = config.num_tokens
    in_chunks = 0 < config.logits_chunk < t
    recomputed = 2.0 * t * config.d_model * config.vocab_size if in_chunks else 0.0
    if config.remat == "full":
        recomputed += forward_flops(config) - 2.0 * t * config.d_model * config.vocab_size
    elif config.remat == "dots":  # saves projections only
        recomputed += scan_flops(config, config.max_caption + t)
    return training_flops(config) + recomputed


def tokenizer_flops(config: VQConfig, image_size: int) -> float:
    """Count the operations of encoding and decoding one image: convolutions and attention.

    Training takes three times as many, without LPIPS and the discriminator.
    """
    return _encoder_flops(config, image_size) + _decoder_flops(config, image_size)


def _encoder_flops(config: VQConfig, side: int) -> float:
    width = config.ch
    total = _conv(side, config.in_channels, width)
    for i, mult in enumerate(config.ch_mult):
        is_last = i == len(config.ch_mult) - 1
        for _ in range(config.num_res_blocks):
            total += _block(side, width, config.ch * mult, attention=is_last)
            width = config.ch * mult
        if not is_last:
            side //= 2
            total += _conv(side, width, width)
    total += _block(side, width, width, attention=True) + _block(side, width, width)
    return total + _conv(side, width, config.z_channels)


def _decoder_flops(config: VQConfig, side: int) -> float:
    side //= config.downsampling
    width = config.ch * config.ch_mult[-1]
    total = _conv(side, config.z_channels, width)
    total += _block(side, width, width, attention=True) + _block(side, width, width)
    for i, mult in enumerate(reversed(config.ch_mult)):
        for _ in range(config.num_res_blocks + 1):
            total += _block(side, width, config.ch * mult, attention=i == 0)
            width = config.ch * mult
        if i != len(config.ch_mult) - 1:
            side *= 2
            total += _conv(side, width, width)
    return total + _conv(side, width, config.out_channels)


def _conv(side: int, channels: int, features: int, kernel: int = 3) -> float:
    return 2.0 * (side * kernel) ** 2 * channels * features


def _block(side: int, channels: int, features: int, attention: bool = False) -> float:
    """Count the operations of a residual block, and of the attention after it."""
    total = _conv(side, channels, features) + _conv(side, features, features)
    if channels != features:
        total += _conv(side, channels, features, kernel=1)
    if attention:
        total += 4 * _conv(side, features, features, kernel=1) + 4.0 * side**4 * features
    return total
