"""Weights of the published PyTorch models as our parameter trees, and back: one table of rules.

AiM is published under keys that start with `mamba.`, its tokenizer (LlamaGen's VQ) under `vqvae.`.
A rule renames a tensor, permutes its axes, cuts a packed projection into parts and stacks the
layers. All of that is linear, so gradients are converted exactly as weights are.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import EllipsisType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from aim_jax.models import aim, vq
from aim_jax.models.config import AiMConfig, VQConfig

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

    parts: Sequence[tuple[str, int | EllipsisType, tuple[int, ...]]]
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
            whole = [(path, ..., shapes[path]) for path in paths]
            slots[rule.official] = Slot(whole, rule.axes)
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
        given = tensors[key]
        if tuple(given.shape) != slots[key].shape:
            problems.append(f"{key}: shape {tuple(given.shape)}, expected {slots[key].shape}")
        elif not jnp.issubdtype(given.dtype, jnp.floating):
            problems.append(f"{key}: {given.dtype}, expected a floating type")
    _refuse(problems, "the tensors do not fit the configuration")

    params = {}
    for key, slot in slots.items():
        sizes = [shape[0] for shape in slot.part_shapes]
        tensor = np.asarray(tensors[key])
        for (path, layer, shape), piece in zip(
            slot.parts, np.split(tensor, np.cumsum(sizes)[:-1]), strict=True
        ):
            wanted = tensor.dtype if dtype is None else np.dtype(dtype)
            if path not in params:
                params[path] = np.empty(shapes[path], wanted)
            elif params[path].dtype != (wider := jnp.promote_types(params[path].dtype, wanted)):
                params[path] = params[path].astype(wider)
            with np.errstate(over="ignore"):  # what overflows is no longer finite, and refused
                params[path][layer] = _to_ours(piece, slot.axes, shape)
            if not np.isfinite(params[path][layer]).all():
                if np.isfinite(piece).all():
                    problems.append(f"{key}: too large for {params[path].dtype}")
                else:
                    problems.append(f"{key}: not finite, expected {slot.shape} finite numbers")
                break
    _refuse(problems, "the tensors hold numbers that no model can use")
    return unflatten_dict(params, sep="/")


def _refuse(problems: list[str], what: str) -> None:
    if problems:
        lines = "\n  ".join(sorted(problems))
        raise ValueError(f"{what} ({len(problems)} keys):\n  {lines}")


def _export(params: Mapping, rules: list[Rule]) -> tuple[dict, Iterator]:
    """Shape and dtype by official key, and an iterator of the tensors in that order."""
    flat = {k: np.asarray(v) for k, v in flatten_dict(nn.unbox(params), sep="/").items()}
    slots = _slots(rules, {k: v.shape for k, v in flat.items()})

    def tensor(slot: Slot) -> np.ndarray:
        pieces = [
            _to_official(flat[path][layer], slot.axes, shape)
            for (path, layer, _), shape in zip(slot.parts, slot.part_shapes, strict=True)
        ]
        # In row-major order, which is all that the safetensors library writes correctly.
        return np.ascontiguousarray(np.concatenate(pieces))

    shapes = {key: (slot.shape, flat[slot.parts[0][0]].dtype) for key, slot in slots.items()}
    return shapes, ((key, tensor(slot)) for key, slot in slots.items())


def _shapes(init: Callable[[], dict]) -> dict[str, tuple[int, ...]]:
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


def convert_aim(tensors: Mapping, config: AiMConfig, dtype: str | None = "float32") -> dict:
    """Official AiM tensors, or gradients with respect to them, as our parameter tree.

    Args:
      tensors: arrays, or what turns into arrays (`LazyTensor`), by official key; read one at a
        time. The output matrix, tied to the token embedding, may be left out.
      config: shape of the model, see `aim_config_from_official` and `infer_aim_config`.
      dtype: of the result; None keeps the tensors' own (the widest where several become one array).

    Returns:
      NumPy arrays, layers stacked.

    Raises:
      ValueError: naming every key that is missing, unexpected, misshapen or not finite, with the
        shape expected; or an output matrix that differs from the token embedding.
    """
    params = _convert(tensors, aim_rules(config), _aim_shapes(config), {TIED_HEAD}, dtype)
    if TIED_HEAD in tensors and not _equal(tensors[TIED_HEAD], tensors[TOKEN_EMBEDDING]):
        raise ValueError(
            f"{TIED_HEAD} differs from {TOKEN_EMBEDDING}; only models whose output matrix is the "
            "token embedding (tie_embeddings) can be converted."
        )
    return params


def _equal(a: Any, b: Any) -> bool:
    return tuple(a.shape) == tuple(b.shape) and np.array_equal(np.asarray(a), np.asarray(b))


def convert_vq(tensors: Mapping, config: VQConfig, dtype: str | None = "float32") -> dict:
    """Official tokenizer tensors, or gradients with respect to them, as our parameter tree.

    Args:
      tensors: as for `convert_aim`; the buffer with the history of codebook usage is left aside.
      config: shape of the tokenizer, see `vq_config_from_official` and `infer_vq_config`.
      dtype: of the result; None keeps the tensors' own.

    Returns:
      NumPy arrays.

    Raises:
      ValueError: naming every key that is missing, unexpected, misshapen or not finite.
    """
    return _convert(tensors, vq_rules(config), _vq_shapes(config), {USAGE_HISTORY}, dtype)


def export_aim(params: Mapping, config: AiMConfig) -> dict[str, np.ndarray]:
    """The inverse of `convert_aim`: our parameters or gradients by official key, head left out."""
    return dict(stream_official(params, config)[1])


def export_vq(params: Mapping, config: VQConfig) -> dict[str, np.ndarray]:
    """The inverse of `convert_vq`: our parameters or gradients by official key."""
    return dict(stream_official(params, config)[1])


def stream_official(params: Mapping, config: AiMConfig | VQConfig) -> tuple[dict, Iterator]:
    """The official tensors of a parameter tree one at a time, for trees that fill the memory.

    Returns:
      (shape, dtype) by official key, and an iterator of (key, array) in the same order.
    """
    rules = aim_rules(config) if isinstance(config, AiMConfig) else vq_rules(config)
    return _export(params, rules)
