"""Models on the Hugging Face hub."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from aim_jax.data.text import TEXT_TOKENIZER_FILE
from aim_jax.utils.cache import default_or_cached
from aim_jax.utils.logging import say
from aim_jax.utils.names import check_text, reason_of, short_list
from aim_jax.weights.formats.file_names import HUB_FILES
from aim_jax.weights.model_files import LEFTOVERS, MODEL_FILE, PUBLISHED_FILE

PREFIX = "hf://"
# Files of a model directory, published or not, and of official weights as safetensors; nothing else
# of a repository is downloaded or uploaded.
PATTERNS = [
    PUBLISHED_FILE, "*.safetensors", "*.safetensors.index.json", "README.md", "samples.png",
    TEXT_TOKENIZER_FILE, LEFTOVERS, MODEL_FILE, "aim/*", "vq/*",
]  # fmt: skip
PICKLES = ["*.bin", "*.bin.index.json"]  # of a repository without safetensors
ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


class Released(NamedTuple):
    """Weights that the authors of AiM or LlamaGen released.

    Attributes:
      what: The model.
      bytes: Size of the download.
    """

    what: str
    bytes: float


# By address. Their sampling settings, positions and class names are those of `convert.to_jax`.
RELEASED = {
    "hf://hp-l33/aim-base": Released("AiM-B with VQ-f16, ImageNet 256", 0.88e9),
    "hf://hp-l33/aim-large": Released("AiM-L with VQ-f16, ImageNet 256", 1.69e9),
    "hf://hp-l33/aim-xlarge": Released("AiM-XL with VQ-f16, ImageNet 256", 3.34e9),
    "hf://FoundationVision/LlamaGen/vq_ds16_c2i.pt": Released("VQ-f16", 0.29e9),
    "hf://FoundationVision/LlamaGen/vq_ds8_c2i.pt": Released("VQ-f8", 0.28e9),
}


class Address(NamedTuple):
    """Address of a model: hf://owner/name[/file][@revision]; file and revision may be ""."""

    repository: str
    file: str
    revision: str


def parse_address(address: str) -> Address:
    """Return the parts of an address.

    Raises:
      ValueError: It is malformed, or refused by `check_text`.
    """
    check_text("address of a model", address)
    place, _, revision = address.removeprefix(PREFIX).partition("@")
    owner, _, others = place.partition("/")
    name, _, file = others.partition("/")
    if not (owner and name) or place.endswith("/") or ".." in place.split("/"):
        raise ValueError(f"{address!r}: expected hf://owner/name[/file][@revision].")
    return Address(f"{owner}/{name}", file, revision)


def download(address: str) -> Path:
    """Download a model from the hub, or return it from the hub's local cache.

    Nothing that is downloaded is executed: parameters are arrays, the rest is JSON.

    Args:
      address: See `Address`; without a file, the repository holds one model.

    Returns:
      The directory of the model, or the file.

    Raises:
      ValueError: The address is malformed.
      FileNotFoundError: There is no such repository, revision or file; or it holds no weights; or
        there is no network and no cached copy.
      PermissionError: Its licence has to be accepted first.
      OSError: The hub fails, or the connection breaks.
    """
    repository, file, revision = parse_address(address)
    import huggingface_hub as hub  # takes a second

    elsewhere = default_or_cached(_default_cache(), "hub")
    options: dict[str, Any] = {} if elsewhere is None else {"cache_dir": elsewhere}
    options["revision"] = revision or None
    if released := RELEASED.get(address):
        say(f"{address}: {released.what}, {released.bytes / 1e9:.2f} GB to download once")
    with _failures_of_download(address, repository):
        if file:
            return Path(hub.hf_hub_download(repository, file, **options))
        directory = Path(hub.snapshot_download(repository, allow_patterns=PATTERNS, **options))
        if not _holds_model(directory):
            directory = Path(hub.snapshot_download(repository, allow_patterns=PICKLES, **options))
        if not _holds_model(directory):
            names = hub.list_repo_files(repository, revision=revision or None)
            weights = [name for name in names if name.endswith(ENDINGS)]
            raise FileNotFoundError(
                f"{address}: the repository holds no model under a usual name. "
                + (
                    f"Name one of its files: {PREFIX}{repository}/FILE, of {short_list(weights)}."
                    if weights
                    else "It has no file of weights."
                )
            )
    return directory


def _holds_model(directory: Path) -> bool:
    return any((directory / name).is_file() for name in (MODEL_FILE, *HUB_FILES))


@contextlib.contextmanager
def _failures_of_download(address: str, repository: str) -> Iterator[None]:
    from huggingface_hub import errors
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its warnings repeat what the errors below say
    try:
        yield
    except errors.GatedRepoError:
        raise PermissionError(
            f"{address}: its licence has to be accepted first, at {_page(repository)}; then log in "
            "with hf auth login."
        ) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise FileNotFoundError(
            f"{address}: no such repository or revision, or it is private: log in with hf auth "
            "login."
        ) from None
    except errors.LocalEntryNotFoundError:
        raise FileNotFoundError(
            f"{address}: the hub cannot be reached, and the model is not in its cache. Connect to "
            f"the network, or run hf download {repository} --local-dir DIR elsewhere and load DIR."
        ) from None
    except errors.EntryNotFoundError:
        raise FileNotFoundError(
            f"{address}: the repository has no such file; see {_page(repository)}/tree/main."
        ) from None
    except (FileNotFoundError, PermissionError):
        raise
    except errors.HFValidationError as error:
        raise ValueError(f"{address}: {_first_line(error)}.") from None
    except Exception as error:  # of the hub, or of the HTTP library that it uses
        raise OSError(
            f"{address}: the download failed ({_first_line(error)}). Repeat the command: it "
            "continues where it stopped."
        ) from None
    finally:
        logging.set_verbosity(verbosity)


def _page(repository: str) -> str:
    return f"https://huggingface.co/{repository}"


def _first_line(error: Exception) -> str:
    return reason_of(error).rstrip(". ")


def _default_cache() -> str:
    """Return the directory in which huggingface_hub keeps what it downloads."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{caches}/huggingface"
    return os.environ.get("HF_HUB_CACHE") or f"{home}/hub"


def prepare(repository: str) -> None:
    """Create the repository "owner/name" if it does not exist.

    Raises:
      OSError: The hub cannot be reached, or refuses the request.
    """
    from huggingface_hub import create_repo

    with _failures_of(repository, "Log in with hf auth login, and try again."):
        create_repo(repository, exist_ok=True)


def upload(directory: Path, repository: str) -> None:
    """Upload a model directory to an existing repository; raises the errors of `prepare`."""
    from huggingface_hub import upload_folder

    advice = f"{directory} is complete; retry with hf upload {repository} {directory}."
    with _failures_of(repository, advice):
        # What an older version of the model has left there would be read beside this one.
        upload_folder(
            repo_id=repository, folder_path=str(directory), allow_patterns=PATTERNS,
            delete_patterns=PATTERNS,
        )  # fmt: skip


@contextlib.contextmanager
def _failures_of(repository: str, advice: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of the hub, or of the HTTP library that it uses
        raise OSError(f"{PREFIX}{repository}: {_first_line(error)}. {advice}") from None
