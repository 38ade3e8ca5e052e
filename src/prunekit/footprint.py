"""How large a model folder is, counted from what it stores: bytes plain, compressed and packed, parameters, zeros, products a token.

And what its zeros are good for: which runtimes use such a pattern, and why the others do not.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from .bits import count_zeros
from .checkpoint.packing import packed_sheets
from .checkpoint.reader import Reader
from .inspection import pattern_holds
from .model.anatomy import is_linear, tied_names
from .model.source import StreamedModel
from .recipe import Pattern

ZLIB_LEVEL = 1
_GROUPS = ("1:4", "2:4", "4:8")  # patterns that hold imply the later ones here, so the strictest is named
_FEW = 0.01


@dataclass(frozen=True)
class Footprint:
    """How large a folder is.

    Attributes:
        files: bytes of the weight files as they lie there.
        dense: bytes of all tensors unpacked.
        zlib: bytes of the tensors' bytes through zlib at level 1, as one stream in the order of their names.
        bitmask: bytes of the weight files that `export --format bitmask` would write.
        parameters: a tied one counts once.
        nonzero: those that are not 0.
        flops: floating-point operations a token takes in linears and head, two a weight; attention's products with keys and values,
            which grow with the context, are not counted.
        nonzero_flops: the same if zeros were skipped.
        weights, zeros: of the linears in the blocks.
        pattern: `dense`, `unstructured`, or the K:G that all of those linears have that hold zeros worth the name.
    """

    files: int
    dense: int
    zlib: int
    bitmask: int
    parameters: int
    nonzero: int
    flops: int
    nonzero_flops: int
    weights: int
    zeros: int
    pattern: str

    @property
    def sparsity(self) -> float:
        """Zeros divided by weights, over the block linears."""
        return self.zeros / self.weights


def measure_footprint(source: StreamedModel) -> Footprint:
    """Count what a folder holds, a tensor in memory at a time."""
    reader = source.reader
    linears = {f"{linear.full_name}.weight": linear for linear in source.anatomy.linears()}
    ties = tied_names(source.module)
    zeros: dict[int, int] = {}  # by the parameter's identity: a tied head is the embedding
    inside = 0
    holding = {group: Pattern.parse(group) for group in _GROUPS}
    for name, parameter in source.module.named_parameters():
        key = next(source.key_of[alias] for alias in ties.get(name, [name]) if alias in source.key_of)
        tensor = reader.read([key])[key]
        matrix = tensor if tensor.ndim > 1 else tensor.reshape(1, tensor.numel())
        zeros[id(parameter)] = count_zeros(matrix.flatten(end_dim=-2))
        if name not in linears:
            continue
        inside += zeros[id(parameter)]
        if zeros[id(parameter)] > _FEW * tensor.numel():
            weight = linears[name].matrix(tensor)
            holding = {group: pattern for group, pattern in holding.items() if pattern_holds(weight, pattern, "row")}
    products = [module.weight for module in source.module.modules() if is_linear(module)]
    weights = sum(linear.count for linear in linears.values())
    pattern = next(iter(holding), "unstructured") if inside > _FEW * weights else "dense"
    return Footprint(
        files=sum((reader.folder / file).stat().st_size for file in reader.files),
        dense=sum(entry.bytes for entry in reader.entries.values()),
        zlib=_compressed(reader),
        bitmask=sum(sheet.bytes for sheet in packed_sheets(reader)),
        parameters=source.parameter_count,
        nonzero=source.parameter_count - sum(zeros.values()),
        flops=2 * sum(weight.numel() for weight in products),
        nonzero_flops=2 * sum(weight.numel() - zeros[id(weight)] for weight in products),
        weights=weights,
        zeros=inside,
        pattern=pattern,
    )


def _compressed(reader: Reader) -> int:
    packer = zlib.compressobj(ZLIB_LEVEL)
    total = sum(len(packer.compress(chunk)) for name in sorted(reader.entries) for chunk in reader.chunks(name))
    return total + len(packer.flush())


def runtime_advice(found: Footprint) -> str:
    """Why a dense runtime is not faster for a folder's zeros, and which runtime would be."""
    if found.pattern == "dense":
        return "hardly any zeros: nothing to skip, and a dense runtime is the right one"
    share = f"{100 * found.sparsity:.0f} % zeros"
    dense = (
        "a dense runtime (PyTorch, transformers, llama.cpp) reads a zero from memory and multiplies it like any other number, so it "
        "is not faster"
    )
    if found.pattern in ("1:4", "2:4"):
        return (
            f"{share}, two or more in every four inputs: {dense}; sparse tensor cores (NVIDIA, compute capability 8.0 or more) skip "
            "them: prunekit.load(..., runtime='2:4'), or TensorRT with sparse weights; on a processor --runtime sparse"
        )
    where = "four in every eight inputs" if found.pattern == "4:8" else "at places that follow no rule"
    return (
        f"{share}, {where}: {dense}; on a processor --runtime sparse, prunekit.load(..., runtime='sparse'), keeps weights packed "
        "and reads no zeros; on CUDA kernels that are made for it do (Flash-LLM, SpInfer); smaller on disk it is at once: "
        "prunekit export --format bitmask"
    )
