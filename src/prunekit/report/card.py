"""The model card: `README.md` of an output folder, in the form the hub reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..catalogue import find_method
from ..recipe import Recipe


def model_card(manifest: dict[str, Any], source: Path) -> str:
    """Markdown with the hub's metadata block: base model, licence as the source's own card has it, tags, figures, the command."""
    recipe = Recipe.build(manifest["recipe"])
    method = find_method(recipe.method)
    run = manifest["run"]
    base = recipe.model if re.fullmatch(r"[\w.-]+/[\w.-]+", recipe.model) and not Path(recipe.model).exists() else None
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    front += [f"base_model: {base}", "base_model_relation: finetune"] if base else []
    front += [f"license: {licence}"] if (licence := _licence(source)) else []
    front += ["tags:", "- pruned", "- sparse", f"- {method.name}", "---"]
    errors = [line["output_error"] for line in manifest["linears"] if line["output_error"] is not None]
    name = Path(recipe.model).name
    rows = {
        "method": f"{method.name} ({method.paper})",
        "pattern": str(recipe.target),
        "sparsity (zeros / weights of the block linears)": f"{run['sparsity']:.4f} ({run['zeros']:,} of {run['weights']:,})",
        "parameters": f"{run['parameters']:,}; none removed, shapes are those of the original",
        "calibration": f"{recipe.calibration.source}, {run['windows']} windows, {run['tokens']:,} tokens, seed {recipe.seed}",
        "output error of the linears": f"median {sorted(errors)[len(errors) // 2]:.3f}, largest {max(errors):.3f}"
        if errors
        else "–",
        "reload check": f"logits differ by {manifest['verification']['difference']:.1e} of their norm",
        "made with": ", ".join(f"{library} {version}" for library, version in manifest["versions"].items()),
    }
    table = "\n".join(f"| {left} | {right} |" for left, right in rows.items())
    return "\n".join(front) + (
        f"\n\n# {name}, pruned with {method.name}\n\n"
        f"Made by prunekit. {method.summary} Embeddings, output head, norms and biases are untouched; kept weights are "
        "bit-identical to the original's.\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        "The zeros are stored like any other number: the folder loads with `AutoModelForCausalLM.from_pretrained`, and a dense "
        "runtime is neither faster nor smaller for them.\n\n"
        f"Repeat it with\n\n```\n{recipe.command('OUT')}\n```\n\n"
        "`prunekit.json` holds the whole record: recipe, versions, hashes of inputs and outputs, a line per linear.\n"
    )


def _licence(source: Path) -> str | None:
    """The licence named in the source's own card."""
    card = source / "README.md"
    if not card.is_file():
        return None
    found = re.search(r"\A---\n(?:.*\n)*?license:\s*([\w.-]+)\s*\n", card.read_text(encoding="utf-8", errors="replace"))
    return found.group(1) if found else None
