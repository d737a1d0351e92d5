"""Configurations of the published models: read from config.json, inferred, and written back."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aim_jax.models.config import AiMConfig, VQConfig

# Options of the official configurations are of three kinds: mapped to fields of this library; fixed
# to the only value that this library supports; or free, without effect on converted weights
# (initialisation, choice of kernels, dropout that the official code accepts and never applies).
_AIM_FIELDS = {
    name: name
    for name in (
        "d_model", "n_layer", "vocab_size", "num_classes", "num_tokens", "num_groups",
        "d_intermediate",
    )
} | {"token_drop": "token_dropout"}  # fmt: skip
_AIM_FIXED = {"rms_norm": True, "tie_embeddings": True, "attn_layer_idx": []}
_AIM_FREE = {"attn_cfg", "fused_add_norm", "residual_in_fp32", "pad_vocab_size_multiple"} | {
    "mixer_drop",
    "mlp_drop",
}
_MIXER_FIELDS = {
    "Mamba1": ("d_state", "d_conv", "expand"),
    "Mamba2": ("d_state", "d_conv", "expand", "headdim", "ngroups", "chunk_size"),
}
_MIXER_DEFAULTS = {
    "Mamba1": {"mixer": "mamba1", "d_state": 16},
    "Mamba2": {"mixer": "mamba2", "d_state": 128},
}
_MIXER_FIXED: dict[str, dict] = {
    "Mamba1": {"bias": False, "conv_bias": True},
    "Mamba2": {
        "d_ssm": None, "D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False,
        "dt_limit": [0.0, math.inf], "bias": False, "conv_bias": True,
    },
}  # fmt: skip
_MIXER_FREE = {
    "Mamba1": {"dt_min", "dt_max", "dt_init_floor", "dt_init", "dt_scale", "use_fast_path"},
    "Mamba2": {"dt_min", "dt_max", "dt_init_floor", "A_init_range", "conv_init"}
    | {"use_mem_eff_path"},
}
_VQ_FIELDS = tuple(f.name for f in dataclasses.fields(VQConfig) if f.name != "compute_dtype")
_VQ_FREE = {"show_usage"}
# Entries that the libraries of hubs add to any config.json: they describe the file, or the
# generation of text, and not the network. Names that begin with "_" are of this kind too.
_HUB_FREE = {
    "architectures", "auto_map", "dtype", "finetuning_task", "id2label", "is_composition",
    "is_decoder", "is_encoder_decoder", "label2id", "library_name", "license", "model_type",
    "output_attentions", "output_hidden_states", "pipeline_tag", "problem_type", "return_dict",
    "tags", "task_specific_params", "tokenizer_class", "torch_dtype", "torchscript",
    "transformers_version", "use_bfloat16", "use_cache", "use_return_dict",
    "add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "bos_token_id",
    "chunk_size_feed_forward", "cross_attention_hidden_size", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "eos_token_id", "exponential_decay_length_penalty", "forced_bos_token_id",
    "forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "pad_token_id",
    "prefix", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate",
    "sep_token_id", "suppress_tokens", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "top_k", "top_p", "typical_p", "pruned_heads",
}  # fmt: skip
_HUB_FIXED = {"tie_word_embeddings": True}


def aim_config_from_official(config: Mapping, **overrides: Any) -> AiMConfig:
    """Return the configuration of an official AiM.

    Args:
      config: The flat config.json of the official weights.
      **overrides: Further fields of AiMConfig to set. `position_offset` is 1 by default, which is
        how the official sampler places tokens; it is 0 in the official training forward pass.

    Raises:
      ValueError: An option is missing, unknown, or has a value that this library does not support.
    """
    config = dict(config)
    mixer = dict(config.pop("ssm_cfg", None) or {})
    group = config.pop("adaln_group", False)
    required = ("d_model", "n_layer", "vocab_size", "num_classes", "num_tokens")
    config = _without_hub_entries(config)
    fields = _read("config", config, _AIM_FIELDS, _AIM_FIXED | _HUB_FIXED, _AIM_FREE, required)
    layer = mixer.pop("layer", "Mamba1")
    if layer not in _MIXER_FIELDS:
        raise ValueError(f"ssm_cfg: layer={layer!r}; expected one of {sorted(_MIXER_FIELDS)}.")
    dt_rank = mixer.pop("dt_rank", "auto") if layer == "Mamba1" else "auto"
    names = {name: name for name in _MIXER_FIELDS[layer]}
    fields |= _MIXER_DEFAULTS[layer]
    fields |= _read("ssm_cfg", mixer, names, _MIXER_FIXED[layer], _MIXER_FREE[layer])
    fields |= {"adaln": "group" if group else "layer", "position_offset": 1}
    ours = AiMConfig(**(fields | overrides))
    if dt_rank not in ("auto", ours.dt_rank):
        raise ValueError(
            f"ssm_cfg: dt_rank={dt_rank!r} is not supported; expected 'auto', ceil(d_model / 16) = "
            f"{ours.dt_rank}."
        )
    return ours


def vq_config_from_official(config: Mapping, **overrides: Any) -> VQConfig:
    """Return the configuration of an official tokenizer from its flat config.json.

    Args:
      config: The flat config.json.
      **overrides: Further fields of VQConfig to set.

    Raises:
      ValueError: An option is unknown or not supported.
    """
    names = {name: name for name in _VQ_FIELDS}
    fields = _read("config", _without_hub_entries(config), names, {}, _VQ_FREE)
    return VQConfig(**(fields | overrides))


def _without_hub_entries(config: Mapping) -> dict:
    """Return a config.json without the entries that the libraries of hubs add to any."""
    return {
        name: value
        for name, value in config.items()
        if name not in _HUB_FREE and not name.startswith("_")
    }


def _read(
    what: str,
    config: dict,
    fields: dict[str, str],
    fixed: dict,
    free: set[str],
    required: Sequence[str] = (),
) -> dict:
    """Return the fields of this library that an official configuration sets, after checking it."""
    known = fields.keys() | fixed.keys() | free
    unknown = sorted(config.keys() - known)
    missing = sorted(set(required) - config.keys())
    if unknown:
        raise ValueError(f"{what}: unknown options {unknown}; known options: {sorted(known)}.")
    if missing:
        raise ValueError(f"{what}: options {missing} are missing.")
    for name, value in fixed.items():
        actual = config.get(name, value)
        if (list(actual) if isinstance(actual, tuple) else actual) != value:
            raise ValueError(f"{what}: {name}={actual!r} is not supported; expected {value!r}.")
    return {ours: config[name] for name, ours in fields.items() if name in config}


def infer_aim_config(shapes: Mapping[str, tuple[int, ...]], **overrides: Any) -> AiMConfig:
    """Infer the configuration of an official AiM without a config.json from its tensors.

    Every field that the shapes determine is read from them. For Mamba-2 they give only the product
    of `ngroups` and `d_state`; one group is assumed, as in every published model.

    Args:
      shapes: Shapes by official key.
      **overrides: Further fields of AiMConfig to set; `position_offset` is 1 by default.

    Raises:
      ValueError: A tensor is missing, or has an unexpected number of axes or size.
    """
    shape = _shape_reader("AiM", shapes, "mamba.backbone.")
    vocab_size, d = shape("embeddings.word_embeddings.weight", 2)
    layers = _count(shapes, r"mamba\.backbone\.layers\.(\d+)\.")
    mlp = "mamba.backbone.layers.0.mlp.fc2.weight" in shapes
    fields: dict[str, Any] = {
        "vocab_size": vocab_size,
        "d_model": d,
        "num_tokens": shape("embeddings.position_embeddings.weight", 2)[0] - 1,
        "num_classes": shape("cls_embed.embedding_table.weight", 2)[0] - 1,
        "n_layer": layers,
        "d_intermediate": shape("layers.0.mlp.fc2.weight", 2)[1] if mlp else 0,
        "d_conv": shape("layers.0.mixer.conv1d.weight", 3)[2],
        "position_offset": 1,
    }
    if "mamba.backbone.adaln_group.1.weight" in shapes:
        groups = _divide(shape("adaln_group.1.weight", 2)[0], (6 if mlp else 3) * d, "adaln_group")
        fields |= {"adaln": "group", "num_groups": groups}
    inner = shape("layers.0.mixer.out_proj.weight", 2)[1]
    fields["expand"] = _divide(inner, d, "out_proj")
    if "mamba.backbone.layers.0.mixer.x_proj.weight" in shapes:
        fields |= {"mixer": "mamba1", "d_state": shape("layers.0.mixer.A_log", 2)[1]}
    else:
        heads = shape("layers.0.mixer.A_log", 1)[0]
        packed = shape("layers.0.mixer.in_proj.weight", 2)[0] - 2 * inner - heads
        fields |= {
            "headdim": _divide(inner, heads, "A_log"),
            "d_state": _divide(packed, 2, "in_proj"),
        }
    return AiMConfig(**(fields | overrides))


def infer_vq_config(shapes: Mapping[str, tuple[int, ...]], **overrides: Any) -> VQConfig:
    """Infer the configuration of an official tokenizer from its tensors.

    Args:
      shapes: Shapes by official key.
      **overrides: Further fields of VQConfig to set.

    Raises:
      ValueError: A tensor is missing, or has an unexpected number of axes or size.
    """
    shape = _shape_reader("tokenizer", shapes, "vqvae.")
    ch, in_channels, *_ = shape("encoder.conv_in.weight", 4)
    levels = _count(shapes, r"vqvae\.encoder\.conv_blocks\.(\d+)\.")
    widths = [shape(f"encoder.conv_blocks.{i}.res.0.conv2.weight", 4)[0] for i in range(levels)]
    n_embed, embed_dim = shape("quantize.embedding.weight", 2)
    fields: dict[str, Any] = {
        "in_channels": in_channels,
        "out_channels": shape("decoder.conv_out.weight", 4)[0],
        "ch": ch,
        "ch_mult": tuple(_divide(width, ch, "conv_blocks") for width in widths),
        "num_res_blocks": _count(shapes, r"vqvae\.encoder\.conv_blocks\.0\.res\.(\d+)\."),
        "z_channels": shape("encoder.conv_out.weight", 4)[0],
        "embed_dim": embed_dim,
        "n_embed": n_embed,
    }
    return VQConfig(**(fields | overrides))


def _shape_reader(what: str, shapes: Mapping, prefix: str) -> Callable[[str, int], tuple[int, ...]]:
    def shape(name: str, rank: int) -> tuple[int, ...]:
        key = prefix + name
        if key not in shapes:
            raise ValueError(f"these are not the weights of an official {what}: {key} is missing.")
        if len(shapes[key]) != rank or 0 in shapes[key]:
            raise ValueError(f"{key}: shape {tuple(shapes[key])}, expected {rank} axes.")
        return shapes[key]

    return shape


def _count(shapes: Mapping, pattern: str) -> int:
    """Count the distinct numbers that the pattern matches in the keys; they must be 0, 1, 2, ..."""
    numbers = {int(match[1]) for key in shapes if (match := re.match(pattern, key))}
    if numbers != set(range(len(numbers))):
        raise ValueError(
            f"{pattern.replace(chr(92), '')}: found {len(numbers)} numbers up to {max(numbers)}; "
            "expected 0, 1, 2, ... without gaps."
        )
    return len(numbers)


def _divide(size: int, unit: int, what: str) -> int:
    if size < unit or size % unit:
        raise ValueError(f"{what}: a size of {size} is not a multiple of {unit}.")
    return size // unit


def official_aim_config(config: AiMConfig) -> dict:
    """Return the flat config.json of an official AiM; inverse of `aim_config_from_official`.

    Fields without an official counterpart (position offset, class dropout, dtypes, fields that
    affect speed only) are left out.

    Raises:
      ValueError: The model has no position embeddings, which the official one always has, or
        another epsilon in its norms, or captions as its condition.
    """
    if config.is_text:
        raise ValueError("the official AiM is class-conditional; this model takes captions.")
    if not config.positions:
        raise ValueError("the official AiM always has position embeddings; this model has none.")
    if config.norm_eps != AiMConfig.norm_eps:
        raise ValueError(
            f"the official AiM has norm_eps={AiMConfig.norm_eps}; this model has {config.norm_eps}."
        )
    layer = config.mixer.capitalize()
    flat = {name: getattr(config, ours) for name, ours in _AIM_FIELDS.items()}
    names = [name for name in _MIXER_FIELDS[layer] if name != "chunk_size"]  # affects speed only
    mixer = {name: getattr(config, name) for name in names}
    return (
        flat
        | _AIM_FIXED
        | {"adaln_group": config.adaln == "group", "ssm_cfg": {"layer": layer} | mixer}
    )


def official_vq_config(config: VQConfig) -> dict:
    """Return the flat config of an official tokenizer; inverse of `vq_config_from_official`."""
    return {name: getattr(config, name) for name in _VQ_FIELDS}
