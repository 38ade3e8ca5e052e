"""How close is `prunekit prune` to the floor of two forward passes?

    python benchmarks/floor.py [--model smollm2-135m] [--methods wanda] [--samples 16] [--length 1024] [--dtype bfloat16] [--rounds 3]

A sequential layer-wise method must send the calibration windows through every block twice: to measure, and, pruned, to feed the
next block. The floor is therefore two plain passes of transformers' own model (without its head) over the same windows, in the same
dtype and batches. Both are timed in turn in one process; the ratio is taken round by round, because these machines drift. Of several
methods each is timed once a round, at its own default of what is removed.

Counted for prunekit: forward + prune + write. Not counted: start-up, reading, hashing the input, the reload check; they are printed.
Peak memory is that of a `prunekit prune` process of its own, the reload check included.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import draw_windows, keep, options, parser_of, run_prunekit
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import prunekit
from prunekit.blockwalk import Seconds
from prunekit.checkpoint.locate import locate
from prunekit.model.stream import batch_size


def main() -> None:
    """Measure, print, and keep the figures as JSON where `--keep` says."""
    parser = parser_of(__doc__)
    parser.add_argument("--methods", default="wanda", help="names with commas between them")
    asked = parser.parse_args()
    logging.disable_progress_bar()

    folder = locate(asked.model)
    dtype = getattr(torch, asked.dtype)
    windows = draw_windows(folder, asked.samples, asked.length)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    batch = batch_size(asked.length)
    two_passes(model, windows.ids[:batch], batch)  # warm-up

    names = asked.methods.split(",")
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as work:
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
                ).seconds
                shutil.rmtree(out)
                rounds[name].append(counted(floor, seconds))
                print(f"round {number + 1}: {line(name, rounds[name][-1])}", flush=True)
        peaks = {name: peak_memory(asked, name, Path(work, "peak")) for name in names}
    found = {
        name: {
            "median_ratio": statistics.median(one["ratio"] for one in rounds[name]),
            "peak_rss_bytes": peaks[name],
            "rounds": rounds[name],
        }
        for name in names
    }
    for name, figures in found.items():
        print(
            f"{name}: median {figures['median_ratio']:.3f} x the floor of two passes; peak memory of a run "
            f"{peaks[name] / 1e9:.3f} GB"
        )
    if asked.keep:
        about = {"model": asked.model, "windows": [asked.samples, asked.length], "dtype": asked.dtype}
        keep(asked.keep, {"benchmark": "floor", **about, "methods": found})


def counted(floor: float, seconds: Seconds) -> dict[str, float]:
    """One run next to the floor of its round, all in seconds but the ratio."""
    spent = seconds.forward + seconds.prune + seconds.write
    parts = {name: getattr(seconds, name) for name in ("forward", "prune", "write", "read", "verify")}
    return {"floor": floor, "counted": spent, "ratio": spent / floor, **parts}


def line(name: str, one: dict[str, float]) -> str:
    """One run in words, its parts as shares of the floor."""
    share = {part: one[part] / one["floor"] for part in ("forward", "prune", "write", "read", "verify")}
    return (
        f"floor {one['floor']:.2f} s, {name} {one['counted']:.2f} s = {one['ratio']:.3f} x  "
        f"(forward {share['forward']:.3f}, prune {share['prune']:.3f}, write {share['write']:.3f}; "
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


def peak_memory(asked: argparse.Namespace, method: str, out: Path) -> int:
    """Peak resident bytes of a `prunekit prune` process."""
    shutil.rmtree(out, ignore_errors=True)
    given = options(method=method, samples=asked.samples, length=asked.length, dtype=asked.dtype, out=out)
    return int(run_prunekit("prune", asked.model, *given)["peak_rss_bytes"])


if __name__ == "__main__":
    main()
