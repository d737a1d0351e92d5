"""Configurations of AiM and the tokenizer, and the published sizes (arXiv 2408.12245, table 1)."""

import dataclasses
import math

from aim_jax.utils.checks import (
    BELOW_ONE,
    FRACTION,
    NOT_NEGATIVE,
    check_fields,
    check_integer,
    check_number,
    shortened,
    shown,
)

MIXERS = ("mamba1", "mamba2")
REMAT = ("auto", "none", "full", "dots")
COMPUTE_DTYPES = ("float32", "bfloat16")
CONDITIONS = ("class", "text")
MOST_CAPTION = 4096  # tokens of a caption
# Fields of AiMConfig that only condition="text" has.
TEXT_FIELDS = ("max_caption", "caption_vocab", "caption_features", "text_loss_weight")
# Fields that change speed and memory; results change by rounding only.
HOW_COMPUTED = ("chunk_size", "scan_implementation", "remat", "logits_chunk", "scan_unroll")


@dataclasses.dataclass(frozen=True)
class AiMConfig:
    """Configuration of an AiM model; the defaults are AiM-B.

    Attributes:
      vocab_size: number of token values (entries of the tokenizer's codebook).
      condition: "class", or "text" for captions.
      num_classes: number of classes; a null class is added. 0 with condition="text".
      max_caption: most tokens of a caption (condition="text" only, as the next three).
      caption_vocab: number of token values of captions; 0 with `caption_features`.
      caption_features: width of the features of an external encoder that replace the tokens of
        captions; 0 means tokens.
      text_loss_weight: weight of the cross entropy of the caption's own tokens in the loss.
      num_tokens: tokens per image.
      d_model: width.
      n_layer: depth.
      mixer: "mamba2" or "mamba1".
      d_state: SSM state size.
      d_conv: convolution width.
      expand: inner width divided by d_model.
      headdim: channels per head (Mamba-2 only).
      ngroups: groups of heads that share B and C (Mamba-2 only).
      chunk_size: tokens per chunk of the training scan; changes speed, not results.
      scan_implementation: implementation of the scan over whole sequences, see
        `aim_jax.ops.implementation`: None (default), "xla", or "triton" (kernels for NVIDIA GPUs;
        those of Mamba-2 are differentiable, and None trains with them); changes speed and rounding.
        With "xla" the convolution before the scan is "xla" too; see `conv_implementation`.
      d_intermediate: width of a gated MLP after each mixer, rounded up to a multiple of 128; 0
        means no MLP.
      adaln: "layer" (one map per layer) or "group" (`num_groups` shared maps and a table per layer;
        one group is adaLN-single).
      num_groups: maps shared by the layers when adaln="group".
      positions: add position embeddings to the tokens (the paper's ablation omits them).
      position_offset: token j uses row j + position_offset of the position embeddings. 0 matches
        the paper's training, 1 its published sampler.
      class_dropout: probability that training replaces a label by the null class, or a caption by
        the null caption.
      token_dropout: dropout rate of the stack's inputs while training.
      norm_eps: constant added to mean squares.
      compute_dtype: dtype of projections and convolutions ("float32" or "bfloat16"); parameters,
        residual stream, norms, decays, states and logits are float32.
      remat: rematerialization per block in the backward pass: "none", "dots" (saves the outputs of
        projections) or "full". "auto" is what `aim_jax.training.aim.Setup` chooses for the devices,
        and "none" elsewhere.
      logits_chunk: positions per image whose logits the training loss holds at once; 0 means all.
      scan_unroll: layers per iteration of the loop over layers; n_layer unrolls it fully.
    """

    vocab_size: int = 16384
    condition: str = "class"
    num_classes: int = 1000
    max_caption: int = 0
    caption_vocab: int = 0
    caption_features: int = 0
    text_loss_weight: float = 0.0
    num_tokens: int = 256
    d_model: int = 768
    n_layer: int = 24
    mixer: str = "mamba2"
    d_state: int = 128
    d_conv: int = 4
    expand: int = 2
    headdim: int = 64
    ngroups: int = 1
    chunk_size: int = 64
    scan_implementation: str | None = None
    d_intermediate: int = 0
    adaln: str = "layer"
    num_groups: int = 1
    positions: bool = True
    position_offset: int = 0
    class_dropout: float = 0.1
    token_dropout: float = 0.0
    norm_eps: float = 1e-5
    compute_dtype: str = "float32"
    remat: str = "auto"
    logits_chunk: int = 0
    scan_unroll: int = 1

    def __post_init__(self) -> None:
        def require(ok: bool, message: str) -> None:
            if not ok:
                raise ValueError(f"AiMConfig: {message}")

        check_fields(self)
        choices = (
            ("mixer", MIXERS), ("remat", REMAT), ("compute_dtype", COMPUTE_DTYPES),
            ("condition", CONDITIONS),
        )  # fmt: skip
        for name, known in choices:
            value = getattr(self, name)
            require(value in known, f"{name}={shown(value)}; expected one of {', '.join(known)}.")
        require(
            self.scan_implementation in (None, "xla", "triton"),
            f"scan_implementation={shown(self.scan_implementation)}; expected None, 'xla' or "
            "'triton'.",
        )
        require(
            self.adaln in ("layer", "group"),
            f"adaln={shown(self.adaln)}; expected 'layer' or 'group'.",
        )
        require(self.position_offset in (0, 1), "position_offset must be 0 or 1.")
        sizes = (
            "vocab_size", "num_tokens", "d_model", "n_layer", "d_state", "d_conv", "expand",
            "headdim", "ngroups", "chunk_size", "num_groups", "scan_unroll",
            *(["num_classes"] if self.condition == "class" else []),
        )  # fmt: skip
        for name in sizes:
            value = getattr(self, name)
            is_size = isinstance(value, int) and 1 <= value < 2**31  # JAX counts in int32
            require(is_size, f"{name}={shown(value)}; expected an integer from 1 to {2**31 - 1}.")
        require(
            self.logits_chunk >= 0, f"logits_chunk={shown(self.logits_chunk)} must not be negative."
        )
        check_integer("AiMConfig: d_intermediate", self.d_intermediate)
        check_number("AiMConfig: class_dropout", self.class_dropout, FRACTION)
        check_number("AiMConfig: token_dropout", self.token_dropout, BELOW_ONE)
        check_number("AiMConfig: norm_eps", self.norm_eps, NOT_NEGATIVE)
        if self.mixer == "mamba2":
            require(
                self.d_inner % self.headdim == 0,
                f"expand * d_model = {self.d_inner} is not a multiple of headdim={self.headdim}.",
            )
            require(
                self.n_heads % self.ngroups == 0,
                f"{self.n_heads} heads cannot be shared among ngroups={self.ngroups}.",
            )
        self._check_condition()

    def _check_condition(self) -> None:
        if self.condition == "class":
            given = [f"{name}={getattr(self, name)}" for name in TEXT_FIELDS if getattr(self, name)]
            if given:
                raise ValueError(
                    f"AiMConfig: {', '.join(given)}; expected 0 with condition='class'."
                )
            return
        check_number("AiMConfig: text_loss_weight", self.text_loss_weight, NOT_NEGATIVE)
        # The loss of a caption's tokens needs a token before them.
        least = 2 if self.text_loss_weight else 1
        check_integer("AiMConfig: max_caption", self.max_caption, least, MOST_CAPTION)
        check_integer("AiMConfig: caption_vocab", self.caption_vocab)
        check_integer("AiMConfig: caption_features", self.caption_features)
        if self.num_classes != 0:
            raise ValueError(
                f"AiMConfig: num_classes={self.num_classes}; expected 0 with condition='text'."
            )
        if bool(self.caption_vocab) == bool(self.caption_features):
            raise ValueError(
                f"AiMConfig: caption_vocab={self.caption_vocab} and caption_features="
                f"{self.caption_features}; expected one of them with condition='text', for tokens "
                "or for features."
            )
        if self.text_loss_weight and self.caption_features:
            raise ValueError(
                f"AiMConfig: text_loss_weight={self.text_loss_weight}; expected 0 with "
                "caption_features, which are no tokens to predict."
            )

    @property
    def is_text(self) -> bool:
        """True if captions condition the model."""
        return self.condition == "text"

    @property
    def conv_implementation(self) -> str | None:
        """Implementation of the convolution over whole sequences; None chooses by the device."""
        return "xla" if self.scan_implementation == "xla" else None

    @property
    def d_inner(self) -> int:
        """Inner width of the mixers."""
        return self.expand * self.d_model

    @property
    def n_heads(self) -> int:
        """Number of Mamba-2 heads."""
        return self.d_inner // self.headdim

    @property
    def dt_rank(self) -> int:
        """Rank of the Mamba-1 dt projection."""
        return math.ceil(self.d_model / 16)

    @property
    def mlp_hidden(self) -> int:
        """Channels inside the gated MLP: `d_intermediate` rounded up to a multiple of 128."""
        return -(-self.d_intermediate // 128) * 128

    @property
    def modulation_parts(self) -> int:
        """Modulation vectors (d,) per layer: shift, scale and gate of the mixer and the MLP."""
        return 6 if self.d_intermediate else 3

    @property
    def residual_scale(self) -> float:
        """Factor 1 / sqrt(branches) on the initial output maps of residual branches."""
        return (self.n_layer * (2 if self.d_intermediate else 1)) ** -0.5

    def fields(self) -> dict:
        """Return the fields for a file. Those of text are left out of a class-conditional model.

        Older versions refuse unknown fields, and can read such a model.
        """
        fields = dataclasses.asdict(self)
        absent = () if self.is_text else ("condition", *TEXT_FIELDS)
        return {name: value for name, value in fields.items() if name not in absent}


PRESETS = {
    "B": AiMConfig(),
    "L": AiMConfig(d_model=1024, n_layer=48, adaln="group", num_groups=4),
    "XL": AiMConfig(d_model=1536, n_layer=48, adaln="group", num_groups=4),
    "1B": AiMConfig(d_model=2048, n_layer=48, adaln="group", num_groups=4),
}


NORM_GROUPS = 32


@dataclasses.dataclass(frozen=True)
class VQConfig:
    """Configuration of a VQ tokenizer; the defaults are LlamaGen's VQ-f16.

    Attributes:
      in_channels, out_channels: image channels.
      ch: base width.
      ch_mult: width multiplier of each resolution, with a 2x downsampling between resolutions.
      num_res_blocks: residual blocks per resolution in the encoder (the decoder has one more).
      z_channels: channels between encoder/decoder and the 1x1 quantizer projections.
      embed_dim: dimension of the codebook entries.
      n_embed: number of codebook entries.
      beta: weight of the commitment loss.
      entropy_loss_ratio: weight of the codebook entropy loss; 0 turns it off.
      l2_norm: compare and return unit vectors.
      dropout: dropout rate inside residual blocks while training.
      compute_dtype: dtype of the convolutions; parameters and quantization stay float32.
    """

    in_channels: int = 3
    out_channels: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 256
    embed_dim: int = 8
    n_embed: int = 16384
    beta: float = 0.25
    entropy_loss_ratio: float = 0.0
    l2_norm: bool = True
    dropout: float = 0.0
    compute_dtype: str = "float32"

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        sizes = ("in_channels", "out_channels", "ch", "z_channels", "embed_dim", "n_embed")
        for name in (*sizes, "num_res_blocks"):
            check_integer(f"VQConfig: {name}", getattr(self, name), 1)
        for number in self.ch_mult:
            check_integer("VQConfig: ch_mult", number, 1)
        for name in ("beta", "entropy_loss_ratio"):
            check_number(f"VQConfig: {name}", getattr(self, name), NOT_NEGATIVE)
        check_number("VQConfig: dropout", self.dropout, BELOW_ONE)
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise ValueError(
                f"VQConfig: compute_dtype={shown(self.compute_dtype)}; expected one of "
                f"{', '.join(COMPUTE_DTYPES)}."
            )
        narrow = [m for m in self.ch_mult if self.ch * m % NORM_GROUPS]
        if not self.ch_mult or self.ch % NORM_GROUPS or narrow:
            raise ValueError(
                f"VQConfig: ch={self.ch} times each of ch_mult={shortened(str(self.ch_mult))} must "
                f"be a multiple of {NORM_GROUPS}, the number of GroupNorm groups."
            )

    @property
    def downsampling(self) -> int:
        """Pixels per token along one side: 16 for f16."""
        return 2 ** (len(self.ch_mult) - 1)
