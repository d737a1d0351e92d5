"""Tokenizer losses: reconstruction, perceptual, adversarial and codebook.

The recipe is that of LlamaGen (arXiv 2406.06525, section 2.1), which follows VQGAN (arXiv
2012.09841, section 3.1). A discriminator is trained beside the tokenizer. The weight of the
adversarial loss follows the ratio of the gradients at the decoder's last layer.
"""

import dataclasses
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from flax.struct import dataclass

from aim_jax.models.codebook import Quantized
from aim_jax.models.config import VQConfig
from aim_jax.models.lpips import MIN_SIDE, lpips
from aim_jax.models.patchgan import PatchGAN
from aim_jax.models.vq import VQModel, encoder_params
from aim_jax.utils.checks import NOT_NEGATIVE, check_integer, check_number, check_type


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the losses; the codebook's are in `VQConfig`.

    Attributes:
      l1, l2: Weights of the mean absolute and squared error of pixels in [-1, 1].
      perceptual: Weight of LPIPS; 0 needs no LPIPS network.
      adversarial: Weight of the adversarial loss; 0 trains no discriminator.
      adversarial_start: Step from which the discriminator is trained and its loss used.
      adaptive: Also scale the adversarial weight by the ratio of the gradients at the decoder's
        last layer (arXiv 2012.09841, equation 7).
    """

    l1: float = 0.0
    l2: float = 1.0
    perceptual: float = 0.0
    adversarial: float = 0.0
    adversarial_start: int = 0
    adaptive: bool = True

    def __post_init__(self) -> None:
        for name in ("l1", "l2", "perceptual", "adversarial"):
            check_number(f"config.loss.{name}", getattr(self, name), NOT_NEGATIVE)
        check_integer("config.loss.adversarial_start", self.adversarial_start)
        check_type("config.loss.adaptive", self.adaptive, bool)
        if not self.l1 + self.l2 + self.perceptual:
            raise ValueError(
                "config.loss: l1, l2 and perceptual are all 0, so no loss compares reconstructions "
                "with images; set one of them, for example l2=1.0."
            )

    def check_size(self, side: int, discriminator: PatchGAN) -> None:
        """Raise ValueError where images of `side` pixels are too small for the networks."""
        if self.perceptual and side < MIN_SIDE:
            raise ValueError(
                f"config.loss.perceptual needs images of {MIN_SIDE} pixels or more, not {side}; "
                "set it to 0."
            )
        if self.adversarial and side < discriminator.min_side:
            raise ValueError(
                f"config.discriminator.depth={discriminator.depth} needs images of "
                f"{discriminator.min_side} pixels or more, not {side}; lower it, or set "
                "config.loss.adversarial to 0."
            )


@dataclass
class Adversary:
    """Losses and gradients of the discriminator on a batch.

    Attributes:
      loss: () adversarial loss of the tokenizer: minus the mean logit of decoded images.
      pull: Gradient of `loss` with respect to the decoded images.
      hinge: () loss of the discriminator.
      grads: Gradient of `hinge` with respect to the discriminator's parameters.
      real, fake: () mean logits of real and decoded images.
    """

    loss: jax.Array
    pull: jax.Array
    hinge: jax.Array
    grads: dict
    real: jax.Array
    fake: jax.Array


def reconstruction_loss(recon: jax.Array, images: jax.Array, l1: float, l2: float) -> jax.Array:
    """Return l1 mean(|recon - images|) + l2 mean((recon - images)^2)."""
    chex.assert_equal_shape([recon, images])  # other shapes may broadcast to a wrong mean
    error = recon - images
    return l1 * jnp.mean(jnp.abs(error)) + l2 * jnp.mean(jnp.square(error))


def judge(module: PatchGAN, params: dict, recon: jax.Array, images: jax.Array) -> Adversary:
    """Compute the hinge losses (arXiv 1705.02894) of the discriminator and of the tokenizer.

    Args:
      recon, images: (b, H, W, c), decoded and real images.
    """

    def generator_loss(recon: jax.Array) -> jax.Array:
        return -jnp.mean(module.apply({"params": params}, recon))

    def hinge(params: dict) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        real = module.apply({"params": params}, images)
        fake = module.apply({"params": params}, recon)
        loss = 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake)))
        return loss, (jnp.mean(real), jnp.mean(fake))

    loss, pull = jax.value_and_grad(generator_loss)(recon)
    (hinge_loss, (real, fake)), grads = jax.value_and_grad(hinge, has_aux=True)(params)
    return Adversary(loss, pull, hinge_loss, grads, real, fake)


def gradients(
    params: dict,
    batch: dict,
    rng: jax.Array,
    *,
    model: VQConfig,
    losses: LossConfig,
    discriminator: PatchGAN,
    lpips_params: dict | None,
    step: jax.Array,
    decoder_only: bool = False,
    implementation: str = "xla",
) -> tuple[dict, tuple[dict, jax.Array]]:
    """Compute gradients of tokenizer and discriminator, each of its own loss, on a batch.

    The decoder is differentiated once: the gradients of all losses with respect to its images are
    added first.

    Args:
      params: "vq" and, with an adversarial loss, "discriminator".
      batch: "images" (b, H, W, c) in [-1, 1].
      lpips_params: See `aim_jax.weights.convert.lpips.load_lpips`; needed with a perceptual loss.
      step: () optimizer steps done.
      decoder_only: The gradients of the encoder and the codebook are zero, and cost nothing.
      implementation: Of the tokenizer's ops; see `VQModel`.

    Returns:
      (gradients like params, (metrics, indices (b, t))).
    """
    images = batch["images"]

    def reconstruct(vq: dict) -> tuple[tuple[jax.Array, jax.Array], Quantized]:
        if decoder_only:
            vq = vq | jax.lax.stop_gradient(encoder_params(vq))
        recon, quantized = VQModel(model, implementation).apply(
            {"params": vq}, images, train=True, rngs={"dropout": rng}
        )
        codebook = quantized.vq_loss + quantized.commit_loss + quantized.entropy_loss
        return (recon, codebook), quantized

    def fidelity(recon: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        terms = {"rec_loss": reconstruction_loss(recon, images, losses.l1, losses.l2)}
        total = terms["rec_loss"]
        if losses.perceptual:
            if lpips_params is None:
                raise ValueError("config.loss.perceptual needs the weights of LPIPS.")
            distances = lpips(lpips_params, recon, images, model.compute_dtype)
            terms["lpips"] = distances.mean()
            total += losses.perceptual * terms["lpips"]
        return total, terms

    (recon, codebook), backward, quantized = jax.vjp(reconstruct, params["vq"], has_aux=True)
    (loss, metrics), pull = jax.value_and_grad(fidelity, has_aux=True)(recon)
    # The entropy loss is negative where the codebook is used evenly, and so may be the sum.
    metrics |= {
        "vq_loss": quantized.vq_loss,
        "commit_loss": quantized.commit_loss,
        "entropy_loss": quantized.entropy_loss,
    }
    loss += codebook
    grads = {}
    if losses.adversarial:
        judged = judge(discriminator, params["discriminator"], recon, images)
        weight = losses.adversarial * (step >= losses.adversarial_start).astype(jnp.float32)
        grads["discriminator"] = jax.tree.map(lambda g: weight * g, judged.grads)
        if losses.adaptive:
            weight *= adaptive_weight(backward, pull, judged.pull)
        loss += weight * judged.loss
        pull += weight * judged.pull
        metrics |= {
            "gan_loss": judged.loss, "gan_weight": weight, "hinge_loss": judged.hinge,
            "logits_real": judged.real, "logits_fake": judged.fake,
        }  # fmt: skip
    (grads["vq"],) = backward((pull, jnp.ones_like(codebook)))
    return grads, (metrics | {"loss": loss}, quantized.indices)


def adaptive_weight(
    backward: Callable[[tuple[jax.Array, jax.Array]], tuple[dict]],
    pull: jax.Array,
    adversarial_pull: jax.Array,
) -> jax.Array:
    """Return the ratio of the two gradients' norms at the decoder's last layer, at most 10,000.

    Args:
      backward: Maps cotangents of (images, codebook loss) to (gradient of the tokenizer,). The
        gradients of the other layers are not used, so XLA leaves them out.
      pull, adversarial_pull: Gradients of the losses with respect to the images.
    """

    def norm(pull: jax.Array) -> jax.Array:
        (grads,) = backward((pull, jnp.zeros((), jnp.float32)))
        return jnp.linalg.norm(grads["decoder"]["conv_out"]["kernel"])

    ratio = norm(pull) / (norm(adversarial_pull) + 1e-4)
    return jnp.clip(ratio, 0, 1e4)
