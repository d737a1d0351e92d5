"""Analytic floating-point operations of AiM: matrix products and scans, a multiply-add being two.

XLA's own count takes the body of a loop once, so it does not see the layers of a scan.
"""

from aim_jax.models.aim import AiMConfig
from aim_jax.ops.reference import split_length


def forward_flops(config: AiMConfig, tokens: int | None = None) -> float:
    """Operations of the forward pass over one sequence, as the training scan computes it.

    Embedding lookups, norms, convolutions, gates and softmax are left out: they are bound by
    memory, and below 1 % of the operations.

    Args:
      tokens: length; `config.num_tokens` by default.
    """
    t = config.num_tokens if tokens is None else tokens
    d, e, n = config.d_model, config.d_inner, config.d_state
    if config.mixer == "mamba2":
        groups = config.ngroups
        chunks, q = split_length(t, config.chunk_size)
        projections = d * (2 * e + 2 * groups * n + config.n_heads) + e * d
        # Per token: C B^T and the weighted sum inside a chunk; the state that leaves it and what
        # the state that entered it contributes (sections 6 and 7 of arXiv 2405.21060).
        scan = q * (groups * n + e) + (2 * e * n if chunks > 1 else 0)
    else:
        r = config.dt_rank
        projections = 2 * d * e + e * (r + 2 * n) + r * e + e * d
        scan = 4.5 * e * n  # elementwise: 9 operations per channel and state
    mlp = 3 * d * config.mlp_hidden
    groups = config.num_groups if config.adaln == "group" else config.n_layer
    modulation = groups * config.modulation_parts * d * d + 2 * d * d
    layers = config.n_layer * t * (projections + scan + mlp)
    return 2.0 * (layers + t * d * config.vocab_size + modulation)


def training_flops(config: AiMConfig) -> float:
    """Operations of one image's forward and backward pass; recomputation (remat) is not counted."""
    return 3 * forward_flops(config)
