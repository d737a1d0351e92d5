"""AiM in plain PyTorch, straight from the equations, on tensors by official key.

A second opinion that shares nothing with the library: no code, no parameter layout, no framework.
Slow, and in the order of the recurrence, on purpose.
"""

import torch
from torch.nn import functional as F


def rms_norm(x, weight, eps=1e-5):
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def mamba2(w, prefix, x, d_state, n_heads):
    """The mixer on x (b, l, d): one token after the other."""
    b, length, _ = x.shape
    packed = x @ w[f"{prefix}.in_proj.weight"].T
    inner = w[f"{prefix}.out_proj.weight"].shape[1]
    p = inner // n_heads
    z, xbc, dt = packed.split([inner, inner + 2 * d_state, n_heads], dim=-1)
    kernel, bias = w[f"{prefix}.conv1d.weight"], w[f"{prefix}.conv1d.bias"]
    width = kernel.shape[-1]
    padded = F.pad(xbc.transpose(1, 2), (width - 1, 0))
    xbc = F.silu(F.conv1d(padded, kernel, bias, groups=kernel.shape[0])).transpose(1, 2)
    xs, B, C = xbc.split([inner, d_state, d_state], dim=-1)
    dt = F.softplus(dt + w[f"{prefix}.dt_bias"])
    A = -torch.exp(w[f"{prefix}.A_log"])
    xs = xs.reshape(b, length, n_heads, p)
    state, outputs = x.new_zeros(b, n_heads, p, d_state), []
    for t in range(length):
        decay = torch.exp(dt[:, t] * A)[:, :, None, None]
        entering = (dt[:, t, :, None] * xs[:, t])[..., None] * B[:, t, None, None, :]
        state = decay * state + entering
        y = (state * C[:, t, None, None, :]).sum(-1) + w[f"{prefix}.D"][:, None] * xs[:, t]
        outputs.append(y.reshape(b, inner))
    y = torch.stack(outputs, dim=1) * F.silu(z)
    return rms_norm(y, w[f"{prefix}.norm.weight"]) @ w[f"{prefix}.out_proj.weight"].T


def forward(w, codes, labels, *, n_layer, d_state, n_heads, num_groups=None, offset=0):
    """Logits (b, t, v) of codes (b, t) and labels (b,); num_groups None is adaLN on every layer."""
    backbone = "mamba.backbone"
    table = w[f"{backbone}.embeddings.word_embeddings.weight"]
    position = w[f"{backbone}.embeddings.position_embeddings.weight"]
    c = w[f"{backbone}.cls_embed.embedding_table.weight"][labels]
    before = codes[:, :-1]
    rows = torch.arange(before.shape[1]) + offset
    hidden = torch.cat([c[:, None], table[before] + position[rows]], dim=1)
    d, activated = c.shape[-1], F.silu(c)
    if num_groups:
        shared = activated @ w[f"{backbone}.adaln_group.1.weight"].T
        shared = (shared + w[f"{backbone}.adaln_group.1.bias"]).reshape(-1, num_groups, 3, d)
    residual = torch.zeros_like(hidden)
    for i in range(n_layer):
        layer = f"{backbone}.layers.{i}"
        if num_groups:
            parts = shared[:, i % num_groups] + w[f"{layer}.scale_shift_table"]
        else:
            parts = activated @ w[f"{layer}.adaLN_modulation.1.weight"].T
            parts = (parts + w[f"{layer}.adaLN_modulation.1.bias"]).reshape(-1, 3, d)
        shift, scale, gate = (part[:, None] for part in parts.unbind(1))
        residual = residual + hidden
        x = rms_norm(residual, w[f"{layer}.norm.weight"]) * (1 + scale) + shift
        hidden = gate * mamba2(w, f"{layer}.mixer", x, d_state, n_heads)
    x = rms_norm(residual + hidden, w[f"{backbone}.norm_f.weight"])
    x = rms_norm(x, w[f"{backbone}.final_layer.norm_final.weight"])
    last = activated @ w[f"{backbone}.final_layer.adaLN_modulation.1.weight"].T
    last = last + w[f"{backbone}.final_layer.adaLN_modulation.1.bias"]
    shift, scale = last.chunk(2, dim=-1)
    return (x * (1 + scale[:, None]) + shift[:, None]) @ table.T
