"""Larger than memory: does `prunekit prune` take the memory of a block or two, whatever the size of the model?

    python benchmarks/big.py [--shapes 1b,7b] [--patterns 0.5,2:4,wanda-sp@0.2] [--samples 8] [--length 256] [--curves]
                             [--keep FILE.json [--add]] [--figure FILE.svg] [--work DIR [--keep-model]]

Writes Llama-shaped checkpoints with random bfloat16 weights (memory and time do not depend on what the weights are), runs
`prunekit plan` and `prunekit prune` on them in processes of their own, and says what was planned and what was measured. Every reload
check streams (`--memory-budget`): one that loads the whole model would say nothing about the walk.

`--curves` adds ladders, one thing changed at a time: depth (the same block, more of them), width (as many blocks, wider ones), number
of windows, length of windows. `--figure` draws them. `--redraw` draws the figures that `--keep` kept, without running anything; `--add`
puts new runs beside those.

How it is measured. Peak memory: `VmHWM` of the process, as it reports it (by phase: up to its end) and as read from outside. Over
time: `VmRSS` seen from outside, every 20 ms; a phase is told by what stands in the output folder: `start` until the first weight
file, `walk` until the index, `verify` from then on. Disk: what the run's folder and its temporary folder hold, at the end and at most.

The disk must hold the largest model twice (`7b`: 27 GB). Linux only, for /proc.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from common import last_json, prunekit_command
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from prunekit import machine
from prunekit.catalogue import find_method

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GB = 1e9
SHARD_BYTES = 1_000_000_000  # all that is in memory while a checkpoint is written
SPREAD = (
    0.02  # of the weights: what Llama is initialised with; activations stay finite through any number of blocks here
)
# bytes of peak memory the project promises, where weights are zeroed and where structures are removed
ASKED = {"7b": {"sparsify": 2.5e9, "shrink": 3e9}}
POLL_SECONDS = 0.02
TIMELINE_POINTS = 240
PHASES = ("start", "walk", "verify")


@dataclass(frozen=True)
class Shape:
    """The shape of a Llama-like model with an untied head, in bfloat16."""

    name: str
    hidden: int
    intermediate: int
    blocks: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000

    def block_tensors(self) -> dict[str, tuple[int, ...]]:
        """Names within a block and shapes of its tensors."""
        kv = self.hidden * self.kv_heads // self.heads
        return {
            "input_layernorm.weight": (self.hidden,),
            "self_attn.q_proj.weight": (self.hidden, self.hidden),
            "self_attn.k_proj.weight": (kv, self.hidden),
            "self_attn.v_proj.weight": (kv, self.hidden),
            "self_attn.o_proj.weight": (self.hidden, self.hidden),
            "post_attention_layernorm.weight": (self.hidden,),
            "mlp.gate_proj.weight": (self.intermediate, self.hidden),
            "mlp.up_proj.weight": (self.intermediate, self.hidden),
            "mlp.down_proj.weight": (self.hidden, self.intermediate),
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor of the checkpoint, in the model's order."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for index in range(self.blocks):
            for name, size in self.block_tensors().items():
                yield f"model.layers.{index}.{name}", size
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    @property
    def parameters(self) -> int:
        """How many there are."""
        return sum(math.prod(size) for _, size in self.tensors())

    @property
    def bytes(self) -> int:
        """Size of the weights on disk."""
        return 2 * self.parameters

    @property
    def block_bytes(self) -> int:
        """Size of one block."""
        return 2 * sum(math.prod(size) for size in self.block_tensors().values())

    @property
    def folder_name(self) -> str:
        """A folder's name that no other shape has."""
        sizes = (self.hidden, self.intermediate, self.blocks, self.heads, self.kv_heads, self.vocabulary)
        return f"big-{self.name}-" + "-".join(map(str, sizes))

    def describe(self) -> dict[str, Any]:
        """What the figures keep of it."""
        return {
            "name": self.name,
            "hidden": self.hidden,
            "intermediate": self.intermediate,
            "blocks": self.blocks,
            "vocabulary": self.vocabulary,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "block_bytes": self.block_bytes,
        }


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("0.1b", 768, 2048, 12, 12, 4),
        Shape("0.3b", 1024, 2816, 20, 16, 4),
        Shape("0.6b", 1536, 4096, 20, 24, 8),
        Shape("1b", 2048, 5632, 22, 32, 4),  # TinyLlama-1.1B
        Shape("3b", 3072, 8192, 28, 24, 8),  # Llama-3.2-3B, with fewer tokens
        Shape("7b", 4096, 11008, 32, 32, 32),  # Llama-2-7B
        Shape("13b", 5120, 13824, 40, 40, 40),  # Llama-2-13B
    )
}
CURVES = ("depth", "width", "samples", "length")
DEPTHS = (3, 6, 11, 22, 44)  # blocks of the shape `1b`
WIDTHS = (512, 1024, 2048, 3072, 4096)  # of eight blocks
CURVE_SAMPLES = (8, 32, 64, 128, 256)
SAMPLES_LENGTH = 512  # tokens a window in that curve
CURVE_LENGTHS = (128, 256, 512, 1024, 2048, 4096)
LENGTH_SAMPLES = 8  # windows in that curve
LONGEST = max(CURVE_LENGTHS)


def wide(hidden: int, blocks: int) -> Shape:
    """A shape with the proportions of `1b`'s block."""
    heads = hidden // 64
    return Shape(f"{hidden}x{blocks}", hidden, hidden * 11 // 4, blocks, heads, max(1, heads // 8))


def main() -> None:
    """Measure, print, and keep figures and picture where they are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="1b,7b", help=f"of {', '.join(SHAPES)}; or none")
    parser.add_argument(
        "--patterns",
        default="0.5,2:4,wanda-sp@0.2",
        help="fractions and K:G patterns each shape is pruned to; METHOD@... where it is not --method, a ratio where that shrinks",
    )
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--memory-budget", default="1MB", help="of the reload check; small, so that it streams")
    every = ",".join(CURVES)
    parser.add_argument("--curves", nargs="?", const=every, default="", help=f"ladders to measure too; alone: {every}")
    parser.add_argument("--work", type=Path, help="folder to write models in. Default: a temporary one")
    parser.add_argument("--keep-model", action="store_true", help="leave the models in --work, and take those it has")
    parser.add_argument("--keep", type=Path, help="write the figures to this JSON file, anew after every run")
    parser.add_argument("--add", action="store_true", help="leave in --keep what it has, and add to its runs")
    parser.add_argument("--figure", type=Path, help="draw the figures to this file (.svg or .png)")
    parser.add_argument("--redraw", action="store_true", help="measure nothing; draw what --keep has")
    asked = parser.parse_args()
    names = [] if asked.shapes == "none" else asked.shapes.split(",")
    if unknown := [name for name in names if name not in SHAPES]:
        parser.error(f"unknown shape {unknown[0]!r}: known are {', '.join(SHAPES)}")
    if unknown := [name for name in filter(None, asked.curves.split(",")) if name not in CURVES]:
        parser.error(f"unknown curve {unknown[0]!r}: known are {', '.join(CURVES)}")
    if asked.keep_model and not asked.work:
        parser.error("--keep-model needs --work: a temporary folder is deleted")
    if asked.add and not (asked.keep and asked.keep.is_file()):
        parser.error("--add needs a file to --keep that is there")
    if asked.redraw and not (asked.keep and asked.figure):
        parser.error("--redraw needs --keep and --figure")
    if asked.redraw:
        draw(json.loads(asked.keep.read_text(encoding="utf-8")), asked.figure)
        return
    # asked to stop, end in order: what would be left behind is larger than most disks' free space
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if asked.work:
        asked.work.mkdir(parents=True, exist_ok=True)
        measure(asked, names, asked.work)
    else:
        with tempfile.TemporaryDirectory(prefix="prunekit-big-") as work:
            measure(asked, names, Path(work))


def measure(asked: argparse.Namespace, names: list[str], work: Path) -> None:
    """Every run that is asked for, the figures kept after each."""
    figures: dict[str, Any] = {
        "benchmark": "big",
        "method": asked.method,
        "windows": [asked.samples, asked.length],
        "dtype": asked.dtype,
        "reload_check_budget": asked.memory_budget,
        "runs": [],
        "curves": {},
        "machine": machine.describe(),
        "versions": machine.versions(),
    }
    if asked.add:
        before = json.loads(asked.keep.read_text(encoding="utf-8"))
        for name in ("method", "windows", "dtype", "reload_check_budget"):
            if before[name] != figures[name]:
                raise SystemExit(
                    f"'{asked.keep}' was measured with {name} {before[name]}, not {figures[name]}: it cannot be added to"
                )
        figures |= {"runs": before["runs"], "curves": before["curves"]}

    def keep() -> None:
        if asked.keep:
            asked.keep.parent.mkdir(parents=True, exist_ok=True)
            asked.keep.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")

    bench = Bench(asked, work)
    for name in names:
        with bench.model(SHAPES[name]) as folder:
            for target in asked.patterns.split(","):
                run = bench.run(SHAPES[name], folder, target, asked.samples, asked.length, show=True)
                figures["runs"].append(run)
                print(run_table(run), flush=True)
                keep()
    for curve in filter(None, asked.curves.split(",")):
        lines = figures["curves"][curve] = []
        print(curve_head(curve), flush=True)
        for shape, group in ladder(curve, asked.samples, asked.length):
            with bench.model(shape) as folder:
                for samples, length in group:
                    run = bench.run(shape, folder, asked.patterns.split(",")[0], samples, length)
                    del run["timeline"]
                    lines.append(run)
                    print(curve_line(run), flush=True)
                    keep()
    if asked.figure:
        draw(figures, asked.figure)


def ladder(curve: str, samples: int, length: int) -> list[tuple[Shape, list[tuple[int, int]]]]:
    """The shapes a curve is measured on, each with its (windows, length)."""
    if curve == "depth":
        return [(replace(SHAPES["1b"], name="depth", blocks=depth), [(samples, length)]) for depth in DEPTHS]
    if curve == "width":
        return [(wide(hidden, 8), [(samples, length)]) for hidden in WIDTHS]
    if curve == "samples":
        return [(wide(1024, 4), [(count, SAMPLES_LENGTH) for count in CURVE_SAMPLES])]
    return [(wide(1024, 4), [(LENGTH_SAMPLES, tokens) for tokens in CURVE_LENGTHS])]


# --- checkpoints ------------------------------------------------------------------------------------------------------------------


def write_model(shape: Shape, folder: Path) -> None:
    """Write a random checkpoint; one shard in memory at a time. The index comes last: with it the folder is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_tokenizer().save_pretrained(folder)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=False,
        dtype="bfloat16",
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    config.save_pretrained(folder)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, size in shape.tensors():
        if filled and filled + 2 * math.prod(size) > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = size
        filled += 2 * math.prod(size)
    draw_from = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: random_tensor(size, draw_from) for name, size in shard.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        del tensors  # or two shards would be in memory while the next one is made
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": shape.bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def random_tensor(size: tuple[int, ...], draw_from: torch.Generator) -> torch.Tensor:
    """Normal weights; ones where it is a norm's."""
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    return torch.empty(size, dtype=torch.bfloat16).normal_(0, SPREAD, generator=draw_from)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte and three special ones, all below any vocabulary here."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


# --- runs -------------------------------------------------------------------------------------------------------------------------


class Bench:
    """Makes models in a working folder and runs prunekit on them."""

    def __init__(self, asked: argparse.Namespace, work: Path) -> None:
        self.asked = asked
        self.work = work

    @contextmanager
    def model(self, shape: Shape) -> Iterator[Path]:
        """A folder with the shape's checkpoint; deleted again unless models are kept."""
        folder = self.work / shape.folder_name
        there = (folder / "model.safetensors.index.json").is_file()
        free = shutil.disk_usage(self.work).free
        needed = (1 if there else 2) * shape.bytes * 1.05
        if needed > free:
            raise SystemExit(
                f"'{shape.name}' needs {needed / GB:.1f} GB in '{self.work}', which has {free / GB:.1f} GB free: "
                "choose another --work or smaller --shapes"
            )
        try:
            if not there:
                write_model(shape, folder)
                machine.return_memory()
            yield folder
        finally:
            if not self.asked.keep_model:
                shutil.rmtree(folder, ignore_errors=True)

    def run(
        self, shape: Shape, folder: Path, target: str, samples: int, length: int, *, show: bool = False
    ) -> dict[str, Any]:
        """Plan and prune; returns what was planned and measured. `show` lets the run's progress through to stderr."""
        named, at, pattern = target.rpartition("@")
        method = named if at else self.asked.method
        kind = find_method(method).kind
        options = [
            "--method",
            method,
            "--ratio" if kind == "shrink" else "--pattern",
            pattern,
            "--dtype",
            self.asked.dtype,
        ]
        options += ["--samples", str(samples), "--length", str(length)]
        budget = ["--memory-budget", self.asked.memory_budget]
        place = self.work / "run"
        shutil.rmtree(place, ignore_errors=True)
        out, spare = place / "out", place / "temporary"
        spare.mkdir(parents=True)
        arguments = [folder, *options, "--out", out]
        try:
            planned = planned_figures(Watched(prunekit_command("plan", *arguments, *budget), place).finish())
            watched = Watched(prunekit_command("prune", *arguments, *budget), place, show=show)
            summary = watched.finish()
            measured = {
                "peak": watched.peak,
                "peak_reported": summary["peak_rss_bytes"],
                "memory": summary["memory"] | {"peak": watched.peak},
                "resident": watched.by_phase,
                "disk": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
                "disk_peak": watched.disk_peak,
                "seconds": summary["seconds"],
                "wall": watched.wall,
                "processor": watched.processor,
            }
        finally:
            shutil.rmtree(place, ignore_errors=True)
        return {
            "shape": shape.describe(),
            "method": method,
            "kind": kind,
            "pattern": pattern,
            "windows": [samples, length],
            "sparsity": summary["sparsity"],
            "ratio": summary["ratio"],
            "verification": summary["verification"],
            "measured": measured,
            "planned": planned,
            "timeline": watched.timeline(),
        }


class Watched:
    """A prunekit process under observation; it begins at once and `finish` waits for it.

    Attributes:
        peak: VmHWM in bytes, as last read from outside.
        by_phase: largest VmRSS seen in each phase.
        disk_peak: largest size of `place`, which holds its output and its temporary files.
        wall: seconds from start to end of the process.
        processor: seconds of processor time it took; less than wall × cores could have given where others were at work.
    """

    def __init__(self, command: list[str], place: Path, *, show: bool = False) -> None:
        self.peak = self.disk_peak = 0
        self.by_phase: dict[str, int] = {}
        self.wall = self.processor = 0.0
        self._place = place
        self._verb = " ".join(command[3:])
        self._samples: list[tuple[float, int, str]] = []
        self._errors = None if show else tempfile.TemporaryFile("w+", dir=place)  # noqa: SIM115 - lives as long as the process
        self._spent_before = children_seconds()
        self._begun = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "TMPDIR": str(place / "temporary")},  # so that these files are seen, counted and deleted
        )
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def finish(self) -> dict[str, Any]:
        """The JSON object that stdout ends with. Ends the program where the process failed."""
        try:
            printed, _ = self._process.communicate()
        except BaseException:
            self._process.terminate()
            self._process.wait()
            raise
        self.wall = time.perf_counter() - self._begun
        self._thread.join()
        self.processor = children_seconds() - self._spent_before
        if self._process.returncode:
            if self._errors is not None:
                self._errors.seek(0)
                print(self._errors.read(), file=sys.stderr)
            raise SystemExit(f"'prunekit {self._verb}' ended with exit code {self._process.returncode}")
        if self._errors is not None:
            self._errors.close()
        return last_json(printed)

    def timeline(self) -> dict[str, Any]:
        """Resident bytes against seconds, the largest of each of a few hundred equal spans, and when each phase ended."""
        ends = {phase: at for at, _, phase in self._samples}
        span = (self._samples[-1][0] or 1.0) / TIMELINE_POINTS
        largest: dict[int, int] = {}
        for at, size, _ in self._samples:
            slot = int(at / span)
            largest[slot] = max(largest.get(slot, 0), size)
        return {
            "seconds": [round((slot + 0.5) * span, 3) for slot in largest],
            "rss": list(largest.values()),
            "phase_ends": {phase: round(at, 3) for phase, at in ends.items()},
        }

    def _watch(self) -> None:
        status = Path(f"/proc/{self._process.pid}/status")
        out = self._place / "out"
        weighed = 0.0
        phase = "start"
        while self._process.poll() is None:
            try:
                fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
                size, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
            except (OSError, KeyError):  # it just ended
                break
            if phase == "start" and any(out.glob("*.safetensors")):
                phase = "walk"
            if phase == "walk" and (out / "model.safetensors.index.json").exists():
                phase = "verify"
            at = time.perf_counter() - self._begun
            self._samples.append((at, size, phase))
            self.by_phase[phase] = max(self.by_phase.get(phase, 0), size)
            self.peak = max(self.peak, peak)
            if at - weighed > 0.5:
                self.disk_peak = max(self.disk_peak, folder_bytes(self._place))
                weighed = at
            time.sleep(POLL_SECONDS)


def children_seconds() -> float:
    """Processor time of all processes that were started here and have ended."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in a folder that another process is changing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # renamed or deleted meanwhile
            continue
    return total


def planned_figures(plan: dict[str, Any]) -> dict[str, Any]:
    """What is compared of `prunekit plan --json`: bytes of memory by phase, of disk at the end and at most, seconds by phase."""
    disk = plan["disk"]
    return {"memory": plan["memory"], "disk": disk["weights"], "disk_peak": disk["peak"], "seconds": plan["seconds"]}


# --- tables -----------------------------------------------------------------------------------------------------------------------


def run_table(run: dict[str, Any]) -> str:
    """One run: planned and measured side by side."""
    shape, measured, planned = run["shape"], run["measured"], run["planned"]
    samples, length = run["windows"]
    lines = [
        "",
        f"{shape['name']}: {shape['parameters'] / 1e9:.2f} B parameters, {shape['bytes'] / GB:.2f} GB, {shape['blocks']} blocks of "
        f"{shape['block_bytes'] / GB:.3f} GB; {run['method']} {run['pattern']}, {samples} windows x {length}",
        f"  {'':<16}{'measured':>12}{'planned':>12}{'planned/measured':>18}",
    ]

    def row(name: str, got: float, wanted: float | None, unit: str, note: str = "") -> None:
        scale, digits = (GB, 3) if unit == "GB" else (1.0, 1)
        line = f"  {name:<16}{got / scale:>9.{digits}f} {unit:<2}"
        if wanted is not None:
            line += f"{wanted / scale:>9.{digits}f} {unit:<2}{wanted / got if got else math.nan:>18.2f}"
        lines.append(f"{line}  {note}".rstrip())

    for phase in (*PHASES, "peak"):
        note = ""
        if phase == "peak":
            note = f"{measured['peak'] / shape['bytes']:.2f} x the model, {measured['peak'] / shape['block_bytes']:.1f} x a block"
            if shape["name"] in ASKED:
                note += f"; asked: <= {ASKED[shape['name']][run['kind']] / GB:.1f} GB"
        if phase in measured["memory"]:
            row(f"memory {phase}", measured["memory"][phase], planned["memory"].get(phase), "GB", note)
    row("  by itself", measured["peak_reported"], None, "GB")
    row("disk", measured["disk"], planned["disk"], "GB")
    row("  at most", measured["disk_peak"], planned["disk_peak"], "GB")
    seconds = measured["seconds"]
    for phase, spent in seconds.items():
        if phase != "total":
            row(f"time {phase}", spent, planned["seconds"].get(phase), "s")
    row("  total", seconds["total"], planned["seconds"]["total"], "s")
    row("  whole process", measured["wall"], None, "s", f"{measured['processor']:.0f} s of processor time")
    return "\n".join(lines)


def curve_head(curve: str) -> str:
    """The heading of a curve's table."""
    return (
        f"\n{curve}\n{'model':>10}{'size':>11}{'block':>11}{'windows':>12}{'peak':>11}{'planned':>9}{'x':>6}"
        f"{'process':>10}{'run':>9}{'planned':>9}{'x':>6}"
    )


def curve_line(run: dict[str, Any]) -> str:
    """One rung of a ladder."""
    shape, measured, planned = run["shape"], run["measured"], run["planned"]
    wanted, got = planned["seconds"]["total"], measured["seconds"]["total"]
    samples, length = run["windows"]
    return (
        f"{shape['parameters'] / 1e9:>8.2f} B{shape['bytes'] / GB:>8.2f} GB{shape['block_bytes'] / GB:>8.3f} GB"
        f"{f'{samples} x {length}':>12}"
        f"{measured['peak'] / GB:>8.3f} GB{planned['memory']['peak'] / GB:>9.3f}{planned['memory']['peak'] / measured['peak']:>6.2f}"
        f"{measured['wall']:>8.1f} s{got:>7.1f} s{wanted:>9.1f}{wanted / got:>6.2f}"
    )


# --- the picture ------------------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours, told apart by every kind of colour vision; shapes of markers differ as well
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666"


def draw(figures: dict[str, Any], path: Path) -> None:
    """Draw runs and curves to `path`: on top memory over one run, then peak memory and time against what was changed."""
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise SystemExit("drawing needs matplotlib: pip install 'prunekit[plots]'") from None
    mpl.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "prunekit"}
    )
    curves = figures["curves"]
    columns = [name for name in ("samples", "length") if name in curves]
    if "depth" in curves and "width" in curves:
        columns.insert(0, "size")
    rows: list[Any] = [["run"] * max(1, len(columns))] if figures["runs"] else []
    if columns:
        rows += [[f"memory {name}" for name in columns], [f"time {name}" for name in columns]]
    if not rows:
        raise SystemExit("nothing to draw: no runs, and no curves (of size: depth and width)")
    figure, axes = plt.subplot_mosaic(rows, figsize=(12, 3.6 * len(rows)), layout="constrained")
    if figures["runs"]:
        draw_run(axes["run"], max(figures["runs"], key=lambda run: run["shape"]["bytes"]))
    if "size" in columns:
        draw_sizes(axes["memory size"], axes["time size"], figures)
    if "samples" in columns:
        at = f"{shape_text(curves['samples'])}, windows of {SAMPLES_LENGTH} tokens"
        draw_curve(axes["memory samples"], axes["time samples"], curves["samples"], 0, f"calibration windows\n({at})")
    if "length" in columns:
        at = f"{shape_text(curves['length'])}, {LENGTH_SAMPLES} windows"
        draw_curve(axes["memory length"], axes["time length"], curves["length"], 1, f"tokens per window\n({at})")
    about = figures["machine"]
    samples, length = figures["windows"]
    figure.suptitle(
        f"prunekit prune, {figures['method']}, {figures['dtype']}; {samples} windows of {length} tokens unless said otherwise "
        f"({about['processor']}, {about['cores']} cores)",
        fontsize=9,
        color=GREY,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def shape_text(runs: list[dict[str, Any]]) -> str:
    """The model a curve was measured on, in a few words."""
    return f"{runs[0]['shape']['parameters'] / 1e9:.2f} B parameters"


def draw_run(axes: Axes, run: dict[str, Any]) -> None:
    """Resident memory over a run, its phases shaded."""
    shape, timeline, planned = run["shape"], run["timeline"], run["planned"]["memory"]
    seconds, sizes = timeline["seconds"], [size / GB for size in timeline["rss"]]
    limit = ASKED.get(shape["name"], {}).get(run["kind"])
    top = 1.35 * max([*sizes, (limit or 0) / GB])
    begun = 0.0
    names = {"start": "start", "walk": f"walk: {shape['blocks']} blocks", "verify": "reload check"}
    end = max(timeline["phase_ends"].values())
    for number, phase in enumerate(PHASES):
        if phase not in timeline["phase_ends"]:
            continue
        ended = timeline["phase_ends"][phase]
        axes.axvspan(begun, ended, color=GREY, alpha=0.14 if number % 2 else 0.05, linewidth=0)
        if ended - begun > 0.04 * end:
            axes.text((begun + ended) / 2, 0.985 * top, names[phase], ha="center", va="top", color=GREY)
        if planned.get(phase, math.inf) < top * GB:
            label = "planned, by phase" if phase == "walk" else None
            axes.plot(
                [begun, ended], [planned[phase] / GB] * 2, color=ORANGE, linestyle=":", linewidth=1.8, label=label
            )
        begun = ended
    axes.plot(seconds, sizes, color=BLUE, linewidth=1.3, label="resident memory")
    if limit:
        axes.axhline(limit / GB, color=RED, linestyle="--", linewidth=1.2, label=f"asked: at most {limit / GB:.1f} GB")
    axes.axhline(shape["block_bytes"] / GB, color=GREEN, linestyle="-.", linewidth=1.2, label="one block")
    axes.set(xlim=(0, end), ylim=(0, top), xlabel="seconds since the process began", ylabel="memory (GB)")
    samples, length = run["windows"]
    axes.set_title(
        f"{shape['parameters'] / 1e9:.2f} B parameters, {shape['bytes'] / GB:.1f} GB of weights, {run['method']} {run['pattern']}, "
        f"{samples} windows of {length}: at most {run['measured']['peak'] / GB:.2f} GB",
        loc="left",
        fontsize=10,
    )
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.9), ncols=4, frameon=False)


def draw_sizes(memory: Axes, seconds: Axes, figures: dict[str, Any]) -> None:
    """Peak memory and time against the size of the model: deeper, wider, and the whole shapes."""
    depth, width = figures["curves"]["depth"], figures["curves"]["width"]
    shapes = {run["shape"]["name"]: run for run in reversed(figures["runs"])}.values()  # the first pattern of each
    everything = [*depth, *width, *shapes]
    sizes = [run["shape"]["bytes"] / GB for run in everything]
    ends = [0.8 * min(sizes), 1.25 * max(sizes)]
    ladder = {
        f"deeper: 3 to 44 blocks of {depth[0]['shape']['block_bytes'] / GB:.2f} GB": (depth, BLUE, "o"),
        "wider: 8 blocks": (width, ORANGE, "s"),
    }
    for label, (runs, colour, marker) in ladder.items():
        x = [run["shape"]["bytes"] / GB for run in runs]
        y = [run["measured"]["peak"] / GB for run in runs]
        memory.plot(x, y, marker, color=colour, label=label)
        seconds.plot(x, [run["measured"]["wall"] for run in runs], marker, color=colour, label=label)
    for run in shapes:
        x = run["shape"]["bytes"] / GB
        for axes, value in ((memory, run["measured"]["peak"] / GB), (seconds, run["measured"]["wall"])):
            axes.plot([x], [value], "*", color=RED, markersize=11)
            axes.annotate(
                run["shape"]["name"], (x, value), (0, -16), textcoords="offset points", ha="center", color=RED
            )
    fine = geometric(*ends)
    memory.plot(ends, ends, color=GREY, linewidth=1.2, label="the whole model")
    flat = depth[0]["measured"]["peak"] / GB
    memory.plot(ends, [flat, flat], "--", color=BLUE, linewidth=1, label="flat")
    slope, offset = fit([run["shape"]["bytes"] / GB for run in width], [run["measured"]["peak"] / GB for run in width])
    within = [x for x in fine if x <= 1.1 * width[-1]["shape"]["bytes"] / GB]
    memory.plot(
        within, [offset + slope * x for x in within], "--", color=ORANGE, linewidth=1, label="a + b · size of the block"
    )
    slope, offset = fit([run["shape"]["bytes"] / GB for run in depth], [run["measured"]["wall"] for run in depth])
    seconds.plot(
        fine,
        [offset + slope * x for x in fine],
        "--",
        color=BLUE,
        linewidth=1,
        label=f"{offset:.0f} s + {slope:.0f} s per GB",
    )
    for axes in (memory, seconds):
        axes.set(xscale="log", yscale="log", xlabel="size of the model (GB, bfloat16)", xlim=ends)
        plain_ticks(axes)
    memory.set_ylabel("peak memory (GB)")
    seconds.set_ylabel("time of the whole process (s)")
    peaks = [run["measured"]["peak"] / GB for run in everything]
    memory.set_ylim(min(peaks) / 9, 2 * max(peaks))  # room for the legend where no point can be: below them
    memory.legend(frameon=False, fontsize=8, loc="lower right")
    walls = [run["measured"]["wall"] for run in everything]
    seconds.set_ylim(min(walls) / 1.6, 3 * max(walls))
    seconds.legend(frameon=False, fontsize=8, loc="upper left")


def draw_curve(memory: Axes, seconds: Axes, runs: list[dict[str, Any]], which: int, xlabel: str) -> None:
    """Peak memory and time against the number (`which` 0) or the length (1) of the windows."""
    x = [run["windows"][which] for run in runs]
    peaks = [run["measured"]["peak"] / GB for run in runs]
    hidden = [2 * math.prod(run["windows"]) * run["shape"]["hidden"] / GB for run in runs]
    walls = [run["measured"]["wall"] for run in runs]
    memory.plot(x, peaks, "o", color=BLUE, label="measured")
    memory.plot(
        x,
        [run["planned"]["memory"]["peak"] / GB for run in runs],
        "_",
        color=ORANGE,
        markersize=11,
        mew=2,
        label="planned",
    )
    memory.axhline(peaks[0], color=GREY, linestyle="--", linewidth=1, label="flat")
    memory.plot(
        x,
        [peaks[0] + size - hidden[0] for size in hidden],
        ":",
        color=GREEN,
        linewidth=1.5,
        label="flat + all hidden states",
    )
    slope, offset = fit(x, walls)
    seconds.plot(x, walls, "o", color=BLUE, label="measured")
    ends = [0, max(x)]
    seconds.plot(
        ends,
        [offset + slope * at for at in ends],
        "--",
        color=GREY,
        linewidth=1,
        label="line through them",
    )
    for axes in (memory, seconds):
        axes.set(xlabel=xlabel, xlim=(0, 1.05 * max(x)), xticks=[max(x) * part // 4 for part in range(5)])
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    memory.set(ylabel="peak memory (GB)", ylim=(0, 1.5 * max(peaks)))
    seconds.set(ylabel="time of the whole process (s)", ylim=(0, 1.3 * max(walls)))


def fit(x: list[float], y: list[float]) -> tuple[float, float]:
    """Slope and offset of the line with the least squares of relative differences: noise grows with what is timed."""
    weights = [1 / value**2 for value in y]
    total = sum(weights)
    mean_x, mean_y = (sum(w * v for w, v in zip(weights, values, strict=True)) / total for values in (x, y))
    covariance = sum(w * (a - mean_x) * (b - mean_y) for w, a, b in zip(weights, x, y, strict=True))
    slope = covariance / sum(w * (a - mean_x) ** 2 for w, a in zip(weights, x, strict=True))
    return slope, mean_y - slope * mean_x


def geometric(low: float, high: float, count: int = 60) -> list[float]:
    """Values in equal ratios from `low` to `high`."""
    return [low * (high / low) ** (step / (count - 1)) for step in range(count)]


def plain_ticks(axes: Axes) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5, written as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())


if __name__ == "__main__":
    main()
