"""Training step of the tokenizer in plain PyTorch: the official mathematics, autograd and AdamW.

With `critic` and `lpips`, the step has the perceptual and the adversarial loss and trains the
discriminator, as in `aim_jax.training.losses`. Arrays are channels_last, PyTorch's faster layout
for convolutions on CPUs.
"""

import dataclasses
import math
import sys

try:
    import torch
    from torch.nn import functional as F
except ImportError:
    sys.exit("The peer requires PyTorch; run pip install torch.")

from aim_jax.models import VQConfig
from aim_jax.models.lpips import BLOCKS, SCALE, SHIFT

LAYOUT = torch.channels_last


def as_conv(kernel):
    """Convert a kernel (h, w, in, out) to a tensor (out, in, h, w)."""
    return torch.from_numpy(kernel.copy()).permute(3, 2, 0, 1).contiguous(memory_format=LAYOUT)


def lpips_tensors(params: dict) -> dict:
    """Convert the parameters of `aim_jax.models.lpips` to tensors."""
    return {
        name: (as_conv(p["kernel"]), torch.from_numpy(p["bias"].copy()))
        if name.startswith("conv")
        else torch.from_numpy(p.copy())
        for name, p in params.items()
    }


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the optimizers and the decay of the averaged parameters."""

    lr: float
    b1: float
    b2: float
    weight_decay: float
    clip_norm: float
    ema_decay: float


class Trainer:
    """Parameters by official key, with an optimizer that takes steps on batches.

    Args:
      weights: NumPy arrays of the tokenizer by official key.
      config: configuration of the tokenizer.
      settings: see there.
      lpips: parameters of LPIPS, or None for the squared error alone.
      critic: parameters of a PatchGAN, needed with `lpips`.
      adversarial: weight of the adversarial loss.
      compiled: use torch.compile for the networks.
    """

    def __init__(
        self, weights: dict, config: VQConfig, settings: Settings, lpips: dict | None = None,
        critic: dict | None = None, adversarial: float = 0.0, compiled: bool = False,
    ):  # fmt: skip
        def parameter(tensor):
            layout = LAYOUT if tensor.ndim == 4 else torch.contiguous_format
            return torch.nn.Parameter(tensor.contiguous(memory_format=layout))

        self.w = {
            key.removeprefix("vqvae."): parameter(torch.from_numpy(tensor.copy()))
            for key, tensor in weights.items()
        }
        self.cfg = config
        self.settings = settings
        self.adversarial = adversarial
        self.lpips = lpips and lpips_tensors(lpips)
        self.critic = {}
        for layer, arrays in (critic or {}).items():
            for name, array in arrays.items():
                tensor = as_conv(array) if name == "kernel" else torch.from_numpy(array.copy())
                self.critic[f"{layer}.{name}"] = parameter(tensor)
        self.optimizer = self.adamw(self.w)
        self.critic_optimizer = self.adamw(self.critic) if critic else None
        if compiled:
            for name in ("encode", "quantize", "decode", "distance", "judge"):
                setattr(self, name, torch.compile(getattr(self, name)))
        self.ema = [x.detach().clone() for x in self.w.values()]

    def adamw(self, params):
        """Return AdamW with weight decay of kernels and embeddings."""
        s = self.settings
        groups = [
            {"params": [x for x in params.values() if x.ndim > 1], "weight_decay": s.weight_decay},
            {"params": [x for x in params.values() if x.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=s.lr, betas=(s.b1, s.b2), foreach=True)

    def conv(self, name, x, stride=1):
        """Apply a convolution with "same" padding."""
        weight = self.w[f"{name}.weight"]
        padding = weight.shape[-1] // 2 if stride == 1 else 0
        return F.conv2d(x, weight, self.w[f"{name}.bias"], stride, padding)

    def norm(self, name, x):
        """Apply a group norm with 32 groups."""
        return F.group_norm(x, 32, self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps=1e-6)

    def resnet(self, name, x):
        """Apply a residual block."""
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)))
        shortcut = f"{name}.nin_shortcut"
        return h + (self.conv(shortcut, x) if f"{shortcut}.weight" in self.w else x)

    def attention(self, name, x):
        """Apply a self-attention block over all positions."""
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")
        weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(x.shape[1]), dim=-1)
        h = (v @ weights.transpose(1, 2)).unflatten(2, x.shape[2:])
        return x + self.conv(f"{name}.proj_out", h.contiguous(memory_format=LAYOUT))

    def middle(self, name, x):
        """Apply the blocks at the smallest size."""
        x = self.attention(f"{name}.mid.1", self.resnet(f"{name}.mid.0", x))
        return self.resnet(f"{name}.mid.2", x)

    def encode(self, x):
        """Return the vectors (b, embed_dim, h, w) before quantization."""
        last = len(self.cfg.ch_mult) - 1
        x = self.conv("encoder.conv_in", x)
        for i in range(last + 1):
            level = f"encoder.conv_blocks.{i}"
            for j in range(self.cfg.num_res_blocks):
                x = self.resnet(f"{level}.res.{j}", x)
                if i == last:
                    x = self.attention(f"{level}.attn.{j}", x)
            if i != last:
                x = self.conv(f"{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        x = self.middle("encoder", x)
        x = self.conv("encoder.conv_out", F.silu(self.norm("encoder.norm_out", x)))
        return self.conv("quant_conv", x)

    def decode(self, x):
        """Return images (b, c, H, W) of quantized vectors."""
        last = len(self.cfg.ch_mult) - 1
        x = self.middle("decoder", self.conv("decoder.conv_in", self.conv("post_quant_conv", x)))
        for i in range(last + 1):
            level = f"decoder.conv_blocks.{i}"
            for j in range(self.cfg.num_res_blocks + 1):
                x = self.resnet(f"{level}.res.{j}", x)
                if i == 0:
                    x = self.attention(f"{level}.attn.{j}", x)
            if i != last:
                x = self.conv(f"{level}.upsample.conv", F.interpolate(x, scale_factor=2))
        return self.conv("decoder.conv_out", F.silu(self.norm("decoder.norm_out", x)))

    def quantize(self, z):
        """Return quantized vectors with straight-through gradients, and the codebook's loss."""
        cfg = self.cfg
        book = F.normalize(self.w["quantize.embedding.weight"], dim=-1)
        z = F.normalize(z.permute(0, 2, 3, 1), dim=-1)
        flat = z.reshape(-1, cfg.embed_dim)
        distances = (flat**2).sum(1, keepdim=True) + (book**2).sum(1) - 2 * flat @ book.T
        quantized = book[distances.argmin(1)].view(z.shape)
        loss = F.mse_loss(quantized, z.detach()) + cfg.beta * F.mse_loss(quantized.detach(), z)
        if cfg.entropy_loss_ratio:
            affinity = -distances / 0.01
            probs = torch.softmax(affinity, dim=-1)
            log_probs = torch.log_softmax(affinity + 1e-5, dim=-1)
            mean = probs.mean(0)
            entropy = -(mean * torch.log(mean + 1e-5)).sum()
            sample = -(probs * log_probs).sum(-1).mean()
            loss = loss + cfg.entropy_loss_ratio * (sample - entropy)
        return (z + (quantized - z).detach()).permute(0, 3, 1, 2), loss

    def distance(self, a, b):
        """Return the mean LPIPS of two batches."""
        shift, scale = (torch.from_numpy(v).view(3, 1, 1) for v in (SHIFT, SCALE))
        x = (torch.cat([a, b]) - shift) / scale
        total = 0.0
        number = 0
        for i, widths in enumerate(BLOCKS):
            x = F.max_pool2d(x, 2) if i else x
            for _ in widths:
                weight, bias = self.lpips[f"conv_{number}"]
                x = F.relu(F.conv2d(x, weight, bias, padding=1))
                number += 1
            unit = x / (torch.sqrt((x**2).sum(1, keepdim=True) + 1e-20) + 1e-10)
            ours, theirs = unit.chunk(2)
            head = self.lpips[f"head_{i}"].view(1, -1, 1, 1)
            total = total + F.conv2d((ours - theirs) ** 2, head).mean()
        return total

    def judge(self, x):
        """Return the logits of the discriminator."""
        w = self.critic
        depth = sum(key.startswith("norm") for key in w) // 2
        x = F.leaky_relu(F.conv2d(x, w["conv_0.kernel"], w["conv_0.bias"], 2, 1), 0.2)
        for i in range(1, depth + 1):
            x = F.conv2d(x, w[f"conv_{i}.kernel"], None, 2 if i < depth else 1, 1)
            scale, bias = w[f"norm_{i}.scale"], w[f"norm_{i}.bias"]
            x = F.leaky_relu(F.batch_norm(x, None, None, scale, bias, training=True), 0.2)
        return F.conv2d(x, w["logits.kernel"], w["logits.bias"], 1, 1)

    def step(self, images) -> tuple[float, float]:
        """Take an optimizer step on NumPy images (b, H, W, c) in [-1, 1].

        Returns:
          The loss and the gradient norm of the tokenizer.
        """
        s = self.settings
        images = torch.from_numpy(images).permute(0, 3, 1, 2)
        self.optimizer.zero_grad(set_to_none=True)
        quantized, codebook = self.quantize(self.encode(images))
        recon = self.decode(quantized)
        loss = F.mse_loss(recon, images)
        if self.lpips is None:
            loss = loss + codebook
            loss.backward()
        else:
            seen = recon.detach().requires_grad_()
            loss = F.mse_loss(seen, images) + self.distance(seen, images)
            (pull,) = torch.autograd.grad(loss, seen)
            adversarial = -self.judge(seen).mean()
            (push,) = torch.autograd.grad(adversarial, seen)
            last = self.w["decoder.conv_out.weight"]
            norms = [
                torch.autograd.grad(recon, last, part, retain_graph=True)[0].norm()
                for part in (pull, push)
            ]
            weight = self.adversarial * (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4)
            loss = loss + codebook + weight * adversarial
            torch.autograd.backward([recon, codebook], [pull + weight * push, torch.tensor(1.0)])
            self.critic_step(images, seen.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.w.values(), s.clip_norm or math.inf)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, list(self.w.values()), 1 - s.ema_decay)
        return loss.item(), norm.item()

    def critic_step(self, images, recon) -> None:
        """Train the discriminator with the hinge loss."""
        self.critic_optimizer.zero_grad(set_to_none=True)
        real = F.relu(1 - self.judge(images)).mean()
        loss = self.adversarial * 0.5 * (real + F.relu(1 + self.judge(recon)).mean())
        loss.backward()
        clip = self.settings.clip_norm or math.inf
        torch.nn.utils.clip_grad_norm_(self.critic.values(), clip)
        self.critic_optimizer.step()
