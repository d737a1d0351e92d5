"""Model directories on the Hugging Face hub; needs the extra `hub`."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from aim_jax.utils.cache import default_or_cached
from aim_jax.utils.names import check_text

PREFIX = "hf://"
# Files of a model directory; nothing else of a repository is downloaded or uploaded.
PATTERNS = ["model.json", "README.md", "official_buffers.safetensors", "aim/*", "vq/*"]


def download(address: str) -> Path:
    """Download a model directory from the hub, or return it from the hub's local cache.

    Nothing that is downloaded is executed: parameters are arrays, the rest is JSON.

    Args:
      address: "hf://owner/name" or "hf://owner/name@revision".

    Raises:
      ValueError: The address is malformed or refused by `check_text`, or huggingface_hub is not
        installed.
      FileNotFoundError: There is no such repository or revision, or no network and no cached copy.
    """
    check_text("address of a model", address)
    name, _, revision = address.removeprefix(PREFIX).partition("@")
    if name.count("/") != 1 or not all(name.split("/")):
        raise ValueError(f"{address!r}: expected hf://owner/name or hf://owner/name@revision.")
    hub = import_hub()
    elsewhere = default_or_cached(_default_cache(), "hub")
    options: dict[str, Any] = {} if elsewhere is None else {"cache_dir": elsewhere}
    try:
        directory = hub.snapshot_download(
            name, revision=revision or None, allow_patterns=PATTERNS, **options
        )
        return Path(directory)
    except hub.errors.LocalEntryNotFoundError:
        raise FileNotFoundError(
            f"{address}: the hub cannot be reached, and the model is not in its cache. Connect to "
            f"the network, or run hf download {name} --local-dir DIR elsewhere and load DIR."
        ) from None
    except (hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError):
        raise FileNotFoundError(
            f"{address}: no such repository or revision, or it is private: log in with hf auth "
            "login."
        ) from None


def _default_cache() -> str:
    """Return the directory in which huggingface_hub keeps what it downloads."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{caches}/huggingface"
    return os.environ.get("HF_HUB_CACHE") or f"{home}/hub"


def prepare(repository: str) -> None:
    """Create the repository "owner/name" if it does not exist.

    Raises:
      ValueError: huggingface_hub is not installed.
      OSError: The hub cannot be reached, or refuses the request.
    """
    hub = import_hub()
    with _failures_of(repository, "Log in with hf auth login, and try again."):
        hub.create_repo(repository, exist_ok=True)


def upload(directory: Path, repository: str) -> None:
    """Upload a model directory to an existing repository; raises the errors of `prepare`."""
    hub = import_hub()
    advice = f"{directory} is complete; retry with hf upload {repository} {directory}."
    with _failures_of(repository, advice):
        hub.upload_folder(repo_id=repository, folder_path=str(directory), allow_patterns=PATTERNS)


@contextlib.contextmanager
def _failures_of(repository: str, advice: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of the hub, or of the HTTP library that it uses
        raise OSError(f"hf://{repository}: {str(error).rstrip('. ')}. {advice}") from None


def import_hub() -> ModuleType:
    """Return the module huggingface_hub; raise ValueError naming the extra if it is missing."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise ValueError("the hub needs huggingface_hub: pip install 'aim_jax[hub]'.") from None
    return huggingface_hub
