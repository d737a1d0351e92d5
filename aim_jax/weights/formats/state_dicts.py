"""Common forms of checkpoints: nested dictionaries, moving averages, and prefixes of names.

Training programs store an exponential moving average (EMA) of the weights beside the weights, and
their own loaders take the average. Wrappers of modules add prefixes to the names.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from aim_jax.utils.logging import say
from aim_jax.weights.formats.errors import WeightsError

# Names of dictionaries and prefixes that hold a moving average: "ema", "model_ema", "params_ema".
AVERAGE = re.compile(r"(?:^|[_-])ema(?=$|[_\d.-])", re.IGNORECASE)
# Names of dictionaries that hold the weights, in order of preference.
MODELS = (
    "state_dict", "model_state_dict", "model", "module", "params", "weights", "net", "network",
    "generator", "state", "shadow",
)  # fmt: skip
# Modules that wrap others: data-parallel and averaged models, torch.compile, FSDP, checkpointed
# activations, and strategies of Lightning. They occur anywhere in a name.
WRAPPERS = frozenset(
    {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
    | {"_forward_module"}
)
# Attributes under which programs hold the model; they occur at the start of a name.
HOLDERS = frozenset(
    {"model", "net", "network", "generator", "state_dict", "aim", "gpt", "tokenizer", "vq"}
    | {"vq_model", "vqgan", "vae", "autoencoder", "first_stage_model"}
)
# Entries of averages that are not weights.
BOOKKEEPING = frozenset({"n_averaged", "num_updates", "decay", "initted", "step"})
FLATTENED = "_flat_param"  # name of the parameters that FSDP has joined
MAX_DEPTH = 6  # a damaged file may hold a dictionary that contains itself

Tensor = TypeVar("Tensor")


class StateDict(NamedTuple):
    """Dictionary that was chosen from a checkpoint.

    Attributes:
      key: Dotted names of the dictionaries around it; "" if there are none.
      content: Its entries, which are not checked.
      others: Names of further dictionaries of tensors beside it.
    """

    key: str
    content: Mapping
    others: tuple[str, ...] = ()


def choose(content: Mapping, is_tensor: Callable[[Any], bool], weights_key: str = "") -> StateDict:
    """Choose the weights of a checkpoint: a moving average if there is one, else the model.

    Args:
      content: Content of the checkpoint, which may be nested.
      is_tensor: Returns whether a value is a tensor.
      weights_key: Name of the dictionary to take, with dots between nested names; "" chooses.

    Raises:
      WeightsError: There is no dictionary of that name; or there are several averages, or one
        without names.
    """
    taken = []
    others: tuple[str, ...] = ()
    if weights_key:
        found = _lookup(content, weights_key)
        if not isinstance(found, Mapping) or not _holds_tensors(found, is_tensor):
            known = ", ".join(_dictionaries(content, is_tensor)) or "none"
            raise WeightsError(
                f"holds no dictionary of tensors {weights_key!r}; dictionaries of tensors: {known}"
            )
        content = found
        taken.append(weights_key)
    for _ in range(MAX_DEPTH):
        name = _preferred(content, is_tensor)
        if name is None:
            break
        beside = _dictionaries(content, is_tensor, depth=1)
        others += tuple(".".join([*taken, other]) for other in beside if other != name)
        content = content[name]
        taken.append(name)
    return StateDict(".".join(taken), content, others)


def _preferred(content: Mapping, is_tensor: Callable[[Any], bool]) -> str | None:
    """Return the name of the dictionary inside that holds the weights, or None."""
    held = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and _holds_tensors(value, is_tensor)
    }
    averages = [name for name in held if AVERAGE.search(name) and not is_tensor(held[name])]
    if len(averages) > 1:
        raise WeightsError(
            f"holds several moving averages: {', '.join(averages)}; choose one with --weights_key"
        )
    if averages:
        if not _leads_to_names(held[averages[0]], is_tensor):
            raise WeightsError(
                f"holds a moving average {averages[0]!r} without the names of its tensors; choose "
                f"other weights with --weights_key: {', '.join(_dictionaries(content, is_tensor))}"
            )
        return averages[0]
    return next((name for name in MODELS if isinstance(held.get(name), Mapping)), None)


def _holds_tensors(
    value: Any, is_tensor: Callable[[Any], bool], seen: set[int] | None = None
) -> bool:
    """Return whether a tensor is anywhere inside a value."""
    if is_tensor(value):
        return True
    seen = set() if seen is None else seen
    if id(value) in seen or not isinstance(value, Mapping | list | tuple):
        return False
    seen.add(id(value))
    inner = value.values() if isinstance(value, Mapping) else value
    return any(_holds_tensors(x, is_tensor, seen) for x in inner)


def _leads_to_names(
    value: Any, is_tensor: Callable[[Any], bool], seen: set[int] | None = None
) -> bool:
    """Return whether a value is a dictionary of tensors, or holds one under a known name."""
    seen = set() if seen is None else seen
    if id(value) in seen or not isinstance(value, Mapping):
        return False
    seen.add(id(value))
    if any(is_tensor(x) and name not in BOOKKEEPING for name, x in value.items()):
        return True
    return any(
        _leads_to_names(x, is_tensor, seen)
        for name, x in value.items()
        if name in MODELS or (isinstance(name, str) and AVERAGE.search(name))
    )


def _dictionaries(
    content: Mapping, is_tensor: Callable[[Any], bool], depth: int = 3, seen: set[int] | None = None
) -> list[str]:
    """Return the dotted names of the dictionaries of tensors in a checkpoint."""
    seen = set() if seen is None else seen
    names = []
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Mapping) or id(value) in seen:
            continue
        seen.add(id(value))
        if any(isinstance(key, str) and is_tensor(x) for key, x in value.items()):
            names.append(name)
        if depth > 1:
            inner = _dictionaries(value, is_tensor, depth - 1, seen)
            names += [f"{name}.{other}" for other in inner]
    return names


def _lookup(content: Any, key: str) -> Any:
    """Return the entry of a dotted name, or None."""
    if not isinstance(content, Mapping):
        return None
    if key in content:
        return content[key]
    first, _, remaining = key.partition(".")
    return _lookup(content.get(first), remaining) if remaining else None


def unwrapped(name: str) -> str:
    """Return the name of a tensor without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def held_name(name: str) -> str:
    """Return the name of a tensor without the attributes of `HOLDERS` at its start."""
    first, dot, remaining = name.partition(".")
    return held_name(remaining) if dot and first in HOLDERS else name


def plain_names(
    tensors: Mapping[str, Tensor], where: object, prefix: str = ""
) -> dict[str, tuple[str, Tensor]]:
    """Return the tensors of a model by name, without wrappers, prefixes and bookkeeping.

    Of an average and the weights beside it, such as "ema_model.*" and "online_model.*", the average
    is taken.

    Args:
      tensors: Tensors by the name in the file.
      where: The file, for messages.
      prefix: Only names that start with it are taken, without it.

    Returns:
      The name in the file and the tensor, by plain name.

    Raises:
      WeightsError: No name starts with the prefix; two names become the same; there are several
        averages; or FSDP has joined the parameters.
    """
    if prefix:
        chosen = {
            name: name[len(prefix) :].removeprefix(".")
            for name in tensors
            if name.startswith(prefix) and len(name) > len(prefix)
        }
        if not chosen:
            raise WeightsError(
                f"{where}: no name starts with the prefix {prefix!r}; names start with "
                f"{', '.join(_starts(tensors))}."
            )
        if ignored := len(tensors) - len(chosen):
            say(f"{where}: took the {len(chosen)} tensors {prefix}*, not the other {ignored}")
    else:
        chosen = {name: name for name in tensors}
    plain: dict[str, tuple[str, Tensor]] = {}
    for original, name in chosen.items():
        if name.rpartition(".")[2] == FLATTENED:
            raise WeightsError(
                f"{where}: {original} holds parameters that FSDP has joined; save the checkpoint "
                "again with the full state dict (StateDictType.FULL_STATE_DICT)."
            )
        name = held_name(unwrapped(name))
        if name.rpartition(".")[2] in BOOKKEEPING and name.count(".") <= 1:
            continue
        if name in plain:
            raise WeightsError(f"{where}: {original} occurs under two names.")
        plain[name] = (original, tensors[original])
    return plain if prefix else _average_of(plain, where)


def _average_of(
    plain: dict[str, tuple[str, Tensor]], where: object
) -> dict[str, tuple[str, Tensor]]:
    """Return the moving average among named tensors if there is one, else all of them."""
    first = {name: name.partition(".")[0] for name in plain if "." in name}
    averages = sorted({start for start in first.values() if AVERAGE.search(start)})
    if not averages:
        return plain
    if len(averages) > 1:
        listed = ", ".join(f"{start}." for start in averages)
        raise WeightsError(
            f"{where}: holds several moving averages: {listed}; choose one with --prefix."
        )
    start = averages[0] + "."
    average = {
        held_name(name.removeprefix(start)): x
        for name, x in plain.items()
        if name.startswith(start)
    }
    others = {name: x for name, x in plain.items() if not name.startswith(start)}
    if others:
        say(
            f"{where}: took the moving average {start}*; the file also holds "
            f"{', '.join(_starts(others))} (--prefix chooses)"
        )
    if not all("." in name for name in average):
        # LitEma of Lightning programs drops the dots, and averages the parameters only.
        full = {name.replace(".", ""): name for name in others}
        if average.keys() <= full.keys():
            return others | {full[name]: x for name, x in average.items()}
    return average


def _starts(names: Iterable[str], most: int = 8) -> list[str]:
    """Return the first parts of names, as "encoder.*"."""
    starts = list(dict.fromkeys(f"{name.partition('.')[0]}.*" for name in names))
    return [*starts[:most], "..."] if len(starts) > most else starts
