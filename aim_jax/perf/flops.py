"""Analytic floating-point operations of AiM: matrix products and scans, a multiply-add being two.

XLA's own count takes the body of a loop once, so it does not see the layers of a scan.
"""

from aim_jax.models.config import AiMConfig
from aim_jax.ops.reference import split_length


def forward_flops(config: AiMConfig) -> float:
    """Operations of the forward pass over one sequence, as the training scan computes it.

    Embedding lookups, norms, convolutions, gates and softmax are left out: they are bound by
    memory, and below 1 % of the operations.
    """
    t, d, e, n = config.num_tokens, config.d_model, config.d_inner, config.d_state
    if config.mixer == "mamba2":
        projections = d * (2 * e + 2 * config.ngroups * n + config.n_heads) + e * d
    else:
        r = config.dt_rank
        projections = 2 * d * e + e * (r + 2 * n) + r * e + e * d
    mlp = 3 * d * config.mlp_hidden
    groups = config.num_groups if config.adaln == "group" else config.n_layer
    modulation = groups * config.modulation_parts * d * d + 2 * d * d
    products = config.n_layer * (projections + mlp) + d * config.vocab_size
    return 2.0 * (t * products + modulation) + scan_flops(config, t)


def scan_flops(config: AiMConfig, tokens: int) -> float:
    """The part of the scans in `forward_flops`."""
    e, n = config.d_inner, config.d_state
    if config.mixer == "mamba2":
        chunks, q = split_length(tokens, config.chunk_size)
        # Per token: C B^T and the weighted sum inside a chunk; the state that leaves it and what
        # the state that entered it contributes (sections 6 and 7 of arXiv 2405.21060).
        per_token = q * (config.ngroups * n + e) + (2 * e * n if chunks > 1 else 0)
    else:
        per_token = 4.5 * e * n  # elementwise: 9 operations per channel and state
    return 2.0 * config.n_layer * tokens * per_token


def training_flops(config: AiMConfig) -> float:
    """Operations of one image's forward and backward pass; recomputation (remat) is not counted."""
    return 3 * forward_flops(config)


def executed_flops(config: AiMConfig) -> float:
    """`training_flops` and what `config.remat` and `config.logits_chunk` compute a second time."""
    t = config.num_tokens
    in_chunks = 0 < config.logits_chunk < t
    repeated = 2.0 * t * config.d_model * config.vocab_size if in_chunks else 0.0
    if config.remat == "full":
        repeated += forward_flops(config) - 2.0 * t * config.d_model * config.vocab_size
    elif config.remat == "dots":  # products over a batch axis are not kept
        repeated += scan_flops(config, t)
    return training_flops(config) + repeated
