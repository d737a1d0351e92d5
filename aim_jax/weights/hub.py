"""Model directories on the Hugging Face hub, which needs the extra `hub`."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

PREFIX = "hf://"
# What a model directory is made of; nothing else of a repository is fetched or uploaded.
PATTERNS = ["model.json", "README.md", "official_buffers.safetensors", "aim/*", "vq/*"]


def download(address: str) -> Path:
    """Fetches a model directory from the hub, or finds it in the hub's cache.

    Nothing of it is run: parameters are arrays, the rest is JSON.

    Args:
      address: "hf://owner/name" or "hf://owner/name@revision".

    Raises:
      ValueError: the address is malformed, or huggingface_hub is not installed.
      FileNotFoundError: no such repository or revision, or no network and nothing in the cache.
    """
    name, _, revision = address.removeprefix(PREFIX).partition("@")
    if name.count("/") != 1 or not all(name.split("/")):
        raise ValueError(f"{address!r}: expected hf://owner/name or hf://owner/name@revision.")
    hub = import_hub()
    try:
        return Path(hub.snapshot_download(name, revision=revision or None, allow_patterns=PATTERNS))
    except hub.errors.LocalEntryNotFoundError:
        raise FileNotFoundError(
            f"{address}: the hub cannot be reached, and the model is not in its cache. Connect "
            f"once, or fetch it elsewhere (hf download {name} --local-dir DIR) and load DIR."
        ) from None
    except (hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError):
        raise FileNotFoundError(
            f"{address}: no such repository or revision, or it is private: log in with hf auth "
            "login."
        ) from None


def prepare(repository: str) -> None:
    """Makes the repository "owner/name" if need be.

    Raises:
      ValueError: huggingface_hub is not installed.
      OSError: the hub cannot be reached, or refuses.
    """
    hub = import_hub()
    with _failures_of(repository, "Log in with hf auth login, and try again."):
        hub.create_repo(repository, exist_ok=True)


def upload(directory: Path, repository: str) -> None:
    """Uploads a model directory to a repository that is there; errors are those of `prepare`."""
    hub = import_hub()
    again = f"{directory} is whole; hf upload {repository} {directory} tries again."
    with _failures_of(repository, again):
        hub.upload_folder(repo_id=repository, folder_path=str(directory), allow_patterns=PATTERNS)


@contextlib.contextmanager
def _failures_of(repository: str, advice: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # its errors, or those of whichever HTTP library it has
        raise OSError(f"hf://{repository}: {error} {advice}") from None


def import_hub() -> ModuleType:
    """The module huggingface_hub; ValueError that names the extra where it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise ValueError("the hub needs huggingface_hub: pip install 'aim_jax[hub]'.") from None
    return huggingface_hub
