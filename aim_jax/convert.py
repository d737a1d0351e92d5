"""Weights of the published PyTorch models as our parameter trees, and back: one table of rules.

AiM is published under keys that start with `mamba.`, its tokenizer (LlamaGen's VQ) under `vqvae.`.
A rule renames a tensor, permutes its axes, cuts a packed projection into parts and stacks the
layers. All of that is linear, so gradients are converted exactly as weights are.
"""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import EllipsisType
from typing import NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

from aim_jax.models import aim, vq
from aim_jax.models.aim import AiMConfig
from aim_jax.models.vq import VQConfig

WEIGHTS_FILE = "model.safetensors"
AIM_PREFIX, VQ_PREFIX = "mamba.", "vqvae."
TOKEN_EMBEDDING = "mamba.backbone.embeddings.word_embeddings.weight"
TIED_HEAD = "mamba.lm_head.weight"
USAGE_HISTORY = "vqvae.quantize.codebook_used"


class Rule(NamedTuple):
    """An official tensor and its place in our tree.

    Attributes:
      when: the variant that has it ("mamba1", "mamba2", "layer", "group", "mlp"), or "any".
      official: key; `*` stands for the layer number, and we stack the layers along a leading axis.
      ours: path of our array; `{a,b}` are parts that lie one after the other along the official
        tensor's first axis.
      axes: "official->ours" of one part: a letter per axis, (letters) for axes that the official
        tensor holds as one, 1 for an axis that only it has.
    """

    when: str
    official: str
    ours: str
    axes: str


AIM_RULES = tuple(
    Rule(when, f"mamba.backbone.{official}", ours, axes)
    for when, official, ours, axes in (
        ("any", "embeddings.word_embeddings.weight", "token_embedding/embedding", "vd->vd"),
        ("any", "embeddings.position_embeddings.weight", "position_embedding/embedding", "td->td"),
        ("any", "cls_embed.embedding_table.weight", "class_embedding/table/embedding", "kd->kd"),
        ("any", "norm_f.weight", "norm_f/scale", "d->d"),
        ("any", "final_layer.norm_final.weight", "final_layer/norm_final/scale", "d->d"),
        ("any", "final_layer.adaLN_modulation.1.weight", "final_adaln/kernel", "(gpe)d->gdpe"),
        ("any", "final_layer.adaLN_modulation.1.bias", "final_adaln/bias", "(gpe)->gpe"),
        ("layer", "layers.*.adaLN_modulation.1.weight", "adaln/kernel", "(pe)d->dpe"),
        ("layer", "layers.*.adaLN_modulation.1.bias", "adaln/bias", "(pe)->pe"),
        ("group", "adaln_group.1.weight", "adaln/kernel", "(gpe)d->gdpe"),
        ("group", "adaln_group.1.bias", "adaln/bias", "(gpe)->gpe"),
        ("group", "layers.*.scale_shift_table", "adaln/table", "1pe->pe"),
        ("any", "layers.*.norm.weight", "layers/norm/scale", "d->d"),
        ("mlp", "layers.*.norm2.weight", "layers/norm2/scale", "d->d"),
        ("mlp", "layers.*.mlp.fc1.weight", "layers/mlp/{fc1,gate}/kernel", "oi->io"),
        ("mlp", "layers.*.mlp.fc2.weight", "layers/mlp/fc2/kernel", "oi->io"),
        (
            "mamba2",
            "layers.*.mixer.in_proj.weight",
            "layers/mixer/{z,x,B,C,dt}_proj/kernel",
            "oi->io",
        ),
        ("mamba2", "layers.*.mixer.conv1d.weight", "layers/mixer/conv_{x,B,C}/kernel", "c1w->wc"),
        ("mamba2", "layers.*.mixer.conv1d.bias", "layers/mixer/conv_{x,B,C}/bias", "c->c"),
        ("mamba2", "layers.*.mixer.dt_bias", "layers/mixer/dt_bias", "h->h"),
        ("mamba2", "layers.*.mixer.A_log", "layers/mixer/A_log", "h->h"),
        ("mamba2", "layers.*.mixer.norm.weight", "layers/mixer/norm/scale", "e->e"),
        ("mamba1", "layers.*.mixer.in_proj.weight", "layers/mixer/{x,z}_proj/kernel", "oi->io"),
        ("mamba1", "layers.*.mixer.conv1d.weight", "layers/mixer/conv_x/kernel", "c1w->wc"),
        ("mamba1", "layers.*.mixer.conv1d.bias", "layers/mixer/conv_x/bias", "c->c"),
        (
            "mamba1",
            "layers.*.mixer.x_proj.weight",
            "layers/mixer/{dt_in,B,C}_proj/kernel",
            "oi->io",
        ),
        ("mamba1", "layers.*.mixer.dt_proj.weight", "layers/mixer/dt_proj/kernel", "oi->io"),
        ("mamba1", "layers.*.mixer.dt_proj.bias", "layers/mixer/dt_bias", "e->e"),
        ("mamba1", "layers.*.mixer.A_log", "layers/mixer/A_log", "en->en"),
        ("any", "layers.*.mixer.D", "layers/mixer/D", "h->h"),
        ("any", "layers.*.mixer.out_proj.weight", "layers/mixer/out_proj/kernel", "oi->io"),
    )
)

# The tokenizer's modules have the official names, except that digits are set off by `.` there;
# so its rules follow from its tree: (our leaf, rank) -> (official leaf, axes).
VQ_LEAVES = {
    ("kernel", 4): ("weight", "oihw->hwio"),
    ("kernel", 2): ("weight", "oi11->io"),
    ("scale", 1): ("weight", "c->c"),
    ("bias", 1): ("bias", "c->c"),
    ("embedding", 2): ("embedding.weight", "vd->vd"),
}


def aim_rules(config: AiMConfig) -> list[Rule]:
    """The rules of AIM_RULES that a model of this shape needs."""
    variants = {"any", config.mixer, config.adaln, "mlp" if config.d_intermediate else "any"}
    return [rule for rule in AIM_RULES if rule.when in variants]


def vq_rules(config: VQConfig) -> list[Rule]:
    """One rule per array of a tokenizer of this shape."""
    rules = []
    for path, shape in _vq_shapes(config).items():
        *modules, leaf = path.split("/")
        leaf, axes = VQ_LEAVES[leaf, len(shape)]
        modules = [re.sub(r"_(?=\d)|(?<=\d)_", ".", module) for module in modules]
        rules.append(Rule("any", VQ_PREFIX + ".".join([*modules, leaf]), path, axes))
    return rules


class Slot(NamedTuple):
    """Where one official tensor lives: (path, layer, shape) of its parts, and their axes."""

    parts: list[tuple[str, int | EllipsisType, tuple[int, ...]]]
    axes: str

    @property
    def part_shapes(self) -> list[tuple[int, ...]]:
        """The official shape of every part."""
        groups, ours = _parse(self.axes)
        sizes = [dict(zip(ours, shape, strict=True)) for *_, shape in self.parts]
        return [tuple(math.prod(size.get(a, 1) for a in g) for g in groups) for size in sizes]

    @property
    def shape(self) -> tuple[int, ...]:
        """The official shape."""
        shapes = self.part_shapes
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _parse(axes: str) -> tuple[list[str], str]:
    """Splits "(pe)d->dpe" into (["pe", "d"], "dpe")."""
    official, ours = axes.split("->")
    return [a + b for a, b in re.findall(r"\((\w+)\)|(\w)", official)], ours


def _to_ours(tensor: np.ndarray, axes: str, shape: tuple[int, ...]) -> np.ndarray:
    groups, ours = _parse(axes)
    letters = "".join(groups).replace("1", "")
    sizes = dict(zip(ours, shape, strict=True))
    return tensor.reshape([sizes[a] for a in letters]).transpose([letters.index(a) for a in ours])


def _to_official(array: np.ndarray, axes: str, shape: tuple[int, ...]) -> np.ndarray:
    groups, ours = _parse(axes)
    letters = "".join(groups).replace("1", "")
    return array.transpose([ours.index(a) for a in letters]).reshape(shape)


def _expand(path: str) -> list[str]:
    """Expands "a/{b,c}/d" into ["a/b/d", "a/c/d"]."""
    head, *rest = re.split(r"\{(.*)\}", path)
    return [head + part + rest[1] for part in rest[0].split(",")] if rest else [path]


def _slots(rules: list[Rule], shapes: dict[str, tuple[int, ...]]) -> dict[str, Slot]:
    """Official key -> Slot, in the order of the rules."""
    slots = {}
    for rule in rules:
        paths = _expand(rule.ours)
        if "*" not in rule.official:
            parts = [(path, ..., shapes[path]) for path in paths]
            slots[rule.official] = Slot(parts, rule.axes)
            continue
        for layer in range(shapes[paths[0]][0]):
            parts = [(path, layer, shapes[path][1:]) for path in paths]
            slots[rule.official.replace("*", str(layer))] = Slot(parts, rule.axes)
    return slots


def _convert(tensors: Mapping[str, np.ndarray], rules, shapes, known: set[str]) -> dict:
    slots = _slots(rules, shapes)
    problems = [f"{key}: missing" for key in slots if key not in tensors]
    problems += [f"{key}: unexpected" for key in tensors if key not in slots and key not in known]
    problems += [
        f"{key}: shape {tuple(tensors[key].shape)}, expected {slot.shape}"
        for key, slot in slots.items()
        if key in tensors and tuple(tensors[key].shape) != slot.shape
    ]
    if problems:
        raise ValueError(
            f"the tensors do not fit the configuration ({len(problems)} keys):\n  "
            + "\n  ".join(problems)
        )
    dtype = np.result_type(np.float32, *(tensors[key].dtype for key in slots))
    params = {path: np.empty(shape, dtype) for path, shape in shapes.items()}
    for key, slot in slots.items():
        sizes = [shape[0] for shape in slot.part_shapes]
        pieces = np.split(np.asarray(tensors[key]), np.cumsum(sizes)[:-1])
        for (path, layer, shape), piece in zip(slot.parts, pieces, strict=True):
            params[path][layer] = _to_ours(piece, slot.axes, shape)
    return unflatten_dict(params, sep="/")


def _export(params, rules) -> dict[str, np.ndarray]:
    flat = {k: np.asarray(v) for k, v in flatten_dict(nn.unbox(params), sep="/").items()}
    return {
        key: np.concatenate(
            [
                _to_official(flat[path][layer], slot.axes, shape)
                for (path, layer, _), shape in zip(slot.parts, slot.part_shapes, strict=True)
            ]
        )
        for key, slot in _slots(rules, {k: v.shape for k, v in flat.items()}).items()
    }


def _shapes(init) -> dict[str, tuple[int, ...]]:
    tree = jax.eval_shape(lambda: nn.unbox(init()))
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


@functools.cache
def _aim_shapes(config: AiMConfig) -> dict[str, tuple[int, ...]]:
    return _shapes(lambda: aim.init_params(config, jax.random.key(0)))


@functools.cache
def _vq_shapes(config: VQConfig) -> dict[str, tuple[int, ...]]:
    return _shapes(lambda: vq.init_params(config, jax.random.key(0)))


def official_shapes(config: AiMConfig | VQConfig) -> dict[str, tuple[int, ...]]:
    """The keys and shapes of the official tensors that a model of this shape is made of."""
    if isinstance(config, AiMConfig):
        slots = _slots(aim_rules(config), _aim_shapes(config))
    else:
        slots = _slots(vq_rules(config), _vq_shapes(config))
    return {key: slot.shape for key, slot in slots.items()}


def convert_aim(tensors: Mapping[str, np.ndarray], config: AiMConfig) -> dict:
    """Official AiM tensors, or gradients with respect to them, as our parameter tree.

    Args:
      tensors: by official key. The output matrix, tied to the token embedding, may be left out.
      config: shape of the model, see `aim_config_from_official`.

    Returns:
      Arrays of at least float32, layers stacked.

    Raises:
      ValueError: naming every missing, unexpected or misshapen key; or an output matrix that
        differs from the token embedding.
    """
    params = _convert(tensors, aim_rules(config), _aim_shapes(config), {TIED_HEAD})
    if TIED_HEAD in tensors and not np.array_equal(tensors[TIED_HEAD], tensors[TOKEN_EMBEDDING]):
        raise ValueError(
            f"{TIED_HEAD} differs from {TOKEN_EMBEDDING}; only models whose output matrix is the "
            "token embedding (tie_embeddings) can be converted."
        )
    return params


def convert_vq(tensors: Mapping[str, np.ndarray], config: VQConfig) -> dict:
    """Official tokenizer tensors, or gradients with respect to them, as our parameter tree.

    Args:
      tensors: by official key; the buffer with the history of codebook usage is left aside.
      config: shape of the tokenizer, see `vq_config_from_official`.

    Returns:
      Arrays of at least float32.

    Raises:
      ValueError: naming every missing, unexpected or misshapen key.
    """
    return _convert(tensors, vq_rules(config), _vq_shapes(config), {USAGE_HISTORY})


def export_aim(params: Mapping, config: AiMConfig) -> dict[str, np.ndarray]:
    """The inverse of `convert_aim`: our parameters or gradients by official key, head left out."""
    return _export(params, aim_rules(config))


def export_vq(params: Mapping, config: VQConfig) -> dict[str, np.ndarray]:
    """The inverse of `convert_vq`: our parameters or gradients by official key."""
    return _export(params, vq_rules(config))


def load_official(
    path: str | os.PathLike,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Reads a safetensors file of official weights.

    Args:
      path: the file, or a directory that holds it as model.safetensors.

    Returns:
      The tensors of AiM and those of the tokenizer, by official key; one of them may be empty.

    Raises:
      FileNotFoundError: no such file.
      ValueError: keys that belong to neither part.
    """
    path = Path(path)
    path = path / WEIGHTS_FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected official weights as safetensors.")
    tensors = load_file(path)
    parts = tuple(
        {key: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        for prefix in (AIM_PREFIX, VQ_PREFIX)
    )
    strange = sorted(tensors.keys() - parts[0].keys() - parts[1].keys())
    if strange:
        raise ValueError(
            f"{path}: {len(strange)} keys start with neither {AIM_PREFIX!r} nor {VQ_PREFIX!r}: "
            f"{', '.join(strange[:10])}"
        )
    return parts


# Options of the official configurations: ours by name; those with a single value that this library
# has; and those without effect on converted weights (initialisation, choice of kernels, dropout
# that the official code accepts and never applies).
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
_MIXER_FIXED = {
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


def aim_config_from_official(config: Mapping, **overrides) -> AiMConfig:
    """The shape of an official AiM.

    Args:
      config: the flat config.json beside the official weights.
      **overrides: fields of AiMConfig to set besides. `position_offset` is 1 unless given, which
        is how the official sampler places codes; the official training forward is 0.

    Raises:
      ValueError: an option is missing, unknown, or has a value that this library does not support.
    """
    config = dict(config)
    mixer = dict(config.pop("ssm_cfg", None) or {})
    group = config.pop("adaln_group", False)
    required = ("d_model", "n_layer", "vocab_size", "num_classes", "num_tokens")
    fields = _read("config", config, _AIM_FIELDS, _AIM_FIXED, _AIM_FREE, required)
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


def vq_config_from_official(config: Mapping, **overrides) -> VQConfig:
    """The shape of an official tokenizer, from its flat config.json; `overrides` are set besides.

    Raises:
      ValueError: an option is unknown or not supported.
    """
    names = {name: name for name in _VQ_FIELDS}
    return VQConfig(**(_read("config", dict(config), names, {}, _VQ_FREE) | overrides))


def _read(what: str, config: dict, fields: dict, fixed: dict, free: set, required=()) -> dict:
    """Our fields of an official configuration; raises ValueError for what does not fit."""
    known = fields.keys() | fixed.keys() | free
    unknown, missing = sorted(config.keys() - known), sorted(set(required) - config.keys())
    if unknown:
        raise ValueError(f"{what}: unknown options {unknown}; known are {sorted(known)}.")
    if missing:
        raise ValueError(f"{what}: options {missing} are missing.")
    for name, value in fixed.items():
        given = config.get(name, value)
        if (list(given) if isinstance(given, tuple) else given) != value:
            raise ValueError(f"{what}: {name}={given!r} is not supported; expected {value!r}.")
    return {ours: config[name] for name, ours in fields.items() if name in config}
