"""What `peers.py` compares prunekit with. Each run is a process of its own, in the environment of the library it uses:

    python benchmarks/sides.py llmcompressor --model DIR --windows IDS.npy --method wanda --pattern 2:4 --batch 1 --out DIR
                                             --report FILE
    python benchmarks/sides.py hooks         (the same options)
    python benchmarks/sides.py versions --report FILE

So nothing of prunekit is imported here. Both sides load the whole model first; then the clock starts; they prune it and save it with
`save_pretrained`, and the clock stops.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import time
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

LIBRARIES = ("llmcompressor", "compressed-tensors", "torch", "transformers", "tokenizers", "safetensors", "numpy")


def main() -> None:
    """Run one side and write what it took as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=["llmcompressor", "hooks", "versions"])
    parser.add_argument("--model", type=Path, help="folder of the dense model")
    parser.add_argument("--windows", type=Path, help="token ids [windows, length] as .npy")
    parser.add_argument("--method", default="wanda", choices=["wanda", "sparsegpt"])
    parser.add_argument("--pattern", help="fraction of zeros, or K:G = keep K of every G consecutive inputs")
    parser.add_argument("--dtype", default="bfloat16", help="of the model while it is pruned and when it is saved")
    parser.add_argument("--batch", type=int, default=1, help="windows that go through a block together")
    parser.add_argument("--out", type=Path, help="folder to save to")
    parser.add_argument("--report", type=Path, required=True, help="file for the figures")
    asked = parser.parse_args()
    report = versions() if asked.side == "versions" else run(asked)
    asked.report.write_text(json.dumps(report), encoding="utf-8")


def run(asked: argparse.Namespace) -> dict[str, Any]:
    """Load, prune, save."""
    started = time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=getattr(torch, asked.dtype)).eval()
    windows = torch.from_numpy(np.load(asked.windows))
    if asked.side == "llmcompressor":
        prune = _llmcompressor(model, tokenizer, windows, asked)
    else:
        prune = partial(prune_with_hooks, model, windows, asked.batch, asked.pattern)
    begun = time.perf_counter()
    prune()
    pruned = time.perf_counter()
    model.save_pretrained(asked.out)
    written = time.perf_counter()
    tokenizer.save_pretrained(asked.out)
    return {
        "seconds": {"load": begun - started, "prune": pruned - begun, "write": written - pruned},
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _llmcompressor(model: nn.Module, tokenizer: Any, windows: Tensor, asked: argparse.Namespace) -> partial[Any]:
    """Its `oneshot` with everything it takes made ready, so that neither imports nor tokenising are timed."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from torch.utils.data import DataLoader

    kept, _, group = asked.pattern.partition(":")
    if group:  # its N:M prunes N of every M, ours keeps K of every G
        structure, sparsity = f"{int(group) - int(kept)}:{group}", 1 - int(kept) / int(group)
    else:
        structure, sparsity = "0:0", float(asked.pattern)
    modifier = WandaPruningModifier if asked.method == "wanda" else SparseGPTModifier
    return partial(
        oneshot,
        model=model,
        processor=tokenizer,
        # no attention mask: none of the tokens is padding
        dataset=DataLoader([{"input_ids": window} for window in windows], batch_size=asked.batch),
        recipe=modifier(sparsity=sparsity, mask_structure=structure, targets=["Linear"], ignore=["re:.*lm_head"]),
    )


class _CaughtError(Exception):
    """The first block was called: nothing more is wanted of the model's own forward."""


@torch.inference_mode()
def prune_with_hooks(model: Any, windows: Tensor, batch: int, pattern: str) -> None:
    """Wanda as research code does it: hooks on a model that lies in memory as a whole.

    What it leaves out: families whose blocks are called differently from one another (sliding windows), padding, more than memory
    holds, a check of what was saved, going on after an interruption.
    """
    blocks = max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)
    hidden: list[Tensor] = []
    others: list[dict[str, Any]] = []

    def catch(block: nn.Module, given: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        hidden.append(given[0])
        others.append(named)
        raise _CaughtError

    catcher = blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
    for part in torch.split(windows, batch):
        with contextlib.suppress(_CaughtError):
            model(input_ids=part, use_cache=False)
    catcher.remove()

    for block in blocks:
        linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
        squares: dict[nn.Module, Tensor] = {linear: torch.zeros(linear.in_features) for linear in linears}
        handles = [linear.register_forward_hook(partial(_measure, squares)) for linear in linears]
        for states, named in zip(hidden, others, strict=True):
            block(states, **named)
        for handle in handles:
            handle.remove()
        for linear in linears:
            zero_smallest(linear.weight, squares[linear], pattern)
        for position, named in enumerate(others):
            output = block(hidden[position], **named)
            hidden[position] = output[0] if isinstance(output, tuple) else output


def _measure(squares: dict[nn.Module, Tensor], linear: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
    """Forward hook: add the squares of a linear's inputs."""
    squares[linear] += given[0].float().square().sum((0, 1))


def zero_smallest(weight: Tensor, squares: Tensor, pattern: str) -> None:
    """Zero, in place, the weights with the smallest |W|·‖X‖ of every row, or of every group of a K:G pattern.

    Shapes: weight [out, in], squares [in]. Ties go by index, lowest first.
    """
    scores = weight.float().abs() * squares.sqrt()
    kept, _, group = pattern.partition(":")
    if group:  # groups as short rows; the loop over columns that published code has takes several times as long
        scores = scores.reshape(-1, int(group))
        zeros = int(group) - int(kept)
    else:
        zeros = int(scores.shape[1] * float(pattern))
    order = torch.sort(scores, dim=1, stable=True).indices[:, :zeros]
    mask = torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, order, True)
    weight[mask.reshape(weight.shape)] = 0


def peak_rss_bytes() -> int:
    """The process's largest resident size so far. Not `getrusage`, whose figure a child inherits from who started it."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def versions() -> dict[str, str]:
    """Versions of the environment. The library is imported too: what cannot be imported must show before anything is timed."""
    import llmcompressor  # noqa: F401

    return {"python": platform.python_version()} | {name: metadata.version(name) for name in LIBRARIES}


if __name__ == "__main__":
    main()
