"""How close is `prunekit prune` to the floor of two forward passes?

    python benchmarks/floor.py [--model smollm2-135m] [--methods wanda] [--samples 16] [--length 1024] [--dtype bfloat16] [--rounds 3]
                               [--target 0.6] [--blocks 8]

A sequential layer-wise method must send the calibration windows through every block twice: to measure, and, pruned, to feed the
next block. The floor is therefore two plain passes of transformers' own model (without its head) over the same windows, in the same
dtype and batches. Both are timed in turn in one process; the ratio is taken round by round, because these machines drift. Of several
methods each is timed once a round, at its own default of what is removed or at `--target`. What fits linears costs the same for few
windows as for many, so a ratio is that of a number of windows; `--blocks` takes the model's first blocks only, which makes 64 × 1024
affordable.

Counted for prunekit: forward + prune + tune + write. Not counted: start-up, reading, hashing the input, the reload check; they are
printed. Peak memory is that of a `prunekit prune` process of its own, the reload check included; it is measured of whole models only.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import draw_windows, keep, options, parser_of, run_prunekit
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import prunekit
from prunekit.blockwalk import Seconds
from prunekit.catalogue import find_method
from prunekit.checkpoint.locate import locate
from prunekit.model.stream import batch_size


def main() -> None:
    """Measure, print, and keep the figures as JSON where `--keep` says."""
    parser = parser_of(__doc__)
    parser.add_argument("--methods", default="wanda", help="names with commas between them")
    parser.add_argument(
        "--target", type=float, help="sparsity of methods that zero weights, ratio of those that remove units"
    )
    parser.add_argument("--blocks", type=int, help="the model's first so many blocks")
    asked = parser.parse_args()
    logging.disable_progress_bar()

    folder = locate(asked.model)
    names = asked.methods.split(",")
    targets = {name: target_of(name, asked.target) for name in names}
    dtype = getattr(torch, asked.dtype)
    windows = draw_windows(folder, asked.samples, asked.length)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    batch = batch_size(asked.length)
    if asked.blocks:
        model.base_model.layers = model.base_model.layers[: asked.blocks]
        model.config.num_hidden_layers = asked.blocks
    two_passes(model, windows.ids[:batch], batch)  # warm-up

    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as work:
        if asked.blocks:
            whole, folder = folder, Path(work, "first blocks")
            model.save_pretrained(folder)
            for extra in whole.glob("tokenizer*"):
                shutil.copy(extra, folder)
        for number in range(asked.rounds):
            floor = two_passes(model, windows.ids, batch)
            for name in names:
                out = Path(work, f"{name}-{number}")
                seconds = prunekit.prune(
                    folder,
                    method=name,
                    out=out,
                    calibration={"samples": asked.samples, "length": asked.length},
                    dtype=asked.dtype,
                    **targets[name],
                ).seconds
                shutil.rmtree(out)
                rounds[name].append(counted(floor, seconds))
                print(f"round {number + 1}: {line(name, rounds[name][-1])}", flush=True)
        peaks = (
            {}
            if asked.blocks
            else {name: peak_memory(asked, name, targets[name], Path(work, "peak")) for name in names}
        )
    found = {
        name: {
            "median_ratio": statistics.median(one["ratio"] for one in rounds[name]),
            **({"peak_rss_bytes": peaks[name]} if peaks else {}),
            "rounds": rounds[name],
        }
        for name in names
    }
    for name, figures in found.items():
        print(
            f"{name}: median {figures['median_ratio']:.3f} x the floor of two passes, {relative(found, name)}", end=""
        )
        print(f"; peak memory of a run {peaks[name] / 1e9:.3f} GB" if peaks else "")
    if asked.keep:
        about = {"model": asked.model, "windows": [asked.samples, asked.length], "dtype": asked.dtype}
        about |= {"target": asked.target, "blocks": asked.blocks}
        keep(asked.keep, {"benchmark": "floor", **about, "methods": found})


def target_of(method: str, target: float | None) -> dict[str, float]:
    """What `prunekit.prune` is told of how much a method removes."""
    if target is None:
        return {}
    return {"ratio" if find_method(method).kind == "shrink" else "sparsity": target}


def relative(found: dict[str, Any], name: str) -> str:
    """A method's time next to that of the first one named, round by round."""
    first = next(iter(found))
    pairs = zip(found[name]["rounds"], found[first]["rounds"], strict=True)
    return f"{statistics.median(one['counted'] / its['counted'] for one, its in pairs):.3f} x {first}"


def counted(floor: float, seconds: Seconds) -> dict[str, float]:
    """One run next to the floor of its round, all in seconds but the ratio."""
    spent = seconds.forward + seconds.prune + seconds.tune + seconds.write
    parts = {name: getattr(seconds, name) for name in ("forward", "prune", "tune", "write", "read", "verify")}
    return {"floor": floor, "counted": spent, "ratio": spent / floor, **parts}


def line(name: str, one: dict[str, float]) -> str:
    """One run in words, its parts as shares of the floor."""
    share = {part: one[part] / one["floor"] for part in ("forward", "prune", "tune", "write", "read", "verify")}
    return (
        f"floor {one['floor']:.2f} s, {name} {one['counted']:.2f} s = {one['ratio']:.3f} x  "
        f"(forward {share['forward']:.3f}, prune {share['prune']:.3f}, tune {share['tune']:.3f}, write {share['write']:.3f}; "
        f"not counted: read {share['read']:.3f}, checks {share['verify']:.3f})"
    )


@torch.inference_mode()
def two_passes(model: torch.nn.Module, ids: torch.Tensor, batch: int) -> float:
    """Seconds of two passes through the model without its head."""
    begun = time.perf_counter()
    for _ in range(2):
        for part in torch.split(ids, batch):
            model.base_model(input_ids=part, use_cache=False)
    return time.perf_counter() - begun


def peak_memory(asked: argparse.Namespace, method: str, target: dict[str, float], out: Path) -> int:
    """Peak resident bytes of a `prunekit prune` process."""
    shutil.rmtree(out, ignore_errors=True)
    given = options(method=method, samples=asked.samples, length=asked.length, dtype=asked.dtype, out=out, **target)
    return int(run_prunekit("prune", asked.model, *given)["peak_rss_bytes"])


if __name__ == "__main__":
    main()
