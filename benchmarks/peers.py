"""prunekit side by side with what a user would pick instead.

    python benchmarks/peers.py [--methods wanda sparsegpt] [--patterns 0.5 2:4] [--peers llmcompressor hooks] [--rounds 3]
                               [--samples 16] [--length 1024] [--dtype bfloat16] [--model smollm2-135m] [--work DIR] [--keep FILE]

Wanda and SparseGPT, the same model, the same windows of token ids, the same dtype, all threads, for

    prunekit        `prunekit prune`, which draws the windows itself: the hash in its manifest must be that of the others'
    llmcompressor   the newest llm-compressor: `oneshot` with its WandaPruningModifier or SparseGPTModifier, the head ignored, all else
                    its default
    hooks           (Wanda only) hooks on a Hugging Face model, as research code does it; ours, in `sides.py`, and as fast as plain
                    torch makes it

Every run is a process of its own, and they take turns: prunekit, llmcompressor, hooks, prunekit, ... Ratios are taken round by round.

What is counted. prunekit: forward + prune + write of its manifest, that is recording block inputs, measuring, scoring, masking, the
output error of every linear, passing on, and shards on disk with their hashes. The others: from a model that is loaded and imports
that are made to the end of `save_pretrained`. Not counted for anyone: interpreter, imports, reading the dense weights, tokenising.
Besides that the whole process is measured, from start to exit: its time, its user and system seconds, its peak memory (VmHWM). There
prunekit also hashes the input, draws its own windows and loads what it wrote to compare logits, which nobody else does.

llm-compressor lives in an environment of its own, made in the work folder and used again while it is there (remove the folder to have
a newer release). It has to: 0.14.0.1 wants transformers <= 5.17, prunekit >= 5.23. Its bounds on torch (2.10 to 2.14) and
compressed-tensors (0.19.0, exactly) leave nothing else in the way, so it is installed as it is published. While it calibrates it
forces attention into its eager form (its tracing relies on the mask that this form is given), whatever the model was loaded with:
part of its time here, and of where its masks differ.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import draw_windows, keep, last_json, options, parser_of, prunekit_command, run_prunekit

from prunekit import machine
from prunekit.calibration.windows import token_hash
from prunekit.checkpoint.embedded import cache_folder
from prunekit.checkpoint.locate import locate
from prunekit.checkpoint.reader import sha256_file
from prunekit.inspection import pattern_holds
from prunekit.model.source import StreamedModel
from prunekit.model.stream import batch_size
from prunekit.recipe import Pattern

METHODS = ("wanda", "sparsegpt")
PEERS = ("llmcompressor", "hooks")
SIDES = Path(__file__).with_name("sides.py")
EVALUATION_WINDOWS = 8
# Its own default. More windows at a time took as many user seconds and more system seconds and memory when tried (1, 2, 4 of 1024
# tokens): eager attention makes its [batch, heads, length, length] scores anew in every block.
LLMCOMPRESSOR_BATCH = 1
MEASURES = ("counted", "wall", "cpu", "peak_rss_bytes")


@dataclass(frozen=True)
class Bench:
    """What is the same for every run."""

    folder: Path
    samples: int
    length: int
    dtype: str
    work: Path
    windows: Path
    tokens: str
    peer_python: Path | None

    def out(self, side: str) -> Path:
        """Where a side writes its model."""
        return self.work / "out" / side


def main() -> None:
    """Measure, print, and keep the figures as JSON where `--keep` says."""
    parser = parser_of(__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--patterns", nargs="+", default=["0.5", "2:4"], help="fractions of zeros, or K:G")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument(
        "--work", type=Path, default=cache_folder() / "peers", help="environment, windows, models, logs"
    )
    parser.add_argument(
        "--torch", default="torch==2.13.0", help="what pip is asked for in llm-compressor's environment"
    )
    asked = parser.parse_args()

    peer_python = None
    if "llmcompressor" in asked.peers:
        peer_python = environment(asked.work / "llmcompressor-env", asked.torch)
    bench = prepare(asked, peer_python)
    versions = peer_versions(bench)
    dense = perplexity(bench, bench.folder)
    results: dict[str, dict[str, Any]] = {method: {} for method in asked.methods}
    for method, pattern in itertools.product(asked.methods, asked.patterns):
        results[method][pattern] = compare(bench, method, pattern, asked)
        print_table(bench, f"{method} {pattern}", results[method][pattern], dense, versions)
    if asked.keep:
        figures = {
            "benchmark": "peers",
            "model": asked.model,
            "windows": [asked.samples, asked.length],
            "calibration_tokens": bench.tokens,
            "dtype": asked.dtype,
            "batch": {"prunekit": batch_size(asked.length)} | {peer: peer_batch(bench, peer) for peer in asked.peers},
            "perplexity": {
                "text": "builtin:eval",
                "windows": [EVALUATION_WINDOWS, asked.length],
                "dense": dense,
            },
            "methods": results,
            "llmcompressor_versions": versions,
        }
        keep(asked.keep, figures)


def environment(folder: Path, torch: str) -> Path:
    """The Python of an environment that holds llm-compressor; made where it does not stand yet."""
    python = folder / "bin" / "python"
    stamp = folder / "made-with.txt"  # written last: an environment without it is half made
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == torch:
        return python
    print(f"making an environment with llm-compressor in {folder}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    # torch first, by its own requirement, so that pip takes the build that says (a bare `torch` may be a CUDA build of several GB);
    # then named again, so that pip settles for a llm-compressor that goes with it
    wanted = [torch] if torch else []
    if wanted:
        subprocess.run([*pip, *wanted], check=True)
    subprocess.run([*pip, *wanted, "llmcompressor"], check=True)
    stamp.write_text(torch, encoding="utf-8")
    return python


def prepare(asked: argparse.Namespace, peer_python: Path | None) -> Bench:
    """Draw the windows and put them where the others find them."""
    folder = locate(asked.model).resolve()
    work = asked.work.resolve()
    (work / "out").mkdir(parents=True, exist_ok=True)
    (work / "log").mkdir(exist_ok=True)
    windows = draw_windows(folder, asked.samples, asked.length)
    path = work / "windows.npy"
    np.save(path, windows.ids.numpy())
    return Bench(folder, asked.samples, asked.length, asked.dtype, work, path, token_hash(windows), peer_python)


def peer_versions(bench: Bench) -> dict[str, str] | None:
    """Versions in llm-compressor's environment; None where it does not take part."""
    if bench.peer_python is None:
        return None
    report = bench.work / "versions.json"
    process([str(bench.peer_python), str(SIDES), "versions", "--report", str(report)], bench, "versions")
    found: dict[str, str] = json.loads(report.read_text(encoding="utf-8"))
    return found


def compare(bench: Bench, method: str, pattern: str, asked: argparse.Namespace) -> dict[str, Any]:
    """All rounds of one method and pattern, and what the last one's models are like."""
    sides = ["prunekit", *(peer for peer in asked.peers if peer != "hooks" or method == "wanda")]
    rounds = []
    for number in range(1, asked.rounds + 1):
        line = {}
        for side in sides:
            line[side] = run = one_run(bench, side, method, pattern)
            print(
                f"{method} {pattern} round {number} {side:<14} counted {run['counted']:7.2f} s  whole process {run['wall']:7.2f} s  "
                f"user + system {run['cpu']:7.2f} s  memory {run['peak_rss_bytes'] / 1e9:.3f} GB",
                flush=True,
            )
        rounds.append(line)
    found = models(bench, method, pattern, sides)
    for side in sides:
        found[side]["perplexity"] = perplexity(bench, bench.out(side))
        found[side]["same_in_every_round"] = len({line[side]["weights_sha256"] for line in rounds}) == 1
    ratios = {
        side: {
            measure: statistics.median(line[side][measure] / line["prunekit"][measure] for line in rounds)
            for measure in MEASURES
        }
        for side in sides
    }
    return {"median_ratios": ratios, "models": found, "rounds": rounds}


def one_run(bench: Bench, side: str, method: str, pattern: str) -> dict[str, Any]:
    """Prune once, in a process of its own: what is counted, the whole process, and what the weights are."""
    out = bench.out(side)
    shutil.rmtree(out, ignore_errors=True)
    measure = prunekit_run if side == "prunekit" else partial(peer_run, side=side)
    run = measure(bench, method, pattern, out)
    weights = "".join(sha256_file(path) for path in sorted(out.glob("*.safetensors")))
    return {**run, "weights_sha256": hashlib.sha256(weights.encode()).hexdigest()}


def prunekit_run(bench: Bench, method: str, pattern: str, out: Path) -> dict[str, Any]:
    """`prunekit prune`."""
    asked = options(samples=bench.samples, length=bench.length, dtype=bench.dtype, pattern=pattern, out=out)
    command = prunekit_command("prune", bench.folder, "--method", method, *asked)
    stdout, whole = process(command, bench, "prunekit")
    told = last_json(stdout)
    manifest = json.loads((out / "prunekit.json").read_text(encoding="utf-8"))
    if manifest["calibration_tokens"] != bench.tokens:
        raise SystemExit("prunekit drew other windows than the others were given: nothing can be compared")
    seconds = told["seconds"]
    counted = seconds["forward"] + seconds["prune"] + seconds["write"]
    return {"counted": counted, **whole, "peak_rss_bytes": told["peak_rss_bytes"], "seconds": seconds}


def peer_run(bench: Bench, method: str, pattern: str, out: Path, *, side: str) -> dict[str, Any]:
    """A side of `sides.py`, in its environment."""
    report = bench.work / "report.json"
    report.unlink(missing_ok=True)
    python = bench.peer_python if side == "llmcompressor" else Path(sys.executable)
    asked = options(model=bench.folder, windows=bench.windows, pattern=pattern, dtype=bench.dtype, out=out)
    asked += options(method=method, batch=peer_batch(bench, side), report=report)
    _, whole = process([str(python), str(SIDES), side, *asked], bench, side)
    told = json.loads(report.read_text(encoding="utf-8"))
    seconds = told["seconds"]
    counted = seconds["prune"] + seconds["write"]
    return {"counted": counted, **whole, "peak_rss_bytes": told["peak_rss_bytes"], "seconds": seconds}


def peer_batch(bench: Bench, side: str) -> int:
    """Windows that go through a block together."""
    return LLMCOMPRESSOR_BATCH if side == "llmcompressor" else batch_size(bench.length)


def process(command: list[str], bench: Bench, name: str) -> tuple[str, dict[str, float]]:
    """Run a command to its end: its stdout, and the seconds it took, `wall` and `cpu` = user + system."""
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"}  # all is on disk, and nobody shall wait for a hub
    if command[0] == str(bench.peer_python):
        environ.pop("PYTHONPATH", None)  # its environment must not see modules of ours
    log = bench.work / "log" / f"{name}.txt"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.perf_counter()
    with log.open("w", encoding="utf-8") as messages:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=messages, text=True, env=environ)
    wall = time.perf_counter() - begun
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
        raise SystemExit(f"{name} ended with exit code {done.returncode}; the end of {log}:\n{tail}")
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return done.stdout, {"wall": wall, "cpu": cpu}


def models(bench: Bench, method: str, pattern: str, sides: list[str]) -> dict[str, dict[str, Any]]:
    """What stands on disk in the linears of all blocks, read by prunekit's own reader but counted here.

    `zeros` of `weights`; `linears_right`: how many have at least the zeros the pattern asks for, in every row or group (SparseGPT's
    fractions: in the linear), and, for Wanda, whose other weights are those of the dense model to the last bit; `same_mask`: share of
    the weights that are zero, or not, as in prunekit's model. Zeros of the dense model are why there may be a few more of them than
    asked for.
    """
    opened = {side: StreamedModel.open(bench.out(side), dtype="bfloat16", device="cpu") for side in sides}
    opened = {"dense": StreamedModel.open(bench.folder, dtype="bfloat16", device="cpu"), **opened}
    wanted = Pattern.parse(pattern)
    found: dict[str, dict[str, Any]] = {
        side: {"linears": 0, "linears_right": 0, "weights": 0, "zeros": 0, "same_mask": 0} for side in sides
    }
    for block in opened["dense"].anatomy.blocks:
        for linear in block.linears:
            weights = {}
            for side, source in opened.items():
                key = source.key_of[f"{linear.full_name}.weight"]
                weights[side] = linear.matrix(source.reader.read([key])[key]).float()
            for side, line in found.items():
                zero = weights[side] == 0
                kept = method != "wanda" or bool((zero | (weights[side] == weights["dense"])).all())
                line["linears"] += 1
                group = "row" if method == "wanda" else "layer"
                line["linears_right"] += kept and pattern_holds(weights[side], wanted, group)
                line["weights"] += linear.count
                line["zeros"] += int(zero.sum())
                line["same_mask"] += int((zero == (weights["prunekit"] == 0)).sum())
    for line in found.values():
        line["same_mask"] /= line["weights"]
    return found


def perplexity(bench: Bench, folder: Path) -> float:
    """Perplexity as `prunekit eval` measures it on a few windows of text that nobody was calibrated on."""
    asked = options(text="builtin:eval", samples=EVALUATION_WINDOWS, length=bench.length, dtype=bench.dtype)
    return float(run_prunekit("eval", folder, *asked)["perplexity"])


def print_table(
    bench: Bench, title: str, result: dict[str, Any], dense: float, versions: dict[str, str] | None
) -> None:
    """One pattern's figures: medians over the rounds, and ratios to prunekit taken round by round."""
    rounds, ratios = result["rounds"], result["median_ratios"]
    print(
        f"\n{title}, {bench.samples} windows of {bench.length} tokens in {bench.dtype}: "
        f"medians of {len(rounds)} rounds, and how many times prunekit's\n"
        f"{'':<24}{'prune and save':>18}{'whole process':>18}{'user + system':>18}{'peak memory':>18}"
        f"{'zeros':>13}{'right':>10}{'same mask':>11}{'perplexity':>12}"
    )
    for side, line in result["models"].items():
        cells = "".join(
            f"{median(rounds, side, measure):>8.1f} s{ratios[side][measure]:>6.2f} x" for measure in MEASURES[:3]
        )
        peak = f"{median(rounds, side, 'peak_rss_bytes') / 1e9:>7.2f} GB{ratios[side]['peak_rss_bytes']:>6.2f} x"
        print(
            f"{label(side, versions):<24}{cells}{peak}{line['zeros']:>13,}{line['linears_right']:>6}/{line['linears']}"
            f"{line['same_mask']:>11.4%}{line['perplexity']:>12.4f}"
        )
    print(f"{'dense':<24}{'':>106}{dense:>12.4f}", flush=True)


def median(rounds: list[dict[str, Any]], side: str, measure: str) -> float:
    """Median over the rounds."""
    return float(statistics.median(line[side][measure] for line in rounds))


def label(side: str, versions: dict[str, str] | None) -> str:
    """A side with the version of what it is."""
    if side == "prunekit":
        return f"prunekit {machine.versions()['prunekit']}"
    if side == "llmcompressor":
        assert versions is not None
        return f"llm-compressor {versions['llmcompressor']}"
    return "hooks"


if __name__ == "__main__":
    main()
