"""PyTorch peers of decode_cpu.py, and a check that they compute the same as the library.

Example:
  python benchmarks/peers.py --size B

OfficialAiM   the decode step of the official mixer, operator by operator
TunedAiM      the same function, tuned for eager PyTorch on a CPU
HuggingFace   transformers' Mamba2ForCausalLM with the sizes of an AiM
LlamaGen      a transformer of LlamaGen-B's shape with a key-value cache
VQDecoder     the decoder of the tokenizer

The first two and the last load the same weights as the library (random, under official keys). The
program compares their logits and images with those of the library, and exits with status 1 if they
differ by more than 1e-4 of the largest value. The other two have random weights of their own; for
them, stepping through a sequence is compared with a single pass over it.

Two simplifications favour the official models: class modulation, which they recompute in every
step, is computed once per image here; and tokens are not sampled for the unguided rows, which the
official sampler does and discards.
"""

import argparse
import dataclasses
import math
import sys
import time
from pathlib import Path

import jax
import numpy as np

from aim_jax.models import PRESETS, AiM, AiMConfig, VQConfig, VQModel
from aim_jax.sampling import logits as filters
from aim_jax.weights import convert

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # find benchmarks/ from anywhere

from benchmarks.conversion import random_weights

try:
    import torch
    from torch.nn import functional as F
except ImportError:
    sys.exit("The peers require PyTorch; run pip install torch.")

TOLERANCE = 1e-4
SIZES = PRESETS | {
    "tiny": AiMConfig(vocab_size=256, num_classes=9, num_tokens=16, d_model=64, n_layer=3,
                      d_state=16, headdim=16),
}  # fmt: skip
VQ_SIZES = dict.fromkeys(PRESETS, VQConfig()) | {
    "tiny": VQConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=16, n_embed=64),
}


def as_torch(weights: dict[str, np.ndarray]) -> dict:
    """Convert NumPy arrays to tensors that share their memory."""
    return {key: torch.from_numpy(tensor) for key, tensor in weights.items()}


def with_null(labels, num_classes: int):
    """Append a null class per image to labels (b,), as (2 b,)."""
    labels = torch.as_tensor(np.asarray(labels), dtype=torch.long)
    return torch.cat([labels, torch.full_like(labels, num_classes)])


def draw(logits, top_k: int, top_p: float):
    """Sample tokens (b,) from logits (b, v) like the official sampler: top-k, top-p, draw."""
    return torch.multinomial(torch.softmax(filter_logits(logits, top_k, top_p), dim=-1), 1)[:, 0]


def filter_logits(logits, top_k: int, top_p: float):
    """Set logits (b, v) outside the k largest, then outside the nucleus, to -inf."""
    smallest = torch.topk(logits, top_k).values[:, -1:]
    logits = logits.masked_fill(logits < smallest, -math.inf)
    ordered, order = torch.sort(logits, dim=-1)
    outside = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    outside[:, -1] = False
    return logits.masked_fill(outside.scatter(1, order, outside), -math.inf)


def nucleus(logits, top_k: int, top_p: float):
    """Filter logits like `filter_logits`, but without sorting the vocabulary.

    If logits tie at the k-th place, only k tokens are kept.

    Returns:
      Probabilities (b, k), not normalized, and their tokens (b, k).
    """
    largest, tokens = torch.topk(logits, top_k)
    probs = torch.softmax(largest, dim=-1)
    before = probs.cumsum(dim=-1).sub_(probs)
    before[:, 0] = 0
    return probs.masked_fill_(before >= top_p, 0), tokens


def tuned_draw(logits, top_k: int, top_p: float):
    """Sample tokens (b,) from logits (b, v), with the distribution of `draw`."""
    probs, tokens = nucleus(logits, top_k, top_p)
    return tokens.gather(1, torch.multinomial(probs, 1))[:, 0]


def generate(peer, steps: int, *, scale=5.0, top_k=600, top_p=0.98, first: int = 0):
    """Sample tokens (b, steps) with classifier-free guidance; the rows of the peer are `with_null`.

    Args:
      peer: has `reset()`, `step(tokens, index)` -> logits, and `draw`.
      steps: number of tokens.
      scale: guidance scale.
      top_k: see `filter_logits`.
      top_p: see `filter_logits`.
      first: index of the first step.
    """
    with torch.inference_mode():
        peer.reset()
        tokens = None
        sampled = []
        for index in range(first, first + steps):
            guided, unguided = peer.step(tokens, index).chunk(2)
            token = peer.draw(unguided + (guided - unguided) * scale, top_k, top_p)
            sampled.append(token)
            tokens = torch.cat([token, token])
        return torch.stack(sampled, dim=1)


def rms_norm(x, weight, eps: float):
    """Apply RMSNorm over the last axis."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


class AiMPeer:
    """Base of both AiM peers: inputs, modulation, order of the rows.

    Attributes:
      w: tensors by official key, without the prefix of the backbone.
      labels: class of each row.
    """

    prefix = "mamba.backbone."

    def __init__(self, weights: dict, config: AiMConfig, labels):
        if config.mixer != "mamba2" or config.ngroups != 1 or config.d_intermediate:
            raise ValueError("the peers support only Mamba-2 with one SSM group and without MLPs.")
        self.w = {key.removeprefix(self.prefix): tensor for key, tensor in weights.items()}
        self.cfg = config
        self.labels = labels
        self.table = self.w["embeddings.word_embeddings.weight"]

    def embed(self, tokens, index: int):
        """Return the input (rows, d) of step `index`: the class, or the previous token."""
        if tokens is None:
            return self.w["cls_embed.embedding_table.weight"][self.labels]
        row = index - 1 + self.cfg.position_offset
        return self.table[tokens] + self.w["embeddings.position_embeddings.weight"][row]

    def modulation(self):
        """Return (shift, scale, gate) of every layer and (shift, scale) of the final layer.

        Each of them is (rows, d).
        """
        c = F.silu(self.w["cls_embed.embedding_table.weight"][self.labels])

        def adaln(name):
            return F.linear(c, self.w[f"{name}.1.weight"], self.w[f"{name}.1.bias"])

        if self.cfg.adaln == "layer":
            layers = [adaln(f"layers.{i}.adaLN_modulation") for i in range(self.cfg.n_layer)]
        else:
            groups = adaln("adaln_group").chunk(self.cfg.num_groups, dim=1)
            tables = [self.w[f"layers.{i}.scale_shift_table"] for i in range(self.cfg.n_layer)]
            layers = [groups[i % len(groups)] + table.flatten() for i, table in enumerate(tables)]
        last = adaln("final_layer.adaLN_modulation")
        return [x.chunk(3, dim=1) for x in layers], last.chunk(2, dim=1)


class OfficialAiM(AiMPeer):
    """Official decode step in eager PyTorch: rolled windows, einsums, a new state in each step."""

    def reset(self) -> None:
        """Set windows and states to zero."""
        cfg = self.cfg
        rows = len(self.labels)
        self.layers, self.last = self.modulation()
        channels = cfg.d_inner + 2 * cfg.d_state
        state = (rows, cfg.n_heads, cfg.headdim, cfg.d_state)
        self.windows = [torch.zeros(rows, channels, cfg.d_conv) for _ in self.layers]
        self.states = [torch.zeros(state) for _ in self.layers]

    draw = staticmethod(draw)

    def step(self, tokens, index: int):
        """Return logits (rows, v) after tokens (rows,), or after the class if tokens is None."""
        w = self.w
        eps = self.cfg.norm_eps
        hidden = self.embed(tokens, index)
        residual = 0.0
        for i, (shift, scale, gate) in enumerate(self.layers):
            residual = residual + hidden
            x = rms_norm(residual, w[f"layers.{i}.norm.weight"], eps) * (1 + scale) + shift
            hidden = gate * self.mix(i, x)
        x = rms_norm(residual + hidden, w["norm_f.weight"], eps)
        x = rms_norm(x, w["final_layer.norm_final.weight"], eps)
        shift, scale = self.last
        return F.linear(x * (1 + scale) + shift, self.table)

    def mix(self, i: int, x):
        """Apply the mixer of layer i to x (rows, d)."""
        cfg = self.cfg
        window = self.windows[i]
        state = self.states[i]
        n = cfg.d_state
        e = cfg.d_inner
        w = {k: self.w[f"layers.{i}.mixer.{k}"] for k in ("dt_bias", "A_log", "D", "norm.weight")}
        kernel, bias = (self.w[f"layers.{i}.mixer.conv1d.{k}"] for k in ("weight", "bias"))
        packed = F.linear(x, self.w[f"layers.{i}.mixer.in_proj.weight"])
        z, xbc, dt = packed.split([e, e + 2 * n, cfg.n_heads], dim=-1)

        window.copy_(torch.roll(window, -1, dims=-1))
        window[:, :, -1] = xbc
        xbc = F.silu(torch.sum(window * kernel[:, 0], dim=-1) + bias)

        xs, B, C = xbc.split([e, n, n], dim=-1)
        xs = xs.reshape(-1, cfg.n_heads, cfg.headdim)
        dt = F.softplus(dt + w["dt_bias"])
        decay = torch.exp(dt * -torch.exp(w["A_log"]))
        entering = torch.einsum("bh,bn,bhp->bhpn", dt, B, xs)
        state.copy_(state * decay[:, :, None, None] + entering)
        y = torch.einsum("bhpn,bn->bhp", state, C) + w["D"][:, None] * xs
        y = rms_norm(y.reshape(-1, e) * F.silu(z), w["norm.weight"], cfg.norm_eps)
        return F.linear(y, self.w[f"layers.{i}.mixer.out_proj.weight"])


def project_rows(x, weight, out):
    """Compute x W^T into `out`."""
    torch.mm(x, weight.T, out=out)


def project_columns(x, weight, out):
    """Compute x W^T into `out` as the transpose of W x^T."""
    out.copy_(torch.mm(weight, x.T).T)


def faster_projection(weights: list, rows: int):
    """Return the faster implementation of x W^T, measured over weights larger than the caches."""
    best = dict.fromkeys((project_rows, project_columns), math.inf)
    x = torch.zeros(rows, weights[0].shape[1])
    out = torch.empty(rows, weights[0].shape[0])
    for _ in range(4):
        for project in best:
            start = time.perf_counter()
            for weight in weights:
                project(x, weight, out)
            best[project] = min(best[project], time.perf_counter() - start)
    return min(best, key=best.get)


class TunedAiM(AiMPeer):
    """Decode step of `OfficialAiM`, tuned for the memory of a CPU within eager PyTorch.

    The state is updated in place, row by row, so that a row stays in the cache for its three
    passes. Convolution windows are a ring of the latest projections, which are never moved.
    Constants are folded: norm weights into modulation and output projection, A and the taps.
    """

    def __init__(self, weights: dict, config: AiMConfig, labels):
        super().__init__(weights, config, labels)
        w = self.w
        rows = len(labels)
        e, n, h, p = config.d_inner, config.d_state, config.n_heads, config.headdim
        self.mixers = []
        for i in range(config.n_layer):
            m = {k: w[f"layers.{i}.mixer.{k}"] for k in ("dt_bias", "A_log", "D", "in_proj.weight")}
            taps = w[f"layers.{i}.mixer.conv1d.weight"][:, 0].T.contiguous()
            scaled = w[f"layers.{i}.mixer.out_proj.weight"] * w[f"layers.{i}.mixer.norm.weight"]
            self.mixers.append(
                dict(into=m["in_proj.weight"], out=scaled, dt_bias=m["dt_bias"], D=m["D"][:, None],
                     A=-torch.exp(m["A_log"]), taps=taps, bias=w[f"layers.{i}.mixer.conv1d.bias"],
                     ring=torch.zeros(config.d_conv, rows, 2 * e + 2 * n + h),
                     state=torch.zeros(rows, h, p, n))
            )  # fmt: skip
        self.y = torch.empty(rows, e)
        self.out = torch.empty(rows, config.d_model)
        self.logits = torch.empty(rows, config.vocab_size)
        self.project = faster_projection([m["into"] for m in self.mixers], rows)

    draw = staticmethod(tuned_draw)

    def reset(self) -> None:
        """Set rings and states to zero and compute the modulation."""
        for mixer in self.mixers:
            mixer["ring"].zero_()
            mixer["state"].zero_()
        layers, (shift, scale) = self.modulation()
        norms = [self.w[f"layers.{i}.norm.weight"] for i in range(len(layers))]
        self.layers = [
            (shift.contiguous(), norm * (1 + scale), gate.contiguous())
            for norm, (shift, scale, gate) in zip(norms, layers, strict=True)
        ]
        self.last = shift, self.w["final_layer.norm_final.weight"] * (1 + scale)

    def step(self, tokens, index: int):
        """Return logits (rows, v) after tokens (rows,), or after the class if tokens is None.

        The next step overwrites the logits.
        """
        shape = (self.cfg.d_model,)
        eps = self.cfg.norm_eps
        residual = self.embed(tokens, index)
        for mixer, (shift, scale, gate) in zip(self.mixers, self.layers, strict=True):
            x = torch.addcmul(shift, F.rms_norm(residual, shape, eps=eps), scale)
            residual.addcmul_(gate, self.mix(mixer, x, index % self.cfg.d_conv))
        x = F.rms_norm(residual, shape, self.w["norm_f.weight"], eps)
        shift, scale = self.last
        x = torch.addcmul(shift, F.rms_norm(x, shape, eps=eps), scale)
        self.project(x, self.table, self.logits)
        return self.logits

    def mix(self, m: dict, x, slot: int):
        """Apply a mixer to x (rows, d), whose projection goes into a slot of the ring."""
        cfg = self.cfg
        ring = m["ring"]
        e, n, h, p = cfg.d_inner, cfg.d_state, cfg.n_heads, cfg.headdim
        self.project(x, m["into"], ring[slot])
        z = ring[slot, :, :e]
        dt = ring[slot, :, -h:]
        xbc = m["bias"]
        for age, tap in enumerate(reversed(m["taps"].unbind())):
            xbc = torch.addcmul(xbc, ring[slot - age, :, e:-h], tap)
        xs, B, C = F.silu(xbc, inplace=True).split([e, n, n], dim=-1)
        xs = xs.view(-1, h, p)
        dt = F.softplus(dt + m["dt_bias"])
        decay = torch.exp(dt * m["A"])[:, :, None, None]
        entering = (dt[:, :, None] * xs)[..., None]
        parts = (m["state"], decay, entering, B, C[:, None, :, None], self.y[:, None, :, None])
        for state, d, u, b, c, y in zip(*(part.unbind() for part in parts), strict=True):
            state.mul_(d).addcmul_(u, b)
            torch.bmm(state.view(1, e, n), c, out=y)
        y = self.y.view(-1, h, p).addcmul_(m["D"], xs).view(-1, e).mul_(F.silu(z))
        self.project(F.rms_norm(y, (e,), eps=cfg.norm_eps), m["out"], self.out)
        return self.out


class HuggingFace:
    """Mamba-2 language model of transformers with the sizes of an AiM and random weights.

    It has no class conditioning.
    """

    draw = staticmethod(draw)

    def __init__(self, config: AiMConfig, rows: int):
        from transformers import Mamba2Config, Mamba2ForCausalLM

        self.rows = rows
        self.model = Mamba2ForCausalLM(
            Mamba2Config(
                vocab_size=config.vocab_size, hidden_size=config.d_model, expand=config.expand,
                num_hidden_layers=config.n_layer, state_size=config.d_state, n_groups=1,
                num_heads=config.n_heads, head_dim=config.headdim, conv_kernel=config.d_conv,
                tie_word_embeddings=True,
            )
        ).eval()  # fmt: skip

    def reset(self) -> None:
        """Clear the cache."""
        self.cache = None

    def step(self, tokens, index: int):
        """Return logits (rows, v) after tokens (rows,), or after token 0 if tokens is None."""
        tokens = torch.zeros(self.rows, dtype=torch.long) if tokens is None else tokens
        out = self.model(tokens[:, None], cache_params=self.cache, use_cache=True)
        self.cache = out.cache_params
        return out.logits[:, 0]

    def forward(self, tokens):
        """Return the logits (rows, l + 1, v) of `step` for tokens (rows, l), in a single pass."""
        tokens = F.pad(tokens, (1, 0))  # `step` starts with token 0
        return self.model(tokens, use_cache=False).logits


@dataclasses.dataclass(frozen=True)
class LlamaGenConfig:
    """Sizes of a LlamaGen (arXiv 2406.06525); the defaults are LlamaGen-B at 256 pixels."""

    vocab_size: int = 16384
    num_classes: int = 1000
    grid: int = 16
    d_model: int = 768
    n_layer: int = 12
    n_heads: int = 12
    hidden: int = 2048
    norm_eps: float = 1e-5


SMALL_LLAMAGEN = LlamaGenConfig(
    vocab_size=64, num_classes=9, grid=4, d_model=64, n_layer=2, n_heads=2, hidden=96
)


class LlamaGen:
    """Transformer of SwiGLU blocks with 2D rotary positions and random weights.

    Its inputs are a class token and image tokens.
    """

    draw = staticmethod(tuned_draw)

    def __init__(self, config: LlamaGenConfig, labels):
        cfg = config
        d = config.d_model
        self.cfg = config
        self.labels = labels

        def random(*shape):
            return torch.randn(shape) * 0.02

        self.classes = random(cfg.num_classes + 1, d)
        self.table = random(cfg.vocab_size, d)
        self.head = random(cfg.vocab_size, d)
        self.norm = torch.ones(d)
        self.layers = [
            dict(qkv=random(3 * d, d), out=random(d, d), up=random(2 * cfg.hidden, d),
                 down=random(d, cfg.hidden), norm1=torch.ones(d), norm2=torch.ones(d))
            for _ in range(cfg.n_layer)
        ]  # fmt: skip
        self.cos, self.sin = self.rotations()
        length = cfg.grid**2
        head = d // cfg.n_heads
        self.cache = torch.zeros(cfg.n_layer, 2, len(labels), cfg.n_heads, length, head)

    def rotations(self):
        """Return cos and sin (positions, head / 2): half the angles encode rows, half columns."""
        quarter = self.cfg.d_model // self.cfg.n_heads // 4
        frequencies = 10000.0 ** -(torch.arange(quarter) / quarter)
        angles = torch.arange(self.cfg.grid)[:, None] * frequencies
        rows = angles.repeat_interleave(self.cfg.grid, 0)
        columns = angles.repeat(self.cfg.grid, 1)
        angles = torch.cat([rows, columns], dim=1)
        angles = torch.cat([torch.zeros(1, 2 * quarter), angles])[:-1]  # the class is not rotated
        return angles.cos(), angles.sin()

    def turn(self, x, start: int, length: int):
        """Rotate pairs of x (rows, heads, l, head) by the angles of the positions from `start`."""
        cos, sin = (table[start : start + length] for table in (self.cos, self.sin))
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    def reset(self) -> None:
        """Set the cache to zero."""
        self.cache.zero_()

    def step(self, tokens, index: int):
        """Return logits (rows, v) after tokens (rows,), or after the class if tokens is None."""
        x = self.classes[self.labels] if tokens is None else self.table[tokens]
        return self.run(x[:, None], index)[:, 0]

    def forward(self, tokens):
        """Return the logits (rows, l + 1, v) of `step` for tokens (rows, l), in a single pass."""
        self.reset()
        return self.run(torch.cat([self.classes[self.labels][:, None], self.table[tokens]], 1), 0)

    def run(self, x, start: int):
        """Return logits (rows, l, v) for inputs (rows, l, d) from position `start` on.

        l > 1 is supported only with start = 0.
        """
        cfg = self.cfg
        length = x.shape[1]
        shape = (cfg.d_model,)
        eps = cfg.norm_eps
        end = start + length
        for layer, cache in zip(self.layers, self.cache, strict=True):
            qkv = F.linear(F.rms_norm(x, shape, layer["norm1"], eps), layer["qkv"])
            q, k, v = qkv.unflatten(-1, (3, cfg.n_heads, -1)).permute(2, 0, 3, 1, 4)
            cache[0, :, :, start:end] = self.turn(k, start, length)
            cache[1, :, :, start:end] = v
            q = self.turn(q, start, length)
            keys, values = cache[:, :, :, :end]
            y = F.scaled_dot_product_attention(q, keys, values, is_causal=length > 1)
            x = x + F.linear(y.transpose(1, 2).flatten(2), layer["out"])
            gate, up = F.linear(F.rms_norm(x, shape, layer["norm2"], eps), layer["up"]).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer["down"])
        return F.linear(F.rms_norm(x, shape, self.norm, eps), self.head)


class VQDecoder:
    """Decoder of the tokenizer on tensors by official key.

    Attributes:
      memory_format: memory layout of weights and activations.
    """

    def __init__(self, weights: dict, config: VQConfig, memory_format=None):
        self.memory_format = memory_format or torch.contiguous_format
        layout = {4: self.memory_format}
        self.w = {
            key.removeprefix("vqvae."): tensor.contiguous(
                memory_format=layout.get(tensor.ndim, torch.contiguous_format)
            )
            for key, tensor in weights.items()
        }
        self.cfg = config
        self.codebook = self.w["quantize.embedding.weight"]
        if config.l2_norm:
            self.codebook = F.normalize(self.codebook, dim=-1)

    def __call__(self, tokens):
        """Decode tokens (b, t) of a square grid into uint8 images (b, H, W, c)."""
        images = self.decode(tokens)
        return ((images + 1) * 127.5).clamp_(0, 255).round_().to(torch.uint8)

    def decode(self, tokens):
        """Decode tokens (b, t) of a square grid into images (b, H, W, c) that are not clipped."""
        side = math.isqrt(tokens.shape[1])
        levels = len(self.cfg.ch_mult)
        with torch.inference_mode():
            x = self.codebook[tokens].unflatten(1, (side, side)).permute(0, 3, 1, 2)
            x = x.contiguous(memory_format=self.memory_format)
            x = self.conv("decoder.conv_in", self.conv("post_quant_conv", x))
            x = self.resnet("decoder.mid.0", x)
            x = self.attention("decoder.mid.1", x)
            x = self.resnet("decoder.mid.2", x)
            for i in range(levels):
                level = f"decoder.conv_blocks.{i}"
                for j in range(self.cfg.num_res_blocks + 1):
                    x = self.resnet(f"{level}.res.{j}", x)
                    if i == 0:
                        x = self.attention(f"{level}.attn.{j}", x)
                if i < levels - 1:
                    x = F.interpolate(x, scale_factor=2, mode="nearest")
                    x = self.conv(f"{level}.upsample.conv", x)
            x = self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", x)))
            return x.permute(0, 2, 3, 1)

    def conv(self, name: str, x):
        """Apply a convolution with "same" padding."""
        weight = self.w[f"{name}.weight"]
        return F.conv2d(x, weight, self.w[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(self, name: str, x):
        """Apply a group norm with 32 groups."""
        return F.group_norm(x, 32, self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps=1e-6)

    def resnet(self, name: str, x):
        """Apply a residual block."""
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)))
        shortcut = f"{name}.nin_shortcut"
        return h + (self.conv(shortcut, x) if f"{shortcut}.weight" in self.w else x)

    def attention(self, name: str, x):
        """Apply a self-attention block over all positions."""
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")
        weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(x.shape[1]), dim=-1)
        h = (v @ weights.transpose(1, 2)).unflatten(2, x.shape[2:])
        return x + self.conv(f"{name}.proj_out", h.contiguous(memory_format=self.memory_format))


def relative_error(actual, expected) -> float:
    """Return the largest difference over the largest expected magnitude."""
    actual = np.asarray(actual)
    expected = np.asarray(expected)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def stepped(peer, codes):
    """Return the logits (rows, l + 1, v) of a peer that steps through tokens (rows, l)."""
    with torch.inference_mode():
        peer.reset()
        inputs = [None, *codes.unbind(1)]
        return torch.stack([peer.step(x, i).clone() for i, x in enumerate(inputs)], dim=1)


def check_aim(config: AiMConfig, peers=(OfficialAiM, TunedAiM), length: int = 7) -> dict:
    """Return relative errors of the AiM peers' logits at random tokens against the library."""
    weights = random_weights(config)
    rng = np.random.default_rng(1)
    labels = with_null([config.num_classes // 5, config.num_classes - 1], config.num_classes)
    tokens = rng.integers(0, config.vocab_size, (len(labels), length + 1))
    params = convert.convert_aim(weights, config)
    apply = jax.jit(AiM(config).apply)
    with jax.default_matmul_precision("highest"):
        expected = apply({"params": params}, tokens, labels.numpy())
    inputs = torch.from_numpy(tokens[:, :-1])
    return {
        peer.__name__: relative_error(
            stepped(peer(as_torch(weights), config, labels), inputs), expected
        )
        for peer in peers
    }


def check_vq(config: VQConfig, side: int = 8) -> dict:
    """Return relative errors of the decoder's images in both memory layouts, by name."""
    weights = random_weights(config)
    tokens = np.random.default_rng(1).integers(0, config.n_embed, (1, side**2))
    params = {"params": convert.convert_vq(weights, config)}
    decode = jax.jit(lambda p, x: VQModel(config).apply(p, x, method="decode_tokens"))
    with jax.default_matmul_precision("highest"):
        expected = decode(params, tokens)
    formats = {"VQDecoder": torch.contiguous_format, "VQDecoder, NHWC": torch.channels_last}
    return {
        name: relative_error(
            VQDecoder(as_torch(weights), config, layout).decode(torch.from_numpy(tokens)), expected
        )
        for name, layout in formats.items()
    }


def check_sampler(vocab: int = 16384, top_k: int = 600, top_p: float = 0.98) -> dict:
    """Return relative errors of the filtered probabilities against the library, by name."""
    top_k = min(top_k, vocab // 2)
    logits = 3 * np.random.default_rng(1).standard_normal((4, vocab), np.float32)
    expected = jax.nn.softmax(filters.filter_logits(logits, top_k, top_p))
    logits = torch.from_numpy(logits)
    weights, tokens = nucleus(logits, top_k, top_p)
    probs = torch.zeros_like(logits).scatter(1, tokens, weights / weights.sum(1, keepdim=True))
    official = torch.softmax(filter_logits(logits, top_k, top_p), dim=-1)
    return {
        "draw": relative_error(official, expected),
        "tuned_draw": relative_error(probs, expected),
    }


def check_cached(peer, vocab: int, rows: int, length: int = 7) -> dict:
    """Return the relative error of a peer's steps against its single pass over a sequence."""
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, vocab, (rows, length)))
    with torch.inference_mode():
        error = relative_error(stepped(peer, tokens), peer.forward(tokens))
    return {type(peer).__name__: error}


def check(size: str) -> dict[str, float]:
    """Return relative errors by name for every peer that can be built."""
    config = SIZES[size]
    errors = check_aim(config) | check_sampler(config.vocab_size) | check_vq(VQ_SIZES[size])
    llama = LlamaGenConfig() if size == "B" else SMALL_LLAMAGEN
    labels = with_null([1, 2], llama.num_classes)
    errors |= check_cached(LlamaGen(llama, labels), llama.vocab_size, len(labels))
    try:
        errors |= check_cached(HuggingFace(config, 2), config.vocab_size, 2)
    except ImportError as error:
        print(f"skipping HuggingFace: {error}")
    return errors


def main(argv=None) -> int:
    """Run the checks, print the errors and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="B", choices=SIZES)
    errors = check(parser.parse_args(argv).size)
    for name, error in errors.items():
        print(f"{name:18}{error:9.1e}  {'ok' if error < TOLERANCE else 'MISS'}")
    return int(not all(error < TOLERANCE for error in errors.values()))


if __name__ == "__main__":
    sys.exit(main())
