"""The machine under us: memory, processor features, versions, signals. Linux figures are exact; elsewhere what the system offers."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import InputError, first_line

if TYPE_CHECKING:
    import torch

    from .progress import Progress

DTYPES = ("auto", "float32", "bfloat16", "float16")

_GROUP = Path("/sys/fs/cgroup")  # the control group (version 2) of a container, as it is seen from inside


@contextmanager
def signals_held() -> Iterator[None]:
    """Being told to stop waits until the end: of code in C that puts an error of its own in the place of an interrupt."""
    if threading.current_thread() is not threading.main_thread():  # no signal reaches Python code there
        yield
        return
    told: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {
        number: handler for number, handler in before.items() if handler is not None
    }  # None: not Python's to restore
    for number in before:
        signal.signal(number, lambda number, _: told.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if told:
            signal.raise_signal(told[0])


def peak_rss_bytes() -> int:
    """The process's largest resident size so far, in bytes.

    Linux: `VmHWM`, not `getrusage`, whose figure a child inherits from the process that started it.
    """
    return _status("VmHWM") or _getrusage_peak()


def rss_bytes() -> int:
    """The process's resident size now, in bytes."""
    return _status("VmRSS") or _getrusage_peak()


def reset_peak_rss() -> bool:
    """Let `peak_rss_bytes` count anew from what is resident now, so that a process can do several runs and tell their peaks apart.

    Linux only (`/proc/self/clear_refs`). False where the system does not let it: the peak then includes whatever came before.
    """
    before = _status("VmHWM")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return 0 < _status("VmHWM") <= before  # 0: the system keeps no such figure


def _status(field: str) -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _getrusage_peak() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_memory() -> None:
    """Give freed memory back to the system: a few milliseconds. glibc keeps it otherwise, and what comes next is put on top."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # absent where the C library is not glibc
        if trim is not None:
            trim(0)


def let_go() -> None:
    """Give the memory of models that nobody holds any more back to the system: a model refers to itself, so collecting comes first."""
    gc.collect()
    return_memory()


def available_memory_bytes() -> int:
    """Memory that can be taken without swapping, in bytes: the smaller of the system's and the control group's."""
    free = _system_memory_bytes()
    group = _group_memory_bytes()
    return free if group is None else min(free, group)


def _system_memory_bytes() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _group_memory_bytes() -> int | None:
    """What the control group may still take; None where it has no limit. Cached files count as used, but are given up on demand."""
    try:
        limit = (_GROUP / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((_GROUP / "memory.current").read_text())
        parts = dict(line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        cache = int(parts["inactive_file"]) + int(parts["active_file"])
    except (OSError, ValueError, KeyError):  # no such group, or files of another form
        return None
    return max(0, int(limit) - max(0, used - cache))


def free_disk_bytes(folder: Path) -> int:
    """Free bytes on the disk a folder is on, or would be on if it were made."""
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def parse_bytes(text: str) -> int:
    """`"800MB"`, `"2.5GiB"`, `"4G"` or plain bytes -> bytes. Decimal suffixes are powers of 1000, `i` ones of 1024."""
    number = text.strip().rstrip("BbiIkKmMgGtT")
    suffix = text.strip()[len(number) :].lower().rstrip("b")
    try:
        power = ["", "k", "m", "g", "t"].index(suffix.rstrip("i"))
        value = float(number) * (1024 if suffix.endswith("i") else 1000) ** power
    except ValueError:
        value = -1.0
    if value <= 0:
        raise InputError(f"memory budget '{text}' is not a size: write it like 800MB, 2.5GiB or 4G")
    return int(value)


def resolve_device(name: str) -> torch.device:
    """`auto` -> the first CUDA device if there is one, else the processor; any other name as PyTorch reads it."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # the meta device has no values, and is refused here
    except (RuntimeError, AssertionError) as problem:
        raise InputError(
            f"device '{name}' cannot be used here ({first_line(problem)}): take --device auto or cpu"
        ) from None
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the forward passes. `auto`: bfloat16 where the hardware multiplies it, else float32.

    It never changes what is stored: kept weights are written back in the checkpoint's own dtype, bit for bit.
    """
    import torch

    if name != "auto":
        if name not in DTYPES:
            raise InputError(f"dtype '{name}' is unknown: it is one of {', '.join(DTYPES)}")
        dtype = getattr(torch, name)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    # PyTorch has no public question for this; the operator is the one its own bf16 paths ask.
    native = device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def describe() -> dict[str, str | int]:
    """What the manifest keeps of the machine a run was made on."""
    import torch

    return {
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def adopt_threads(begun_with: int, progress: Progress) -> None:
    """Compute with as many threads as a run began with: sums taken in another order differ in their last bits."""
    import torch

    if begun_with != torch.get_num_threads():
        progress.say(f"computing with {begun_with} threads, as this run began, to end in the same bits")
        torch.set_num_threads(begun_with)


def versions() -> dict[str, str]:
    """Versions of what computes: Python, prunekit and the libraries that touch numbers or text."""
    found = {"python": platform.python_version()}
    for package in ("prunekit", "torch", "transformers", "tokenizers", "safetensors", "numpy"):
        found[package] = metadata.version(package)
    return found
