"""Loading of models by name: bundled, on disk, on the hub, in this library's form or the official.

Official weights of AiM and LlamaGen are converted on the way, into the cache directory.
"""

import functools
import os
from pathlib import Path

from aim_jax.utils.cache import cache_directory, locked
from aim_jax.utils.checks import check_arguments
from aim_jax.utils.checksums import sha256
from aim_jax.utils.logging import say
from aim_jax.weights import hub, seal
from aim_jax.weights.directories import (
    bundled_models,
    find_directory,
    load_directory,
    write_model,
)
from aim_jax.weights.formats.file_names import HUB_FILES
from aim_jax.weights.model_files import (
    ADAPTER_FILE,
    FORMAT_VERSION,
    LEFTOVERS,
    MODEL_FILE,
    description_file,
    read_description,
)
from aim_jax.weights.pretrained import Pretrained

CONVERSION = 1  # changes with what `to_jax` makes of the same files
CONVERSION_SECONDS = 600  # to wait for another process that converts the same files


@check_arguments
def find_model(name_or_path: str | os.PathLike) -> Path:
    """Return the model directory of a bundled name, a path or a hub address.

    Args:
      name_or_path: See `load_pretrained`.

    Raises:
      FileNotFoundError: There is no such model.
      ValueError: The address is malformed, or official weights cannot be converted.
    """
    place = name_or_path
    if str(name_or_path).startswith(hub.PREFIX):  # only these need the network
        place = hub.download(str(name_or_path))
    if directory := find_directory(place):
        return directory
    path = Path(place).absolute()
    if path.is_file() or any((path / name).is_file() for name in HUB_FILES):
        return _converted(path, str(name_or_path))
    raise FileNotFoundError(
        f"no model {str(name_or_path)!r}: expected a directory with {MODEL_FILE} (a training "
        "workdir has one in model/ after its first export), a published model, official weights, "
        f"or one of {sorted(bundled_models())}."
    )


def _converted(path: Path, name: str) -> Path:
    """Return the model directory of official weights, which is made in the cache if need be.

    Each process makes it or finds it, as processes of a run need not share a cache.
    """
    # They need safetensors, which training does not.
    from aim_jax.weights.convert.official import to_jax
    from aim_jax.weights.formats.files import open_weights

    opened = open_weights(path)
    sums = sha256([file.resolve() for file in opened.files])
    key = seal.sum_of({"files": sums, "config": opened.config, "conversion": CONVERSION})
    target = cache_directory("converted") / key[:32]
    with locked(target.with_suffix(".lock"), CONVERSION_SECONDS):
        if not description_file(target):
            size = sum(file.stat().st_size for file in opened.files)
            say(f"{name}: converting official weights of {size / 1e9:.2f} GB into {target}")
            to_jax(path, target, write=functools.partial(write_model, layout="published"))
    return target


@check_arguments
def load_pretrained(
    name_or_path: str | os.PathLike, *, as_stored: bool = False, verify: bool = True
) -> Pretrained:
    """Load a model: bundled, from disk or from the hub.

    Official weights of AiM and of LlamaGen's tokenizers are converted, which needs no PyTorch, into
    the cache directory, where the next call finds them by the SHA-256 of their files.

    Args:
      name_or_path: "fashion_mnist", "cifar10", ...; a model directory; a training workdir, whose
        newest exported model (`model/`) is loaded; adapters, which are merged into their model; a
        file or directory of official weights; or "hf://owner/name[/file][@revision]" on the hub,
        which is downloaded once.
      as_stored: Return parameters as NumPy arrays in their stored dtypes, instead of float32 on the
        first device.
      verify: Check the SHA-256 of all files first. A directory of the first version has none, which
        is said.

    Raises:
      FileNotFoundError: There is no such model.
      ValueError: The directory is incomplete, damaged, or of a version that this library cannot
        read; or its description was edited and not sealed; or the official weights are not those of
        a model.
    """
    path = find_model(name_or_path)
    if (path / ADAPTER_FILE).is_file():
        from aim_jax.weights.adapters import load_adapted

        load = functools.partial(load_pretrained, as_stored=True, verify=verify)
        return load_adapted(path, str(name_or_path), load, as_stored)
    return load_directory(path, str(name_or_path), as_stored=as_stored, verify=verify)


def own_directory(name_or_path: str | os.PathLike) -> Path:
    """Return a model directory that belongs to the user, whose description may be changed.

    Raises:
      FileNotFoundError: There is no such model.
      ValueError: The model is bundled or on the hub, or made of official weights or adapters.
    """
    name = str(name_or_path)
    directory = None
    if name not in bundled_models() and not name.startswith(hub.PREFIX):
        directory = find_directory(name_or_path)
        if directory is None and not Path(name_or_path).exists():
            return find_model(name_or_path)  # raises
    if directory is None or (directory / ADAPTER_FILE).is_file():
        raise ValueError(
            f"{name} is read-only; make a copy with aim-jax publish --checkpoint {name} --out DIR, "
            "and change the copy."
        )
    return directory


@check_arguments
def seal_model(name_or_path: str | os.PathLike) -> Path:
    """Write the checksums of a model directory again, after an edit of its description.

    A directory of the first version gets checksums of its files as well.

    Returns:
      The path of the description.

    Raises:
      FileNotFoundError: There is no such model.
      ValueError: Its files are not those that were written, or the model is not the user's own.
    """
    file, content = read_description(own_directory(name_or_path))
    sealed = seal.is_sealed(content)
    if sealed:
        seal.check_files(file, content)
    load_pretrained(file.parent, as_stored=True, verify=False)  # an edit that cannot be read fails
    if not sealed:
        content |= {"version": FORMAT_VERSION, seal.FILES: seal.file_sums(file, (LEFTOVERS,))}
    seal.write_description(file, content)
    return file
