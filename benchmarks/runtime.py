"""How much faster, and smaller, are packed weights than dense ones on this processor?

    python benchmarks/runtime.py [--parts kernels,switch,models] [--rounds 9] [--threads N] [--clock wall|processor]
                                 [--work DIR] [--keep FILE]

`kernels`: one product of one row, packed, next to torch's own bfloat16 linear with the same zeros, for the shapes of models of 135M,
1.1B and 7B parameters. Every shape goes through more copies than caches hold, because that is how a model decodes.
`switch`: the kernel for few rows next to dense tiles, by rows; where they cross is what `prunekit.runtime.kernels` has as a constant.
`models`: tokens a second and bytes of weights of whole models, the sparse runtime next to the dense run of the same folder:
SmolLM2-135M at 50 %, and a Llama of 1.1B parameters with random weights at 60 %. Products with the blocks' weights and the head are
timed by themselves, too: what is left of a token's time is Python, attention and norms, the same on both sides.

All sides take turns in one process with the same threads; ratios are taken round by round, and the median is given with the lowest and
the highest. `--rounds 0` only writes models. `--threads 1 --clock processor` counts processor time, for machines that do something else
meanwhile (not for `models`).
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from big import SHAPES, write_model
from common import keep
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

import prunekit
from prunekit.evaluation.speed import Spread, draw_prompt, measure
from prunekit.loading import load_model
from prunekit.runtime.kernels import chosen, linear, through_tiles
from prunekit.runtime.linear import PackedLinear
from prunekit.runtime.packed import Packed

WEIGHTS = {
    "135M": [(576, 576), (192, 576), (1536, 576), (576, 1536)],
    "1.1B": [(2048, 2048), (256, 2048), (5632, 2048), (2048, 5632)],
    "7B": [(4096, 4096), (11008, 4096), (4096, 11008)],
}
SPARSITIES = (0.3, 0.5, 0.6, 0.7)
ROWS = (1, 2, 4, 8, 12, 16, 20, 24, 32, 48, 64, 128, 512)
now = time.perf_counter
BEYOND_CACHES = 160e6  # bytes of dense weights


def main() -> None:
    """Measure, print, and keep the figures as JSON where `--keep` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="kernels,switch,models")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    parser.add_argument(
        "--work",
        type=Path,
        help="where models are written and stay (5 GB), for more runs; a temporary folder by default",
    )
    parser.add_argument("--keep", type=Path, help="write the figures to this JSON file")
    asked = parser.parse_args()
    if asked.clock == "processor":
        if asked.threads != 1:
            parser.error("--clock processor adds up what all threads take: give --threads 1")
        global now
        now = time.process_time
    logging.disable_progress_bar()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    figures: dict[str, Any] = {
        "benchmark": "runtime",
        "kernels_used": chosen().name,
        "threads": asked.threads,
        "clock": asked.clock,
    }
    print(f"kernels: {chosen().name}, {asked.threads} threads")
    with torch.inference_mode():
        if "kernels" in asked.parts:
            figures["kernels"] = [
                row
                for model, shapes in WEIGHTS.items()
                for shape in shapes
                for row in kernels(model, shape, asked.rounds)
            ]
        if "switch" in asked.parts:
            figures["switch"] = [row for shapes in WEIGHTS.values() for row in switch(shapes[-1], asked.rounds)]
    if "models" in asked.parts:
        with tempfile.TemporaryDirectory() as temporary:
            folders = write_models(asked.work or Path(temporary))
            figures["models"] = [whole_model(*one, asked.rounds) for one in folders if asked.rounds]
    if asked.keep:
        keep(asked.keep, figures)


def sparse_weight(shape: tuple[int, int], sparsity: float) -> Tensor:
    """Random, in bfloat16, with zeros at random."""
    weight = torch.randn(shape)
    return (weight * (torch.rand(shape) >= sparsity)).bfloat16() + 0  # + 0: no -0


def in_turn(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every side in every round; one round to warm up, and the order turned from round to round."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            begun = now()
            sides[name]()
            if number:
                taken[name].append(now() - begun)
    return taken


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    """Round by round."""
    return asdict(Spread.of([a / b for a, b in zip(above, below, strict=True)]))


def kernels(model: str, shape: tuple[int, int], rounds: int) -> list[dict[str, Any]]:
    """One row through more copies of a matrix than caches hold, packed and dense."""
    rows, columns = shape
    x = torch.randn(1, columns).bfloat16()
    found = []
    for sparsity in SPARSITIES:
        copies = max(1, round(BEYOND_CACHES / (2 * rows * columns)))
        weights = [sparse_weight(shape, sparsity)]
        packed = [Packed.of(weights[0])]
        for _ in range(1, copies):
            weights.append(weights[0].clone())
            packed.append(Packed(*(part.clone() for part in packed[0][:3]), columns))

        def dense_side(weights: list[Tensor] = weights) -> None:
            for weight in weights:
                nn.functional.linear(x, weight)

        def packed_side(packed: list[Packed] = packed) -> None:
            for weight in packed:
                linear(weight, x, None)

        taken = in_turn({"dense": dense_side, "packed": packed_side}, rounds)
        row = {
            "model": model,
            "shape": list(shape),
            "sparsity": sparsity,
            "times_as_fast": ratio(taken["dense"], taken["packed"]),
            "dense_seconds": Spread.of(taken["dense"]).median / len(weights),
            "packed_seconds": Spread.of(taken["packed"]).median / len(weights),
        }
        found.append(row)
        times = row["times_as_fast"]
        print(
            f"{model:>5} {rows:>6} x {columns:<6} {sparsity:.0%}  {times['median']:.2f} x ({times['low']:.2f} to {times['high']:.2f})  "
            f"dense {1e6 * row['dense_seconds']:.0f} us, packed {1e6 * row['packed_seconds']:.0f} us",
            flush=True,
        )
    return found


def switch(shape: tuple[int, int], rounds: int) -> list[dict[str, Any]]:
    """By rows of x: the kernel for few, dense tiles, and torch's linear with the dense weight, at 50 %."""
    weight = sparse_weight(shape, 0.5)
    packed, used, found = Packed.of(weight), chosen(), []
    for count in ROWS:
        x = torch.randn(count, shape[1]).bfloat16()
        taken = in_turn(
            {
                "dense": lambda x=x: nn.functional.linear(x, weight),
                "few": lambda x=x: used.few_rows(packed, x, None),
                "tiles": lambda x=x: through_tiles(used, packed, x, None),
            },
            rounds,
        )
        medians = {name: Spread.of(seconds).median for name, seconds in taken.items()}
        found.append({"shape": list(shape), "rows": count, "seconds": medians})
        print(
            f"{shape[0]:>6} x {shape[1]:<6} {count:>4} rows: "
            + ", ".join(f"{name} {1e6 * seconds:.0f} us" for name, seconds in medians.items()),
            flush=True,
        )
    return found


def write_models(work: Path) -> list[tuple[str, Path, float]]:
    """Both whole models, pruned by magnitude: name, folder, sparsity. Those that are in `work` already are taken as they are."""
    work.mkdir(parents=True, exist_ok=True)
    small, large = work / "smollm2-135m-0.5", work / "llama-1.1b-0.6"
    calibration = {"samples": 1, "length": 64}  # magnitude looks at no text
    if not small.exists():
        prunekit.prune("smollm2-135m", method="magnitude", sparsity=0.5, out=small, calibration=calibration)
    if not large.exists():
        dense = work / SHAPES["1b"].folder_name
        write_model(SHAPES["1b"], dense)
        prunekit.prune(dense, method="magnitude", sparsity=0.6, out=large, calibration=calibration)
        shutil.rmtree(dense)
    return [("smollm2-135m", small, 0.5), ("random Llama, 1.1B", large, 0.6)]


def whole_model(name: str, folder: Path, sparsity: float, rounds: int) -> dict[str, Any]:
    """Decoding, prefill and memory, packed next to dense."""
    print(name, flush=True)
    loaded = {way: load(folder, way) for way in ("sparse", "dense")}
    both = [model for model, _ in loaded.values()]
    ids = draw_prompt(both[0].config.vocab_size, 128)
    packed, dense = measure(both, ids, tokens=16, repetitions=rounds, warmup=1)
    figures = {
        "model": name,
        "sparsity": sparsity,
        "decode": ratio([one.decode for one in packed], [one.decode for one in dense]),
        "prefill": ratio([one.prefill for one in packed], [one.prefill for one in dense]),
        "decode_tokens_per_second": {
            "sparse": Spread.of([one.decode for one in packed]).median,
            "dense": Spread.of([one.decode for one in dense]).median,
        },
        "weights_bytes": {way: weights for way, (_, weights) in loaded.items()},
        "products_seconds": products(both, rounds),
    }
    for line in (f"  {key}: {value}" for key, value in figures.items()):
        print(line, flush=True)
    return figures


def load(folder: Path, runtime: str) -> tuple[PreTrainedModel, int]:
    """A model, and the bytes of its tensors."""
    model = load_model(folder, dtype="bfloat16", device="cpu", runtime=runtime)
    return model, sum(tensor.numel() * tensor.itemsize for tensor in (*model.parameters(), *model.buffers()))


@torch.inference_mode()
def products(models: list[PreTrainedModel], rounds: int) -> dict[str, float]:
    """Seconds a token spends in the products of the blocks, one after the other with nothing between them; and in the head's."""
    sides: dict[str, Callable[[], object]] = {}
    for way, model in zip(("sparse", "dense"), models, strict=True):
        layers = [m for m in model.base_model.modules() if isinstance(m, (nn.Linear, PackedLinear))]
        inputs = {size: torch.randn(1, 1, size).bfloat16() for size in {layer.in_features for layer in layers}}
        sides[way] = lambda layers=layers, inputs=inputs: [layer(inputs[layer.in_features]) for layer in layers]
    head, x = models[0].get_output_embeddings(), torch.randn(1, 1, models[0].config.hidden_size).bfloat16()
    sides["head"] = lambda: head(x)
    return {name: Spread.of(seconds).median for name, seconds in in_turn(sides, rounds).items()}


if __name__ == "__main__":
    main()
