"""Models by their name on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

import torch

from trainwright.base.errors import MissingDependencyError, ModelError
from trainwright.models.backbone import Backbone
from trainwright.models.importing import load_pretrained

__all__ = ["download", "load_hub"]

# Weights as safetensors and what tokenizers need; never pickle files, never code.
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def download(name: str, *, revision: str | None = None) -> Path:
    """The local folder of hub model `owner/name`, downloaded once and kept in the hub's cache.

    Raises:
        MissingDependencyError: huggingface_hub is not installed.
        ModelError: the name is unknown, access is refused, or there is no network and no cached copy.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingDependencyError(
            "loading from the Hugging Face hub needs huggingface_hub", hint="pip install 'trainwright[hub]'"
        ) from error
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_WANTED))
    except HFValidationError as error:
        raise ModelError(f"{name!r} is not a hub name: {error}", hint="write owner/name, or a local path") from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"cannot reach the Hugging Face hub for {name!r}, and no copy is cached",
            hint="check the network (and HF_ENDPOINT, HF_HUB_OFFLINE), or give the path of a local folder",
        ) from error
    except HfHubHTTPError as error:
        raise ModelError(
            f"the Hugging Face hub refused {name!r}: {error}",
            hint="check the name; for gated models log in with `hf auth login`",
        ) from error
    except OSError as error:
        raise ModelError(f"downloading {name!r} failed: {error}", hint="check the network and the disk") from error


def load_hub(
    name: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Backbone:
    """The model `owner/name` of the Hugging Face hub; see `load_pretrained` for the rest."""
    return load_pretrained(download(name, revision=revision), dtype=dtype, device=device)
