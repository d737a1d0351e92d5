"""Model directories: self-describing models on disk.

Such a directory has one of two layouts. In training and conversion, `model.json` describes the
model (configurations, class names, sampling defaults, provenance, checksums), and Orbax writes the
parameters of its parts as `aim/` and `vq/`. A published model has the same description as
`config.json`, and its parameters in `model.safetensors`, which the tools of hubs know. Either has
the text tokenizer of captions, if captions condition the model, as `text_tokenizer.json`.
"""

import dataclasses
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Literal

import jax
from flax import linen as nn

from aim_jax.data.text import TEXT_TOKENIZER_FILE, TextTokenizer
from aim_jax.models.config import AiMConfig, VQConfig
from aim_jax.parallel.sharding import to_host
from aim_jax.utils.checks import check_arguments
from aim_jax.utils.files import replacing
from aim_jax.weights import hub_files, orbax_files, seal
from aim_jax.weights.model_files import (
    ADAPTER_FILE,
    FORMAT,
    FORMAT_VERSION,
    MODEL_FILE,
    PUBLISHED_FILE,
    check_content,
    description_file,
    read_description,
)
from aim_jax.weights.parts import PARTS, StoredPart, load_part
from aim_jax.weights.pretrained import Pretrained

EXPORT_DTYPES = ("float32", "float16", "bfloat16")  # storage dtypes of parameters


@check_arguments
def save_model(
    path: str | os.PathLike,
    model: Pretrained,
    dtype: str | None = "float32",
    files: Mapping = {},
    layout: Literal["orbax", "published"] = "orbax",
) -> Path:
    """Write a model directory atomically, replacing an older one.

    With several processes, all of them call this function, and the first one writes.

    Args:
      path: The directory.
      model: Model to write. Parameters that are NumPy arrays are written without a copy.
      dtype: Storage dtype of the parameters, such as "float16" for half the size; None keeps the
        dtypes of the parameters.
      files: Further files by name: functions that write to the path they are called with.
      layout: See the module.

    Raises:
      FileExistsError: The path is neither a model directory nor an empty directory.
      ValueError: The dtype is not float32, float16 or bfloat16.
    """
    path = Path(path).absolute()
    if dtype not in (None, *EXPORT_DTYPES):
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(EXPORT_DTYPES)}, or None.")
    if (
        path.exists()
        and description_file(path) is None
        and (not path.is_dir() or any(path.iterdir()))
    ):
        raise FileExistsError(f"{path} exists and is not a model directory; choose another path.")
    if jax.process_count() > 1:
        params = {name: to_host(getattr(model, name)) for name in ("aim_params", "vq_params")}
        model = dataclasses.replace(model, **params)
    if jax.process_index() == 0:
        write_model(path, model, dtype, files, layout)
    return path


def write_model(
    path: Path, model: Pretrained, dtype: str | None, files: Mapping, layout: str
) -> None:
    """Write a model directory from this process alone; see `save_model`.

    Any process may write the published layout; Orbax writes from the first one.
    """
    parts = {"aim": model.aim_params, "vq": model.vq_params}
    params = {part: _cast(x, dtype) for part, x in parts.items() if x is not None}
    dtypes = sorted({str(x.dtype) for x in jax.tree.leaves(params)})
    content = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "dtype": dtypes[0] if len(dtypes) == 1 else dtypes,
        "aim": model.aim_config and model.aim_config.fields(),
        "vq": model.vq_config and dataclasses.asdict(model.vq_config),
        "class_names": list(model.class_names),
        "sampling": model.sampling,
        "info": model.info,
    }
    with replacing(path) as partial:
        partial.mkdir()
        if isinstance(model.text, TextTokenizer):
            content["text"] = model.text.fingerprint
            files = {**files, TEXT_TOKENIZER_FILE: model.text.save}
        for name, write in files.items():
            write(partial / name)
        names = list(files)
        if layout == "orbax":
            file = partial / MODEL_FILE
            for part, tree in params.items():
                orbax_files.save_params(partial / part, tree)
        else:
            file = partial / PUBLISHED_FILE
            names += hub_files.save_params(partial, params)
        content[seal.FILES] = seal.file_sums(file, names)
        check_content(content)
        seal.write_description(file, content)


def _cast(params: dict, dtype: str | None) -> dict:
    params = nn.unbox(params)
    if dtype is None:
        return params
    return jax.tree.map(lambda x: x if x.dtype == dtype else x.astype(dtype), params)


def bundled_models() -> dict[str, Path]:
    """Return the directories of the models that come with the package, by name."""
    root = Path(str(resources.files("aim_jax"))) / "bundled"
    return {file.parent.name: file.parent for file in sorted(root.glob(f"*/{PUBLISHED_FILE}"))}


def find_directory(name_or_path: str | os.PathLike) -> Path | None:
    """Return the directory of the model or adapters of a name, a directory or a workdir, or None.

    Raises:
      FileNotFoundError: It is a workdir without a model yet.
    """
    # An absolute path stays the same model: "./cifar10" is not the bundled one.
    path = bundled_models().get(str(name_or_path), Path(name_or_path).absolute())
    for directory in (path, path / "model"):
        if description_file(directory) or (directory / ADAPTER_FILE).is_file():
            return directory
    if (path / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"no model {str(name_or_path)!r}: this training run ended before it wrote one. Repeat "
            "its training command, which resumes it; the model is written at the end, and after "
            "Ctrl-C."
        )
    return None


def load_directory(path: Path, name: str, *, as_stored: bool, verify: bool) -> Pretrained:
    """Load a model directory; see `aim_jax.load_pretrained`.

    Args:
      path: The directory.
      name: Name of the model.
      as_stored: Return NumPy arrays in their stored dtypes.
      verify: Check the SHA-256 of all files first.

    Raises:
      ValueError: See `aim_jax.load_pretrained`.
    """
    file, content = read_description(path)
    if verify:
        seal.check_model(file, content)
    stored = _open_parts(file, content)
    aim_config = AiMConfig(**content["aim"]) if "aim" in stored else None
    vq_config = VQConfig(**content["vq"]) if "vq" in stored else None
    return Pretrained(
        name=name,
        aim_config=aim_config,
        aim_params=load_part(stored["aim"], aim_config, as_stored) if aim_config else None,
        vq_config=vq_config,
        vq_params=load_part(stored["vq"], vq_config, as_stored) if vq_config else None,
        class_names=tuple(content["class_names"]),
        sampling=content["sampling"],
        info=content["info"],
        text=_load_text(path, content["text"]) if "text" in content else None,
    )


def _open_parts(file: Path, content: dict) -> dict[str, StoredPart]:
    """Open the parameters of the parts of a model beside its description."""
    path = file.parent
    parts = [part for part in PARTS if content[part] is not None]
    if file.name == MODEL_FILE:
        for part in parts:
            if not (path / part).is_dir():
                raise ValueError(f"{path / part} is missing; the model directory is incomplete.")
        return {part: orbax_files.open_params(path / part) for part in parts}
    # Only files that the description lists are read: the others were not verified.
    stored = hub_files.open_params(path, hub_files.INDEX in content.get(seal.FILES, {}))
    if wrong := sorted(set(parts) ^ stored.keys()):
        raise ValueError(
            f"{path}: {file.name} and the parameters differ in the parts of the model "
            f"({', '.join(wrong)}); the model directory is incomplete."
        )
    return stored


def _load_text(path: Path, fingerprint: str) -> TextTokenizer:
    """Load the text tokenizer of a model directory, and compare it with its fingerprint."""
    file = path / TEXT_TOKENIZER_FILE
    if not file.is_file():
        raise ValueError(f"{file} is missing; the model directory is incomplete.")
    tokenizer = TextTokenizer.load(file)
    if tokenizer.fingerprint != fingerprint:
        raise ValueError(
            f"{file} is not the text tokenizer of the model's training; get the model again."
        )
    return tokenizer
