"""From what the user calls MODEL to a folder on disk: a local folder, the embedded model, or a download from the hub."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError, first_line
from ..progress import Progress, Silent
from . import embedded

_WANTED = [
    "*.safetensors",
    "*.json",
    "*.model",
    "*.txt",
    "*.jinja",
    "*.tiktoken",
    "LICEN[CS]E*",
    "COPYING*",
    "NOTICE*",
    "README.md",
]
_UNWANTED = ["consolidated*", "original/*"]  # the same weights once more, in the form of another library


def locate(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False, progress: Progress | None = None
) -> Path:
    """The folder that holds `model`.

    Args:
        model: a folder; `smollm2-135m`; or a hub id like `org/name` (downloaded into the hub's own cache, weights as safetensors).
        revision: branch, tag or commit of a hub model.
        trust_remote_code: fetch the model's own code too.
        progress: told before anything takes long.

    Raises:
        InputError: there is no such folder, or the hub does not give the model.
    """
    if model == embedded.NAME:
        return embedded.embedded_folder(progress or Silent())
    path = Path(model).expanduser()
    if path.exists() or model.startswith(("/", ".", "~")) or model.count("/") > 1:
        return path  # the reader says what is wrong with it
    (progress or Silent()).say(f"getting {model} from the hub")
    return _download(model, revision, [*_WANTED, "*.py"] if trust_remote_code else _WANTED)


def _download(model: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=_UNWANTED))
    except HFValidationError:
        raise InputError(f"model '{model}' is neither a folder nor a hub id like org/name") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as problem:
        raise InputError(
            f"model '{model}' is no folder here and the hub cannot be reached ({type(problem).__name__}): check the path or the "
            f"connection, or try the embedded model {embedded.NAME}"
        ) from None
    except Exception as problem:  # gated, renamed, no such revision: the hub's own sentence says which
        raise InputError(
            f"model '{model}' is no folder here and the hub does not give it: {first_line(problem)}"
        ) from None
