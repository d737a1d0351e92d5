"""Training step of AiM in plain PyTorch: the official mathematics with autograd and AdamW.

At 256 tokens, the published reference operators process the entire sequence as one chunk: the
masked product (C B^T) exp(a_t - a_s) on dt x. Smaller chunks, with states between them, are also
supported.
"""

import sys

try:
    import torch
    from torch.nn import functional as F
except ImportError:
    sys.exit("The peer requires PyTorch; run pip install torch.")

from aim_jax.models import AiMConfig

BACKBONE = "mamba.backbone."


def rms_norm(x, weight, eps):
    """Apply RMSNorm over the axes of the weight."""
    return F.rms_norm(x, weight.shape, weight, eps)


def ssd(x, dt, A, B, C, chunk: int):
    """Compute the chunked scan of Mamba-2.

    Args:
      x: (b, l, h, p).
      dt: (b, l, h).
      A: (h,).
      B: (b, l, n).
      C: (b, l, n).
      chunk: tokens per chunk.

    Returns:
      y (b, l, h, p).
    """
    b, length, h, p = x.shape
    state = x.new_zeros(b, h, p, B.shape[-1])
    outputs = []
    for start in range(0, length, chunk):
        part = slice(start, start + chunk)
        log_decay = torch.cumsum(dt[:, part] * A, dim=1).transpose(1, 2)  # (b, h, q)
        inputs = x[:, part] * dt[:, part, :, None]
        q = log_decay.shape[-1]
        mask = torch.ones(q, q, dtype=torch.bool).tril()
        decays = (log_decay[..., :, None] - log_decay[..., None, :]).masked_fill(~mask, -torch.inf)
        scores = torch.einsum("bqn,bsn->bqs", C[:, part], B[:, part])
        y = torch.einsum("bhqs,bshp->bqhp", scores[:, None] * torch.exp(decays), inputs)
        if start:
            carried = torch.einsum("bqn,bhpn->bqhp", C[:, part], state)
            y = y + carried * torch.exp(log_decay).transpose(1, 2)[..., None]
        if start + chunk < length:
            to_end = torch.exp(log_decay[..., -1:] - log_decay).transpose(1, 2)[..., None]
            entering = torch.einsum("bqhp,bqn->bhpn", inputs * to_end, B[:, part])
            state = state * torch.exp(log_decay[..., -1])[..., None, None] + entering
        outputs.append(y)
    return torch.cat(outputs, dim=1)


class Trainer:
    """Parameters by official key, with an optimizer that takes steps on batches.

    Args:
      weights: NumPy arrays by official key.
      config: configuration of the model.
      chunk: tokens per chunk of the scan.
      lr: learning rate.
      compiled: use torch.compile for the loss.
    """

    def __init__(self, weights: dict, config: AiMConfig, chunk: int, lr: float, compiled: bool):
        if config.mixer != "mamba2" or config.ngroups != 1:
            raise ValueError("the peer supports only Mamba-2 with one SSM group.")
        self.w = {
            key.removeprefix(BACKBONE): torch.nn.Parameter(torch.from_numpy(tensor.copy()))
            for key, tensor in weights.items()
            if key.startswith(BACKBONE)
        }
        self.cfg = config
        self.chunk = chunk
        if compiled:
            self.loss = torch.compile(self.loss)
        self.optimizer = torch.optim.AdamW(
            self.w.values(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05, foreach=True
        )

    def mixer(self, prefix, x):
        """Apply the Mamba-2 mixer to x (b, l, d)."""
        cfg = self.cfg
        w = {
            name: self.w[f"{prefix}.{name}"]
            for name in ("in_proj.weight", "conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D",
                         "norm.weight", "out_proj.weight")
        }  # fmt: skip
        b, length, _ = x.shape
        e, n, h = cfg.d_inner, cfg.d_state, cfg.n_heads
        z, xbc, dt = F.linear(x, w["in_proj.weight"]).split([e, e + 2 * n, h], dim=-1)
        xbc = F.conv1d(
            xbc.transpose(1, 2), w["conv1d.weight"], w["conv1d.bias"],
            padding=cfg.d_conv - 1, groups=e + 2 * n,
        )[..., :length]  # fmt: skip
        xs, B, C = F.silu(xbc).transpose(1, 2).split([e, n, n], dim=-1)
        xs = xs.reshape(b, length, h, cfg.headdim)
        dt = F.softplus(dt + w["dt_bias"])
        y = ssd(xs, dt, -torch.exp(w["A_log"]), B, C, self.chunk) + w["D"][:, None] * xs
        y = rms_norm(y.reshape(b, length, e) * F.silu(z), w["norm.weight"], cfg.norm_eps)
        return F.linear(y, w["out_proj.weight"])

    def loss(self, codes, labels):
        """Return the mean loss in nats per token."""
        w = self.w
        cfg = self.cfg
        table = w["embeddings.word_embeddings.weight"]
        inputs = codes[:, :-1]
        c = w["cls_embed.embedding_table.weight"][labels]
        position = w["embeddings.position_embeddings.weight"]
        rows = torch.arange(inputs.shape[1]) + cfg.position_offset
        hidden = torch.cat([c[:, None], F.embedding(inputs, table) + position[rows]], dim=1)
        residual = torch.zeros_like(hidden)
        c = F.silu(c)
        if cfg.adaln == "group":
            shared = F.linear(c, w["adaln_group.1.weight"], w["adaln_group.1.bias"])
            shared = shared.unflatten(-1, (cfg.num_groups, 3, -1))
        for i in range(cfg.n_layer):
            if cfg.adaln == "group":
                parts = shared[:, i % cfg.num_groups] + w[f"layers.{i}.scale_shift_table"]
            else:
                adaln = f"layers.{i}.adaLN_modulation.1"
                parts = F.linear(c, w[f"{adaln}.weight"], w[f"{adaln}.bias"]).unflatten(-1, (3, -1))
            shift, scale, gate = (part[:, None] for part in parts.unbind(1))
            residual = residual + hidden
            x = rms_norm(residual, w[f"layers.{i}.norm.weight"], cfg.norm_eps)
            hidden = gate * self.mixer(f"layers.{i}.mixer", x * (1 + scale) + shift)
        x = rms_norm(residual + hidden, w["norm_f.weight"], cfg.norm_eps)
        x = rms_norm(x, w["final_layer.norm_final.weight"], cfg.norm_eps)
        adaln = "final_layer.adaLN_modulation.1"
        last = F.linear(c, w[f"{adaln}.weight"], w[f"{adaln}.bias"])[:, None]
        shift, scale = last.chunk(2, dim=-1)
        logits = F.linear(x * (1 + scale) + shift, table)
        return F.cross_entropy(logits.flatten(0, 1), codes.flatten())

    def step(self, codes, labels) -> tuple[float, float]:
        """Take an optimizer step on NumPy tokens (b, t) and labels (b,).

        Returns:
          The loss and the gradient norm.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(torch.from_numpy(codes).long(), torch.from_numpy(labels).long())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.w.values(), 1.0)
        self.optimizer.step()
        return loss.item(), norm.item()
