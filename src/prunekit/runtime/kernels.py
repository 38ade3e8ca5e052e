"""Products with packed weights: the C library's kernels, or torch's where there is no library.

Which instructions are used is decided when they are first needed, by what the processor has; `PRUNEKIT_KERNEL` names other ones.
"""

from __future__ import annotations

import ctypes
import os
import threading
import warnings
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..checkpoint.bitmask import read_mask, unpack
from ..errors import InputError, PrunekitWarning, nearest
from .build import LIBRARY
from .packed import Packed

VARIABLE = "PRUNEKIT_KERNEL"
LEVELS = ("portable", "avx2", "avx512", "avx512-bf16", "neon")  # as in native/packed.h
FALLBACK = "torch"
_INTERFACE = 2
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# both measured by benchmarks/runtime.py --parts switch; nothing is known of neon but that its vectors are half as wide as those of avx2
_MOST_ROWS = {"avx512-bf16": 64, "avx512": 48, "avx2": 12, "neon": 12, "portable": 2}
_TILE_BYTES = 4 << 20


class Kernels(Protocol):
    """What multiplies with packed weights.

    Attributes:
        name: the instructions used.
        most_rows: rows of x up to which `few_rows` is faster than a product with dense tiles.
    """

    name: str
    most_rows: int

    def few_rows(self, packed: Packed, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [n, columns], contiguous, times the weight, plus bias [rows]: [n, rows]."""

    def expand(self, packed: Packed, begin: int, out: Tensor) -> None:
        """Fill `out` [rows, columns], contiguous and of the dtype of the values, with rows of the weight from `begin` on."""


class NativeKernels:
    """Those of the C library, with one set of instructions."""

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        self.name = name
        self.most_rows = _MOST_ROWS[name]
        self._level = LEVELS.index(name)
        self._multiply = library.prunekit_multiply
        self._expand = library.prunekit_expand

    def few_rows(self, packed: Packed, x: Tensor, bias: Tensor | None) -> Tensor:
        """As in `Kernels`; sums are float32."""
        values, dtype = packed.values, x.dtype
        dot = self.name == "avx512-bf16" and dtype is torch.bfloat16 and values.dtype is torch.bfloat16
        if not dot and dtype is not torch.float32:
            x = x.float()
        if bias is not None and bias.dtype is not x.dtype:
            bias = bias.to(x.dtype)
        rows, count = packed.rows, x.shape[0]
        y = torch.empty((count, rows), dtype=x.dtype)
        failed = self._multiply(
            self._level,
            _DTYPES[values.dtype],
            torch.get_num_threads(),
            dot,
            rows,
            packed.columns,
            packed.mask.data_ptr(),
            values.data_ptr(),
            packed.offsets.data_ptr(),
            None if bias is None else bias.data_ptr(),
            count,
            x.data_ptr(),
            y.data_ptr(),
        )
        if failed:
            raise MemoryError(f"no memory for a copy of {x.numel()} inputs")
        return y if dtype is y.dtype else y.to(dtype)

    def expand(self, packed: Packed, begin: int, out: Tensor) -> None:
        """As in `Kernels`."""
        self._expand(
            self._level,
            _DTYPES[out.dtype],
            torch.get_num_threads(),
            packed.columns,
            packed.mask.data_ptr(),
            packed.values.data_ptr(),
            packed.offsets.data_ptr(),
            begin,
            begin + len(out),
            out.data_ptr(),
        )


class TorchKernels:
    """Torch's own operations: right everywhere, and slower than dense weights."""

    name = FALLBACK
    most_rows = 0

    def few_rows(self, packed: Packed, x: Tensor, bias: Tensor | None) -> Tensor:
        """As in `Kernels`."""
        return through_tiles(self, packed, x, bias)

    def expand(self, packed: Packed, begin: int, out: Tensor) -> None:
        """As in `Kernels`."""
        end = begin + len(out)
        keep = read_mask(packed.mask[begin:end], packed.columns)
        unpack(out, keep, packed.values[packed.offsets[begin] : packed.offsets[end]])


def gram_kernel(dtype: torch.dtype, device: torch.device) -> str:
    """The name of the kernels that sum gram matrices of inputs of a dtype, `torch` where that does it itself."""
    if dtype is not torch.bfloat16 or device.type != "cpu" or chosen().name != "avx512-bf16":
        return FALLBACK
    return chosen().name


def add_gram(gram: Tensor, rows: Tensor) -> bool:
    """Add Σ x xᵀ over some rows x to the lower triangle of `gram`; what stands above it is then no longer of use.

    Sums are float32, and the same whatever the number of threads. Shapes: gram [in, in] float32, rows [tokens, in]. Returns False, and
    has done nothing, where the kernels in use have none for rows of their kind: it takes bfloat16 products, with float32 sums.
    """
    if gram_kernel(rows.dtype, rows.device) == FALLBACK:
        return False
    library, rows = _library(), rows.contiguous()
    assert library is not None
    if library.prunekit_add_gram(torch.get_num_threads(), *rows.shape, rows.data_ptr(), gram.data_ptr()):
        raise MemoryError(f"no memory for a copy of inputs of {rows.shape[1]} columns")
    return True


def linear(packed: Packed, x: Tensor, bias: Tensor | None, kernels: Kernels | None = None) -> Tensor:
    """x [..., columns] times a packed weight [rows, columns], plus bias [rows]: [..., rows].

    x must be of the dtype of the weight's values, or float32. Few rows are multiplied with the weight as it is packed, many with dense
    tiles of it. Raises `InputError` where x is of another dtype or size.
    """
    kernels = kernels or chosen()
    if x.shape[-1] != packed.columns or (x.dtype is not packed.values.dtype and x.dtype is not torch.float32):
        raise InputError(
            f"inputs {x.dtype} {list(x.shape)} do not fit a packed weight of {packed.columns} columns of {packed.values.dtype}"
        )
    flat = x.reshape(-1, packed.columns).contiguous()
    multiply = kernels.few_rows if flat.shape[0] <= kernels.most_rows else partial(through_tiles, kernels)
    return multiply(packed, flat, bias).view(*x.shape[:-1], packed.rows)


def through_tiles(kernels: Kernels, packed: Packed, x: Tensor, bias: Tensor | None) -> Tensor:
    """The same by torch's product with one dense tile of the weight after the other, so that memory stays packed; x is [n, columns]."""
    step = min(packed.rows, max(1, _TILE_BYTES // max(1, packed.columns * packed.values.itemsize)))
    tile = _tile(step, packed)
    if step == packed.rows:
        kernels.expand(packed, 0, tile)
        return nn.functional.linear(x, tile.to(x.dtype), bias)
    y = x.new_empty(len(x), packed.rows)
    for begin in range(0, packed.rows, step):
        part = slice(begin, min(begin + step, packed.rows))
        rows = tile[: part.stop - begin]
        kernels.expand(packed, begin, rows)
        y[:, part] = nn.functional.linear(x, rows.to(x.dtype), None if bias is None else bias[part])
    return y


_memory = threading.local()


def _tile(rows: int, packed: Packed) -> Tensor:
    """Memory for a tile, each thread its own: made anew for every product, the system would have to clear its pages first."""
    size = rows * packed.columns * packed.values.itemsize
    if getattr(_memory, "tile", None) is None or len(_memory.tile) < size:
        with torch.inference_mode(False):  # it outlives whatever mode it is made in
            _memory.tile = torch.empty(max(size, _TILE_BYTES), dtype=torch.uint8)
    found: Tensor = _memory.tile[:size].view(packed.values.dtype).view(rows, packed.columns)
    return found


def unpacked(packed: Packed, kernels: Kernels | None = None) -> Tensor:
    """The weight, dense: [rows, columns]."""
    out = torch.empty((packed.rows, packed.columns), dtype=packed.values.dtype)
    (kernels or chosen()).expand(packed, 0, out)
    return out


@cache
def chosen() -> Kernels:
    """The kernels in use: those `PRUNEKIT_KERNEL` names, or the best this processor has. Raises `InputError` for what it has not."""
    asked = os.environ.get(VARIABLE)
    known = available()
    if asked is None:
        return kernels_called(known[0])
    if asked not in known:
        raise InputError(f"{VARIABLE}={asked} cannot be used here: {nearest(asked, known)}")
    return kernels_called(asked)


def available() -> list[str]:
    """Names of the kernels that run here, the fastest first; torch's, which always do, last."""
    library = _library()
    native = [] if library is None else [name for place, name in enumerate(LEVELS) if library.prunekit_has(place)]
    return [*reversed(native), FALLBACK]


def kernels_called(name: str) -> Kernels:
    """Kernels by one of the names `available` gives."""
    library = _library()
    return TorchKernels() if name == FALLBACK or library is None else NativeKernels(library, name)


@cache
def warn_without_library() -> None:
    """Say, once, that packed weights save memory here and no time."""
    if chosen().name == FALLBACK:
        warnings.warn(
            "the C library of the sparse runtime is not used, so packed weights save memory but are slower than dense ones: "
            "install a C compiler, then run `python -m prunekit.runtime.build`",
            PrunekitWarning,
            stacklevel=4,
        )


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled library; None where the package was built without a compiler, or the library is not of this version."""
    if not LIBRARY.is_file():
        return None
    library = ctypes.CDLL(str(LIBRARY))
    if library.prunekit_interface() != _INTERFACE:
        return None
    word, address = ctypes.c_int64, ctypes.c_void_p
    number = ctypes.c_int
    library.prunekit_multiply.argtypes = [
        *[number] * 4,
        *[word] * 2,
        *[address] * 4,
        word,
        *[address] * 2,
    ]
    library.prunekit_expand.argtypes = [*[number] * 3, word, *[address] * 3, *[word] * 2, address]
    library.prunekit_expand.restype = None
    library.prunekit_add_gram.argtypes = [number, word, word, address, address]
    library.prunekit_set_parallel.argtypes = [address]
    library.prunekit_set_parallel.restype = None
    library.prunekit_set_parallel(_openmp_entry())
    return library


def _openmp_entry() -> Any:
    """Address of the entry of the OpenMP library that torch computes with; None (one thread) where it has none under this name."""
    entry = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    return None if entry is None else ctypes.cast(entry, ctypes.c_void_p)
