"""How close is `prunekit prune` to the floor of two forward passes?

    python benchmarks/floor.py [--model smollm2-135m] [--samples 16] [--length 1024] [--dtype bfloat16] [--rounds 3]

A sequential layer-wise method must send the calibration windows through every block twice: to measure, and, pruned, to feed the
next block. The floor is therefore two plain passes of transformers' own model (without its head) over the same windows, in the same
dtype and batches. Both are timed in turn in one process; the ratio is taken round by round, because these machines drift.

Counted for prunekit: forward + prune + write. Not counted: start-up, reading, hashing the input, the reload check; they are printed.
Peak memory is that of a `prunekit prune` process of its own, the reload check included.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import draw_windows, keep, options, parser_of, run_prunekit
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import prunekit
from prunekit.checkpoint.locate import locate
from prunekit.model.stream import batch_size


def main() -> None:
    """Measure, print, and keep the figures as JSON where `--keep` says."""
    parser = parser_of(__doc__)
    parser.add_argument("--method", default="wanda")
    asked = parser.parse_args()
    logging.disable_progress_bar()

    folder = locate(asked.model)
    dtype = getattr(torch, asked.dtype)
    windows = draw_windows(folder, asked.samples, asked.length)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    batch = batch_size(asked.length)
    two_passes(model, windows.ids[:batch], batch)  # warm-up

    rounds = []
    with tempfile.TemporaryDirectory() as work:
        for number in range(asked.rounds):
            floor = two_passes(model, windows.ids, batch)
            result = prunekit.prune(
                folder,
                method=asked.method,
                out=Path(work, str(number)),
                calibration={"samples": asked.samples, "length": asked.length},
                dtype=asked.dtype,
            )
            seconds = result.seconds
            counted = seconds.forward + seconds.prune + seconds.write
            rounds.append(
                {
                    "floor": floor,
                    "counted": counted,
                    "ratio": counted / floor,
                    "forward": seconds.forward,
                    "prune": seconds.prune,
                    "write": seconds.write,
                    "read": seconds.read,
                    "verify": seconds.verify,
                }
            )
            print(
                f"round {number + 1}: floor {floor:.2f} s, prunekit {counted:.2f} s = {counted / floor:.3f} x  "
                f"(forward {seconds.forward / floor:.3f}, prune {seconds.prune / floor:.3f}, write {seconds.write / floor:.3f}; "
                f"not counted: read {seconds.read / floor:.3f}, reload check {seconds.verify / floor:.3f})",
                flush=True,
            )
        peak = peak_memory(asked, Path(work, "peak"))
    ratio = statistics.median(line["ratio"] for line in rounds)
    print(f"median {ratio:.3f} x the floor of two passes; peak memory of a run {peak / 1e9:.3f} GB")
    if asked.keep:
        figures = {
            "benchmark": "floor",
            "model": asked.model,
            "method": asked.method,
            "windows": [asked.samples, asked.length],
            "dtype": asked.dtype,
            "median_ratio": ratio,
            "peak_rss_bytes": peak,
            "rounds": rounds,
        }
        keep(asked.keep, figures)


@torch.inference_mode()
def two_passes(model: torch.nn.Module, ids: torch.Tensor, batch: int) -> float:
    """Seconds of two passes through the model without its head."""
    begun = time.perf_counter()
    for _ in range(2):
        for part in torch.split(ids, batch):
            model.base_model(input_ids=part, use_cache=False)
    return time.perf_counter() - begun


def peak_memory(asked: argparse.Namespace, out: Path) -> int:
    """Peak resident bytes of a `prunekit prune` process."""
    given = options(method=asked.method, samples=asked.samples, length=asked.length, dtype=asked.dtype, out=out)
    return int(run_prunekit("prune", asked.model, *given)["peak_rss_bytes"])


if __name__ == "__main__":
    main()
