"""The model card: `README.md` of an output folder, in the form the hub reads."""

from __future__ import annotations

import math
import re
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from ..catalogue import find_method
from ..checkpoint.writer import MODELING_NAME
from ..evaluation.record import EvaluationRecord
from ..recipe import Recipe
from ..recovery.options import RecoveryOptions
from .findings import spelt

_FIGURES = "## Before and after"
_AFTER_FIGURES = "The zeros are stored"
_AFTER_SHAPES = "The widths are"
_WITH_CODE = "`prunekit.load`, or with `AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)`"
_AS_IT_IS = "`AutoModelForCausalLM.from_pretrained`"
_TRAINED = "kept weights were trained with low-rank adapters, which are merged; zeros are where the pruning put them."
# what an evaluation puts into a card: the last names of the metadata, and a section
_IN_METADATA = re.compile(r"^metrics:\n(?:- .*\n)+model-index:\n(?:[- ] .*\n)+", re.MULTILINE)
_IN_TEXT = re.compile(rf"^{_FIGURES}\n.*?(?=^{_AFTER_FIGURES}|^{_AFTER_SHAPES})", re.MULTILINE | re.DOTALL)


def is_ours(card: str, manifest: dict[str, Any], folder: Path) -> bool:
    """Whether a folder's card is as prunekit wrote it, whatever evaluation it shows: nothing of anybody's is lost with it."""
    return _IN_TEXT.sub("", _IN_METADATA.sub("", card)) == model_card(manifest, folder)


def model_card(manifest: dict[str, Any], source: Path, evaluation: EvaluationRecord | None = None) -> str:
    """Markdown with the hub's metadata block: base model, licence as the card in `source` has it, tags, figures, the command."""
    recipe = Recipe.build(manifest["recipe"])
    method = find_method(recipe.method)
    run, recovery = manifest["run"], manifest.get("recovery")
    base = recipe.model if re.fullmatch(r"[\w.-]+/[\w.-]+", recipe.model) and not Path(recipe.model).exists() else None
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    front += [f"base_model: {base}", "base_model_relation: finetune"] if base else []
    front += [f"license: {licence}"] if (licence := _licence(source)) else []
    name = Path(recipe.model).name
    front += ["tags:", "- pruned", *([] if recipe.removes else ["- sparse"]), f"- {method.name}"]
    front += [] if evaluation is None else _metadata(f"{name}-{method.name}", evaluation)
    front += ["---"]
    errors = [line["output_error"] for line in manifest["linears"] if line["output_error"] is not None]
    rows = {
        "method": f"{method.name} ({method.paper})" if method.paper else method.name,
        **_what_went(recipe, run),
        "calibration": f"{recipe.calibration.source}, {run['windows']} windows, {run['tokens']:,} tokens, seed {recipe.seed}",
        "output error of the linears": f"median {median(errors):.3f}, largest {max(errors):.3f}" if errors else "–",
        **({} if recovery is None else {"recovery": _recovered(recovery)}),
        "reload check": f"logits differ by {manifest['verification']['difference']:.1e} of their norm",
        "made with": ", ".join(f"{library} {version}" for library, version in manifest["versions"].items()),
    }
    kept = _untouched(recipe, trained=recovery is not None)
    again = "" if recovery is None else "\n" + RecoveryOptions.of(recovery).command("OUT", "RECOVERED")
    table = "\n".join(f"| {left} | {right} |" for left, right in rows.items())
    return "\n".join(front) + (
        f"\n\n# {name}, pruned with {method.name}\n\n"
        f"Made by prunekit. {method.summary} {kept}\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        f"{'' if evaluation is None else _figures(evaluation)}"
        f"{_loads(recipe, free=MODELING_NAME in manifest['outputs'])}\n\n"
        f"Repeat it with\n\n```\n{recipe.command('OUT')}{again}\n```\n\n"
        "`prunekit.json` holds the whole record: recipe, versions, hashes of inputs and outputs, a line per linear; `report.html` "
        "shows it.\n"
    )


def padded_card(card: str) -> str:
    """The card of a folder that brings code, for one whose blocks are as wide and which needs none."""
    return re.sub(rf"^{_AFTER_SHAPES} noted in .*\n\n", "", card, flags=re.MULTILINE).replace(_WITH_CODE, _AS_IT_IS)


def _what_went(recipe: Recipe, run: dict[str, Any]) -> dict[str, str]:
    """The lines of the table that say what is gone."""
    if not recipe.removes:
        return {
            "pattern": str(recipe.target),
            "sparsity (zeros / weights of the block linears)": f"{run['sparsity']:.4f} ({run['zeros']:,} of {run['weights']:,})",
            "parameters": f"{run['parameters']:,}; none removed, shapes are those of the original",
        }
    after, channels = run["parameters"] - run["removed"], run["channels"]
    return {
        **({"channels of the residual stream": f"{channels['after']} of {channels['before']}"} if channels else {}),
        "parameters": f"{after:,} of {run['parameters']:,}",
        "ratio (parameters removed / block parameters)": f"{run['ratio']:.4f} "
        f"({run['block_removed']:,} of {run['block_parameters']:,})",
    }


def _untouched(recipe: Recipe, *, trained: bool) -> str:
    tuned = recipe.parts.get("tune", {}).get("name", "none") != "none"
    if not recipe.removes:
        refitted = recipe.parts.get("reconstruct", {}).get("name", "none")
        kept = "kept weights are bit-identical to the original's."
        if trained:
            kept = _TRAINED
        elif tuned:
            kept = "kept weights were tuned towards what whole blocks computed."
        elif refitted != "none":
            kept = f"kept weights were refitted ({refitted})."
        moved = " Where it could be, the channels of linears were put into another order, which no logit shows."
        return (
            f"Embeddings, output head, norms and biases are untouched; {kept}"
            f"{moved if recipe.parts.get('pattern', {}).get('permute') else ''}"
        )
    again = "; then they were trained with low-rank adapters, which are merged" if trained else ""
    if "width" in recipe.parts:
        return (
            "The embedding and the blocks' matrices are in the bases of their places, cut, with the norms' gains in them; shortcuts "
            "carry the stream from one basis to the next and count as parameters. The head is untouched, and has its own matrix where "
            f"it was tied{again}."
        )
    refitted = recipe.parts.get("compensate", {}).get("name", "none")
    kept = "what is kept is bit-identical"
    if tuned:
        kept = "what is kept was tuned towards what whole blocks computed"
    elif refitted == "bias":
        kept = "what is kept is bit-identical; biases stand in for what those that lost inputs lost"
    elif refitted != "none":
        kept = f"those that lost inputs were refitted ({refitted}), what is kept of the others is bit-identical"
    return f"Embeddings and output head are untouched; of the blocks' matrices, {kept}{again}."


def _loads(recipe: Recipe, *, free: bool) -> str:
    """How to load it: a `free` folder brings code, because its blocks have widths that no config says."""
    loads = _WITH_CODE if free else _AS_IT_IS
    if not recipe.removes:
        return (
            f"{_AFTER_FIGURES} like any other number: the folder loads with {loads}, and a dense "
            "runtime is neither faster nor smaller for them."
        )
    if "width" in recipe.parts:
        return (
            f"{_AFTER_SHAPES} noted in `config.json`, and no stock class has them: load the folder with `prunekit.load`, or with "
            "`AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)`, which runs `modeling_prunekit.py`."
        )
    if free:
        return (
            f"{_AFTER_SHAPES} noted in `config.json`, because no stock config can say them: the folder loads with {_WITH_CODE}, which "
            f"runs `{MODELING_NAME}`; for other runtimes `prunekit export DIR --pad --out PADDED` fills blocks up with zeros."
        )
    return (
        f"{_AFTER_SHAPES} like those of a model that was trained with them: it loads with {loads}, and is smaller and faster in any "
        "runtime that knows the model's class."
    )


def _recovered(recovery: dict[str, Any]) -> str:
    options, result = RecoveryOptions.of(recovery), recovery["result"]
    distilled = "" if options.distill is None else f", distilled from {options.distill}"
    return (
        f"adapters of rank {options.rank} on {result['linears']} linears, {result['steps']} steps of {options.batch} × "
        f"{result['length']} tokens of {options.data}{distilled}; perplexity on held-out windows of it "
        f"{spelt(result['before'])} → {spelt(result['after'])}"
    )


def _metadata(name: str, evaluation: EvaluationRecord) -> list[str]:
    """The hub's `metrics` and `model-index`; what is no finite number has no place there."""
    found = [
        (figures.text, "perplexity", figures.perplexity, f"perplexity, windows of {figures.length} tokens")
        for figures in evaluation.texts
    ]
    found += [(figures.task, figures.metric, figures.value, figures.metric) for figures in evaluation.tasks]
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": dataset, "type": dataset},
            "metrics": [{"type": kind, "value": value, "name": words}],
        }
        for dataset, kind, value, words in found
        if math.isfinite(value)
    ]
    if not results:
        return []
    metrics = sorted({kind for _, kind, value, _ in found if math.isfinite(value)})
    content = {"metrics": metrics, "model-index": [{"name": name, "results": results}]}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=math.inf).splitlines()


def _figures(evaluation: EvaluationRecord) -> str:
    lines = [_FIGURES, ""]
    if evaluation.texts:
        lines += ["| perplexity on | before | after | × before |", "|---|---:|---:|---:|"]
        for text in evaluation.texts:
            before, ratio = ("–", "–") if text.ratio is None else (spelt(text.before), f"{text.ratio:.3f}")
            interval = "" if text.ratio_interval is None else " ({:.3f} … {:.3f})".format(*text.ratio_interval)
            on = f"{text.text}, {text.windows} windows of {text.length} tokens"
            lines.append(f"| {on} | {before} | {spelt(text.perplexity)} | {ratio}{interval} |")
        lines.append("")
    if evaluation.tasks:
        lines += ["| task, % right | before | after | difference |", "|---|---:|---:|---:|"]
        for task in evaluation.tasks:
            before, change = "–", "–"
            if task.before is not None:
                before, change = f"{100 * task.before:.1f}", f"{100 * (task.value - task.before):+.1f}"
            low_high = task.difference_interval
            interval = "" if low_high is None else f" ({100 * low_high[0]:+.1f} … {100 * low_high[1]:+.1f})"
            value = f"{100 * task.value:.1f}" + ("" if task.stderr is None else f" ± {196 * task.stderr:.1f}")
            lines.append(
                f"| {task.task} ({task.metric}, {task.n:,} questions) | {before} | {value} | {change}{interval} |"
            )
        lines.append("")
    return "\n".join([*lines, "Intervals are 95 %.", "", ""])


def _licence(source: Path) -> str | None:
    """The licence named in the source's own card."""
    card = source / "README.md"
    if not card.is_file():
        return None
    found = re.search(r"\A---\n(?:.*\n)*?license:\s*([\w.-]+)\s*\n", card.read_text(encoding="utf-8", errors="replace"))
    return found.group(1) if found else None
