"""Mapping between the tensors of the published PyTorch models and the parameters of this library.

AiM is published under keys that start with `mamba.`, its tokenizer (LlamaGen's VQ) under `vqvae.`.
A rule in the table renames a tensor, permutes its axes, splits a packed projection into parts and
stacks the layers. These operations are linear, so gradients are converted exactly as weights are.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from types import EllipsisType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from aim_jax.models import aim, vq
from aim_jax.models.config import AiMConfig, VQConfig

AIM_PREFIX = "mamba."
VQ_PREFIX = "vqvae."
TOKEN_EMBEDDING = "mamba.backbone.embeddings.word_embeddings.weight"
TIED_HEAD = "mamba.lm_head.weight"
USAGE_HISTORY = "vqvae.quantize.codebook_used"


class Rule(NamedTuple):
    """An official tensor and its place in the parameter tree of this library.

    Attributes:
      when: Variant that has the tensor ("mamba1", "mamba2", "layer", "group", "mlp"), or "any".
      official: Official key. `*` stands for the layer number; this library stacks the layers along
        a leading axis.
      ours: Path of the array in this library. `{a,b}` are parts that are concatenated along the
        first axis of the official tensor.
      axes: "official->ours" of one part: a letter per axis, (letters) for axes that are merged in
        the official tensor, 1 for an axis that exists only there.
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

# The tokenizer's modules have the official names, except that the official ones separate digits by
# `.`. Its rules follow from its tree: (leaf of this library, rank) -> (official leaf, axes).
VQ_LEAVES = {
    ("kernel", 4): ("weight", "oihw->hwio"),
    ("kernel", 2): ("weight", "oi11->io"),
    ("scale", 1): ("weight", "c->c"),
    ("bias", 1): ("bias", "c->c"),
    ("embedding", 2): ("embedding.weight", "vd->vd"),
}


def aim_rules(config: AiMConfig) -> list[Rule]:
    """Return the rules of AIM_RULES that apply to a configuration."""
    variants = {"any", config.mixer, config.adaln, "mlp" if config.d_intermediate else "any"}
    return [rule for rule in AIM_RULES if rule.when in variants]


def vq_rules(config: VQConfig) -> list[Rule]:
    """Return one rule per array of a tokenizer."""
    rules = []
    for path, shape in _shapes(vq.param_shapes(config)).items():
        *modules, leaf = path.split("/")
        leaf, axes = VQ_LEAVES[leaf, len(shape)]
        modules = [re.sub(r"_(?=\d)|(?<=\d)_", ".", module) for module in modules]
        rules.append(Rule("any", VQ_PREFIX + ".".join([*modules, leaf]), path, axes))
    return rules


class Slot(NamedTuple):
    """Location of an official tensor: (path, layer, shape) of its parts, and their axes."""

    parts: Sequence[tuple[str, int | EllipsisType, tuple[int, ...]]]
    axes: str

    @property
    def part_shapes(self) -> list[tuple[int, ...]]:
        """Official shapes of the parts."""
        groups, ours = _parse(self.axes)
        sizes = [dict(zip(ours, shape, strict=True)) for *_, shape in self.parts]
        return [tuple(math.prod(size.get(a, 1) for a in g) for g in groups) for size in sizes]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the official tensor."""
        shapes = self.part_shapes
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _parse(axes: str) -> tuple[list[str], str]:
    """Split "(pe)d->dpe" into (["pe", "d"], "dpe")."""
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
    """Expand "a/{b,c}/d" into ["a/b/d", "a/c/d"]."""
    head, *groups = re.split(r"\{(.*)\}", path)
    return [head + part + groups[1] for part in groups[0].split(",")] if groups else [path]


def _slots(rules: list[Rule], shapes: dict[str, tuple[int, ...]]) -> dict[str, Slot]:
    """Return the slot of every official key, in the order of the rules."""
    slots = {}
    for rule in rules:
        paths = _expand(rule.ours)
        if "*" not in rule.official:
            unstacked = [(path, ..., shapes[path]) for path in paths]
            slots[rule.official] = Slot(unstacked, rule.axes)
            continue
        for layer in range(shapes[paths[0]][0]):
            parts = [(path, layer, shapes[path][1:]) for path in paths]
            slots[rule.official.replace("*", str(layer))] = Slot(parts, rule.axes)
    return slots


def _convert(
    tensors: Mapping,
    rules: list[Rule],
    shapes: dict[str, tuple[int, ...]],
    known: set[str],
    dtype: str | None,
) -> dict:
    slots = _slots(rules, shapes)
    missing = slots.keys() - tensors.keys()
    problems = [f"{key}: missing, expected {slots[key].shape}" for key in missing]
    problems += [f"{key}: unexpected" for key in tensors.keys() - slots.keys() - known]
    for key in slots.keys() & tensors.keys():
        tensor = tensors[key]
        if tuple(tensor.shape) != slots[key].shape:
            problems.append(f"{key}: shape {tuple(tensor.shape)}, expected {slots[key].shape}")
        elif not jnp.issubdtype(tensor.dtype, jnp.floating):
            problems.append(f"{key}: {tensor.dtype}, expected a floating type")
    _refuse(problems, "the tensors do not fit the configuration")

    params = {}
    for key, slot in slots.items():
        sizes = [shape[0] for shape in slot.part_shapes]
        tensor = np.asarray(tensors[key])
        for (path, layer, shape), piece in zip(
            slot.parts, np.split(tensor, np.cumsum(sizes)[:-1]), strict=True
        ):
            target = tensor.dtype if dtype is None else np.dtype(dtype)
            if path not in params:
                params[path] = np.empty(shapes[path], target)
            elif params[path].dtype != (wider := jnp.promote_types(params[path].dtype, target)):
                params[path] = params[path].astype(wider)
            with np.errstate(over="ignore"):  # overflow gives infinity, which is refused below
                params[path][layer] = _to_ours(piece, slot.axes, shape)
            if not np.isfinite(params[path][layer]).all():
                if np.isfinite(piece).all():
                    problems.append(f"{key}: too large for {params[path].dtype}")
                else:
                    problems.append(f"{key}: not finite, expected {slot.shape} finite numbers")
                break
    _refuse(problems, "the tensors hold values that no model can use")
    return unflatten_dict(params, sep="/")


def _refuse(problems: list[str], what: str) -> None:
    if problems:
        lines = "\n  ".join(sorted(problems))
        raise ValueError(f"{what} ({len(problems)} keys):\n  {lines}")


def _export(params: Mapping, rules: list[Rule]) -> tuple[dict, Iterator]:
    """Return shape and dtype by official key, and an iterator of the tensors in that order."""
    flat = {k: np.asarray(v) for k, v in flatten_dict(nn.unbox(params), sep="/").items()}
    slots = _slots(rules, {k: v.shape for k, v in flat.items()})

    def tensor(slot: Slot) -> np.ndarray:
        pieces = [
            _to_official(flat[path][layer], slot.axes, shape)
            for (path, layer, _), shape in zip(slot.parts, slot.part_shapes, strict=True)
        ]
        # Row-major order: the safetensors library writes no other order correctly.
        return np.ascontiguousarray(np.concatenate(pieces))

    shapes = {key: (slot.shape, flat[slot.parts[0][0]].dtype) for key, slot in slots.items()}
    return shapes, ((key, tensor(slot)) for key, slot in slots.items())


def _shapes(tree: dict) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


def official_shapes(config: AiMConfig | VQConfig) -> dict[str, tuple[int, ...]]:
    """Return the keys and shapes of the official tensors of a model."""
    if isinstance(config, AiMConfig):
        slots = _slots(aim_rules(config), _shapes(aim.param_shapes(config)))
    else:
        slots = _slots(vq_rules(config), _shapes(vq.param_shapes(config)))
    return {key: slot.shape for key, slot in slots.items()}


def convert_aim(tensors: Mapping, config: AiMConfig, dtype: str | None = "float32") -> dict:
    """Convert official AiM tensors, or gradients with respect to them, to a parameter tree.

    Args:
      tensors: Arrays, or objects that convert to arrays (`LazyTensor`), by official key; read one
        at a time. The output matrix, which is tied to the token embedding, may be left out.
      config: Configuration of the model; see `aim_config_from_official` and `infer_aim_config`.
      dtype: Dtype of the result; None keeps the tensors' own (the widest where several become one
        array).

    Returns:
      NumPy arrays, layers stacked.

    Raises:
      ValueError: Tensors are missing, unexpected, of another shape or not finite; the message names
        every key and the expected shape. Or the output matrix differs from the token embedding.
    """
    params = _convert(
        tensors, aim_rules(config), _shapes(aim.param_shapes(config)), {TIED_HEAD}, dtype
    )
    if TIED_HEAD in tensors and not _equal(tensors[TIED_HEAD], tensors[TOKEN_EMBEDDING]):
        raise ValueError(
            f"{TIED_HEAD} differs from {TOKEN_EMBEDDING}; only models whose output matrix is the "
            "token embedding (tie_embeddings) can be converted."
        )
    return params


def _equal(a: Any, b: Any) -> bool:
    return tuple(a.shape) == tuple(b.shape) and np.array_equal(np.asarray(a), np.asarray(b))


def convert_vq(tensors: Mapping, config: VQConfig, dtype: str | None = "float32") -> dict:
    """Convert official tokenizer tensors, or gradients with respect to them, to a parameter tree.

    Args:
      tensors: See `convert_aim`; the buffer with the history of codebook usage is ignored.
      config: Configuration of the tokenizer; see `vq_config_from_official` and `infer_vq_config`.
      dtype: Dtype of the result; None keeps the tensors' own.

    Returns:
      NumPy arrays.

    Raises:
      ValueError: Tensors are missing, unexpected, of another shape or not finite; the message names
        every key.
    """
    return _convert(
        tensors, vq_rules(config), _shapes(vq.param_shapes(config)), {USAGE_HISTORY}, dtype
    )


def export_aim(params: Mapping, config: AiMConfig) -> dict[str, np.ndarray]:
    """Convert parameters or gradients to official AiM tensors, without the tied output matrix."""
    return dict(stream_official(params, config)[1])


def export_vq(params: Mapping, config: VQConfig) -> dict[str, np.ndarray]:
    """Convert parameters or gradients to official tokenizer tensors."""
    return dict(stream_official(params, config)[1])


def stream_official(params: Mapping, config: AiMConfig | VQConfig) -> tuple[dict, Iterator]:
    """Convert a parameter tree to official tensors one at a time, to save memory.

    Returns:
      (shape, dtype) by official key, and an iterator of (key, array) in the same order.
    """
    rules = aim_rules(config) if isinstance(config, AiMConfig) else vq_rules(config)
    return _export(params, rules)
