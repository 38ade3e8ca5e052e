"""`push`: a finished output folder to the hub, checked before a byte leaves."""

from __future__ import annotations

import glob
from pathlib import Path

from .checkpoint.manifest import read_manifest
from .checkpoint.writer import MANIFEST_NAME, PAGES
from .errors import InputError, PrunekitError
from .inspection import inspect_folder
from .progress import Progress


def upload(
    folder: Path,
    repo: str,
    *,
    private: bool,
    revision: str | None,
    token: str | None,
    endpoint: str | None,
    progress: Progress,
) -> str:
    """Make the repository and the branch where they are missing, and commit the folder; see `api.push`."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import validate_repo_id

    folder = folder.expanduser()
    try:
        validate_repo_id(repo)
    except ValueError:
        raise InputError(f"'{repo}' is no name of a repository: write it like name or owner/name") from None
    files = _checked(folder, progress)
    token = token or get_token()
    if token is None:
        raise InputError("pushing needs a token of the hub: log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi(endpoint=endpoint, token=token)
    progress.say(f"uploading {len(files)} files to {repo}")
    try:
        made = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(made, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=made,
            folder_path=folder,
            revision=revision,
            allow_patterns=[glob.escape(name) for name in files],
            commit_message="Pruned with prunekit",
        )
    except Exception as problem:  # an HTTP library's own errors, which differ by its release
        raise _said(problem, repo) from problem
    return str(commit.commit_url)


def _checked(folder: Path, progress: Progress) -> list[str]:
    """The names of what is uploaded, after every pattern and hash was found right."""
    manifest = read_manifest(folder)
    if manifest is None:
        hint = "finish it with the same command and --resume" if folder.is_dir() else "it is no folder"
        raise InputError(f"'{folder}' holds no finished run of prunekit, and only those are pushed: {hint}")
    progress.say(f"checking {folder}")
    found = inspect_folder(folder)
    if not found.sound:
        wrong = f"{', '.join(found.changed)} changed since it was written" if found.changed else ""
        broken = f"the pattern is broken in {', '.join(found.broken)}" if found.broken else ""
        reasons = "; ".join(reason for reason in (wrong, broken) if reason)
        raise InputError(
            f"'{folder}' is not what was pruned, and is not pushed: {reasons}. Prune again with --overwrite"
        )
    return [*manifest["outputs"], MANIFEST_NAME, *(name for name in PAGES if (folder / name).is_file())]


def _said(problem: Exception, repo: str) -> PrunekitError:
    """One sentence for what the hub, or the way there, answered."""
    status = getattr(getattr(problem, "response", None), "status_code", None)
    lines = str(getattr(problem, "server_message", None) or problem).strip().splitlines()
    reason = lines[0] if lines else type(problem).__name__
    if status == 401:
        return InputError(
            f"the hub does not know the token: log in again with `hf auth login`, or set HF_TOKEN ({reason})"
        )
    if status == 403:
        return InputError(
            f"the token may not write to '{repo}': take one with the right to write, or another name ({reason})"
        )
    if status is not None:
        return PrunekitError(f"the hub did not take '{repo}': {reason} (status {status})")
    return PrunekitError(
        f"'{repo}' could not be uploaded: {reason} ({type(problem).__name__}); the same command tries again"
    )
