"""The command line: each verb parses, calls the API, prints. Nothing heavy is imported before a verb needs it.

Results go to stdout, progress and messages to stderr. With `--json` the last line on stdout is one JSON object. Exit codes: 0 done,
2 the input is wrong (one sentence), 130 interrupted, 1 anything else.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from . import __version__
from .catalogue import find_method
from .errors import InputError, PrunekitError, PrunekitWarning
from .progress import is_quiet

app = typer.Typer(
    name="prunekit",
    help="Post-training pruning of large language models: Hugging Face folder in, Hugging Face folder out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _settings(about: str) -> Any:
    return typer.Option("--set", metavar="PART.OPTION=VALUE", help=about)


Length = Annotated[
    int | None, typer.Option(help="Tokens per window. Default: 2048, or the model's maximum where less.")
]
Shape = Annotated[
    str | None, typer.Option(help="uniform: every block as wide (loads anywhere); or free (shrink methods).")
]
Align = Annotated[int | None, typer.Option(help="Channels kept in a block are a multiple of this (shrink methods).")]
Settings = Annotated[list[str] | None, _settings("Set one option; see `prunekit methods NAME`. Repeatable.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model folder brings.")]
Budget = Annotated[
    str | None,
    typer.Option(help="What hidden states, then the reload check, may take, like 4GB. Default: half of what is free."),
]
Runtime = Annotated[
    str,
    typer.Option(
        help="dense; sparse: weights stay packed and a processor multiplies them so; 2:4: on CUDA, sparse tensor cores."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")]


def _recipe(
    model: Annotated[str | None, typer.Argument(help="Folder, hub id, or smollm2-135m.", show_default=False)] = None,
    method: Annotated[
        str | None, typer.Option(help="A row of `prunekit methods`. Default: wanda; with --plan: planned.")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="Fraction of zeros in every linear. Default: 0.5.")] = None,
    pattern: Annotated[
        str | None, typer.Option(help="K:G = keep K of every G consecutive inputs, like 2:4; or a fraction of zeros.")
    ] = None,
    ratio: Annotated[
        float | None,
        typer.Option(help="Fraction of the block parameters to remove (shrink methods). Default: 0.2."),
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="What stays, like the prune_plan.json of an earlier run (method planned)."),
    ] = None,
    shape: Shape = None,
    align: Align = None,
    settings: Settings = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text: file, folder, preset or hf:ID[:split[:field]]. Default: builtin.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Number of calibration windows. Default: 128.")] = None,
    length: Length = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything drawn at random. Default: 0.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16 or float16: of the forward passes. Default: auto.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ... Default: auto.")] = None,
    file: Annotated[
        Path | None, typer.Option("--recipe", help="Recipe file (.toml, .yaml, .json); options win over it.")
    ] = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> Any:
    """The recipe file's values with the command line's laid over them, validated. Its parameters are options of many verbs."""
    from .recipe import Recipe, assign

    values: dict[str, Any] = {} if file is None else Recipe.read(file)
    said = {
        "model": model,
        "method": method,
        "sparsity": sparsity,
        "pattern": pattern,
        "ratio": ratio,
        "plan": plan,
        "seed": seed,
        "dtype": dtype,
        "device": device,
        "revision": revision,
        "trust_remote_code": trust_remote_code or None,
    }
    said = {name: value for name, value in said.items() if value is not None}
    if said.keys() & {"sparsity", "pattern"}:  # one of them on the command line replaces either in the file
        values.pop("sparsity", None)
        values.pop("pattern", None)
    values.update(said)
    values.setdefault("method", "wanda" if values.get("plan") is None else "planned")
    section = values.setdefault("calibration", {})
    if isinstance(section, dict):
        for name, value in (("source", calibration), ("samples", samples), ("length", length)):
            if value is not None:
                section[name] = value
        for setting in _of_shape(shape, align) + (settings or []):
            assign(values, setting)
    return Recipe.build(values)


def _of_shape(shape: str | None, align: int | None) -> list[str]:
    """`--shape` and `--align` as what `--set` says."""
    return [f"budget.{name}={value}" for name, value in (("shape", shape), ("align", align)) if value is not None]


def _what_went(result: Any) -> str:
    """The lines of a run's outcome that say what is gone."""
    zeros = f"{result.zeros:,} zeros of {result.weights:,} weights in {result.blocks} blocks"
    if not result.removed:
        return f"  sparsity    {result.sparsity:.4f}  ({zeros})\n  parameters  {result.parameters:,}, none removed\n"
    before_after = (
        "" if result.channels is None else "  channels    {} -> {}, of the residual stream\n".format(*result.channels)
    )
    return (
        f"{before_after}  parameters  {result.parameters:,} -> {result.parameters - result.removed:,}\n"
        f"  ratio       {result.ratio:.4f}  ({result.block_removed:,} of {result.block_parameters:,} block parameters removed)\n"
    )


def _takes_recipe(
    verb: Callable[..., None], without: Sequence[str] = (), spelt: Mapping[str, str] | None = None
) -> Callable[..., None]:
    """Give a verb the recipe's options, `without` some and others `spelt` its way; its parameter `recipe` receives what they make."""
    shared = [p for name, p in signature(_recipe, eval_str=True).parameters.items() if name not in without]
    shared = [_renamed(p, spelt[p.name]) if spelt and p.name in spelt else p for p in shared]
    own = [parameter for name, parameter in signature(verb, eval_str=True).parameters.items() if name != "recipe"]

    @functools.wraps(verb)
    def command(**given: Any) -> None:
        recipe = _recipe(**{parameter.name: given.pop(parameter.name) for parameter in shared})
        _quiet()
        verb(recipe=recipe, **given)

    parameters = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in (*shared, *own)]
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _renamed(parameter: Parameter, flag: str) -> Parameter:
    """An option under another name."""
    kind, option = get_args(parameter.annotation)
    return parameter.replace(annotation=Annotated[kind, typer.Option(flag, help=option.help)])


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
    verb = context.invoked_subcommand
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if verb is not None and verb != "prune" and processes > 1:
        raise InputError(
            f"'{verb}' does not share its work, and {processes} processes would each do all of it: "
            "start it without torchrun, which is for prune"
        )


@app.command()
@_takes_recipe
def prune(
    recipe: Any,
    out: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    memory_budget: Budget = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue what is in the output folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model in the output folder.")] = False,
    as_json: Json = False,
) -> None:
    """Prune MODEL and write the result to a folder."""
    from . import machine
    from .checkpoint.writer import PAGE_NAME
    from .progress import for_terminal
    from .pruning import run

    budget = None if memory_budget is None else machine.parse_bytes(memory_budget)
    progress = for_terminal()
    try:
        result = run(recipe, out, resume=resume, overwrite=overwrite, memory_budget=budget, progress=progress)
    finally:
        progress.stop()
    summary = result.summary()
    seconds = summary["seconds"]
    _emit(
        as_json,
        summary,
        f"{recipe.model} pruned with {result.method} -> {result.out}\n"
        + _what_went(result)
        + _what_was_searched(result.out)
        + (
            ""
            if result.permuted is None
            else f"  channels    {result.permuted} of {len(result.linears)} linears have their inputs in a new order; what the "
            "others are fed (the residual stream) cannot be reordered for them alone\n"
        )
        + f"  calibration {result.windows} windows, {result.tokens:,} tokens\n"
        f"  time        {seconds['total']:.1f} s: forward {seconds['forward']:.1f}, prune {seconds['prune']:.1f}, "
        + (f"tune {seconds['tune']:.1f}, " if seconds["tune"] else "")
        + f"write {seconds['write']:.1f}, {'checks' if result.removed else 'reload check'} {seconds['verify']:.1f}\n"
        f"  memory      {result.peak_rss_bytes / 1e9:.2f} GB at most\n"
        f"  reloaded    logits differ by {summary['verification']['difference']:.1e} of their norm "
        f"(through {summary['verification']['through']})\n"
        f"  report      {result.out}/{PAGE_NAME}",
    )


def _what_was_searched(out: Path | None) -> str:
    """A line on the search of a finished run; nothing where there was none."""
    from .checkpoint.manifest import read_manifest

    search = None if out is None else (read_manifest(out) or {}).get("search")
    if search is None:
        return ""
    figures = [search["first"], search["best"], *search["held_out"]]
    first, best, *held_out = ("infinite" if figure is None else f"{figure:.2f}" for figure in figures)
    return f"  search      {search['proposed']} candidates: perplexity {first} -> {best}, on text held out {' -> '.join(held_out)}\n"


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder, hub id, or smollm2-135m.")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SRC",
            help="Text: file, folder, preset or hf:ID[:split[:field]]; none for no text. Repeatable. Default: builtin:eval.",
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK",
            help="Multiple choice: a .jsonl file or a folder of them, or a task of lm-evaluation-harness. Repeatable.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="BASE", help="The model it was made from: differences, with 95 % intervals."),
    ] = None,
    length: Length = None,
    samples: Annotated[int | None, typer.Option(help="Use only the first so many windows of each text.")] = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first so many questions of each task.")] = None,
    save: Annotated[
        bool, typer.Option("--save", help="Keep the figures in the model's folder, on its page and its card.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    runtime: Runtime = "dense",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Measure a model: perplexity on texts, accuracy on tasks, and what changed against the model it was made from."""
    _quiet()
    from .api import evaluate as evaluate_model
    from .progress import for_terminal

    if save and not Path(model).is_dir():
        raise InputError(f"--save keeps the figures in the model's folder, and '{model}' is none")
    progress = for_terminal()
    try:
        found = evaluate_model(
            model,
            text=text or "builtin:eval",
            tasks=tasks or (),
            against=against,
            length=length,
            samples=samples,
            limit=limit,
            dtype=dtype,
            device=device,
            runtime=runtime,
            revision=revision,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    finally:
        progress.stop()
    kept = _keep_evaluation(found, Path(model)) if save else ""
    if as_json:
        _emit(True, found.summary(), "")
    else:
        _print_evaluation(found)
        typer.echo(kept, nl=False)


def _keep_evaluation(found: Any, folder: Path) -> str:
    """In the folder, and on its page and card where prunekit wrote the folder."""
    from .api import write_report
    from .checkpoint.manifest import read_manifest

    written = [found.save(folder)]
    if read_manifest(folder) is not None:
        written.append(write_report(folder).page)
    return "".join(f"  written     {path}\n" for path in written)


def _print_evaluation(found: Any) -> None:
    typer.echo(found.model + ("" if found.against is None else f"  against  {found.against}"))
    for row in found.texts:
        typer.echo(
            f"  perplexity  {row.perplexity:.4f}  on {row.text}: {row.windows} windows of {row.length} tokens, "
            f"{row.predictions:,} predictions"
        )
        if row.before is not None:
            low, high = row.ratio_interval
            typer.echo(
                f"  before      {row.before:.4f}: {row.perplexity / row.before:.4f} times as much (95 %: {low:.4f} to {high:.4f}); "
                f"KL {row.kl:.4f} nats per token, {row.top1_changed:.1%} of the likeliest tokens changed"
            )
    if found.tasks:
        _print_tasks(found)
    if found.texts:
        tokens = sum(row.tokens for row in found.texts)
        typer.echo(f"  time        {found.seconds:.1f} s, {tokens / found.seconds:,.0f} tokens/s")


def _print_tasks(found: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    paired = found.against is not None
    table = Table("task", "metric", "n", "value", "± stderr", *["before", "difference", "95 %"] * paired)
    for row in found.tasks:
        cells = [
            row.task,
            row.metric,
            str(row.n),
            f"{row.value:.4f}",
            "" if row.stderr is None else f"{row.stderr:.4f}",
        ]
        if paired:
            interval = row.difference_interval
            cells += [f"{row.before:.4f}", f"{row.value - row.before:+.4f}"]
            cells += ["" if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}"]
        table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else 120).print(table, markup=False)


@app.command()
@_takes_recipe
def plan(
    recipe: Any,
    out: Annotated[Path, typer.Option(help="Folder a run would write.")] = Path(),
    memory_budget: Budget = None,
    as_json: Json = False,
) -> None:
    """Say what pruning would take: memory, disk, time. Starts nothing."""
    from . import machine
    from .api import plan as plan_run
    from .progress import for_terminal

    budget = None if memory_budget is None else machine.parse_bytes(memory_budget)
    made = plan_run(recipe, out, for_terminal(), memory_budget=budget)
    seconds = made.seconds
    _emit(
        as_json,
        made.summary(),
        f"{made.model}: {made.parameters:,} parameters, {made.blocks} blocks, {made.linears} linears with {made.weights:,} weights\n"
        f"  {made.method}: {made.windows} windows of {made.length} tokens in {made.dtype}\n"
        + (
            f"  removes     about {made.removed:,} parameters, {made.ratio:.4f} of those of the blocks; "
            f"{made.parameters - made.removed:,} stay\n"
            if recipe.removes
            else ""
        )
        + "".join(f"  memory {phase:<7} about {size / 1e9:.2f} GB\n" for phase, size in made.memory.items())
        + f"              {made.hidden_states / 1e9:.2f} GB hidden states {'in files' if made.hidden_in_files else 'among it'}; "
        f"{made.memory_available / 1e9:.1f} GB are free\n"
        f"  disk        {made.disk['weights'] / 1e9:.2f} GB, {made.disk['peak'] / 1e9:.2f} GB while it runs; "
        f"{made.disk_available / 1e9:.1f} GB are free\n"
        f"  time        about {seconds['total']:.0f} s: start {seconds['start']:.0f}, forward {seconds['forward']:.0f}, "
        f"prune {seconds['prune']:.0f}, tune {seconds['tune']:.0f}, write {seconds['write']:.0f}, "
        f"reload check {seconds['verify']:.0f}",
    )


def _compare(
    recipe: Any,
    methods: Annotated[
        str, typer.Option(help="Rows of `prunekit methods`, like wanda,ria,wanda+dsnot.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder for the table and the figure.", show_default=False)],
    text: Annotated[str, typer.Option(help="Text perplexity is measured on.")] = "builtin:eval",
    text_samples: Annotated[int | None, typer.Option(help="Use only the first so many windows of it.")] = None,
    as_json: Json = False,
) -> None:
    """Compare methods on one model, measured once: perplexity, zeros, time, mask overlap."""
    from .comparing import compare as compare_recipes
    from .progress import for_terminal
    from .recipe import Recipe

    values = recipe.model_dump(exclude={"method"})
    recipes = [Recipe.build({**values, "method": name.strip()}) for name in methods.split(",")]
    progress = for_terminal()
    try:
        found = compare_recipes(recipes, out, text=text, samples=text_samples, progress=progress)
    finally:
        progress.stop()
    if as_json:
        _emit(True, found.summary(), "")
    else:
        _print_comparison(found, out)


app.command("compare")(_takes_recipe(_compare, without=("method", "ratio", "plan", "shape", "align")))


def _print_comparison(found: Any, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from .report.comparison import MOVED

    names = [row.method for row in found.rows] if found.overlap else []
    title = "last columns: mask overlap" if found.overlap else MOVED
    table = Table("method", "perplexity", "sparsity", "output error", "prune s", *names, title=title)
    for row, overlap in zip(found.rows, found.overlap or [[]] * len(found.rows), strict=True):
        figures = [f"{row.perplexity:.4f}", f"{row.sparsity:.4f}", f"{row.output_error:.4f}", f"{row.seconds:.1f}"]
        table.add_row(row.method, *figures, *[f"{value:.3f}" for value in overlap])
    Console(width=None if sys.stdout.isatty() else 80 + 12 * len(names)).print(table, markup=False)
    seconds = found.seconds
    typer.echo(f"dense       {found.dense:.4f}")
    typer.echo(
        f"time        {seconds['total']:.1f} s: measure {seconds['measure']:.1f} (once), prune {seconds['prune']:.1f}, "
        f"evaluate {seconds['evaluate']:.1f}"
    )
    typer.echo(f"written     {out}/compare.md, compare.json, compare.svg")


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="A method, for its details.", show_default=False)] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print everything as one Markdown page.")] = False,
    as_json: Json = False,
) -> None:
    """List the methods, or describe one; parts are added to a method by name, like wanda+dsnot."""
    if name is not None:
        find_method(name)  # refused before anything heavy is imported
    from .api import addable
    from .api import methods as list_methods
    from .report.methods import REMOVED, measured

    rows = list_methods(name)
    if markdown:
        from .report.methods import as_markdown

        typer.echo(as_markdown(rows, addable()), nl=False)
        return
    if name is None:
        width = max(len(row["name"]) for row in rows)
        text = "\n".join(
            f"{row['name']:<{width}}  {row['kind']:<8}  per {row['group']:<5}  {row['summary']}" for row in rows
        )
        text += "\n\nparts that can be added to any of their kind, like wanda+dsnot:\n" + "\n".join(
            f"{part['name']:<{width}}  {part['to']:<8}  {part['kind']:<11}  {part['summary']}" for part in addable()
        )
        _emit(as_json, rows, text)
        return
    row = rows[0]
    options = "\n".join(f"    --set {option}=...   (default {default!r})" for option, default in row["options"].items())
    _emit(
        as_json,
        row,
        f"{row['name']}: {row['summary']}\n"
        + "".join(f"  {kind:<11} {row[kind]}: {formula}\n" for kind, formula in row["formulas"].items())
        + "".join(f"  note        {note}\n" for note in row["notes"])
        + (
            f"  removes     {REMOVED[row['group']]}\n"
            if row["kind"] == "shrink"
            else f"  compares    weights of the same {row['group']} (a K:G pattern: of the same group of G)\n"
        )
        + (f"  budget      {row['budget']}\n" if row["budget"] else "")
        + f"  measures    {measured(row)}\n"
        + (
            f"  calibration {', '.join(f'{k}={v}' for k, v in row['calibration'].items())}\n"
            if row["calibration"]
            else ""
        )
        + (f"  paper       {row['paper']}\n" if row["paper"] else "")
        + (f"  options\n{options}" if options else ""),
    )


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A model folder.")],
    weight: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="With --plot: the linear to draw, like model.layers.0.mlp.up_proj."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw a weight to this .svg or .png file.")] = None,
    as_json: Json = False,
) -> None:
    """Show what a folder really holds: zeros by block, recipe, whether pattern and hashes are right. Or draw one of its weights."""
    _quiet()
    from .api import draw_weight
    from .api import inspect as inspect_model

    if weight is not None and plot is not None:
        draw_weight(folder, weight, plot)
        _emit(as_json, {"folder": str(folder), "weight": weight, "plot": str(plot)}, f"{weight} of {folder} -> {plot}")
        return
    if weight is not None or plot is not None:
        raise InputError("--weight NAME and --plot FILE go together: which weight is drawn, and where to")
    found = inspect_model(folder)
    if as_json:
        _emit(True, found.summary(), "")
    else:
        _print_inspection(found)
    if not found.sound:
        raise typer.Exit(1)


def _print_inspection(found: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from .model.anatomy import place_of

    blocks: dict[int, dict[str, Any]] = {}
    for linear in found.linears:
        block, name = place_of(linear.name)
        blocks.setdefault(block, {})[name] = linear
    names = list(dict.fromkeys(name for linears in blocks.values() for name in linears))

    def cell(linear: Any) -> str:
        outputs, inputs = linear.shape
        return f"{outputs} x {inputs}" if found.removed else f"{linear.zeros / linear.weights:.3f}"

    title = "outputs x inputs" if found.removed else "zeros / weights"
    table = Table("block", *[name.rsplit(".", 1)[-1] for name in names], title=title)
    for block, linears in blocks.items():
        table.add_row(str(block), *[cell(linears[name]) if name in linears else "" for name in names])
    console = Console(width=None if sys.stdout.isatty() else 30 + 12 * len(names))
    console.print(table)
    typer.echo(f"sparsity    {found.zeros / found.weights:.4f}  ({found.zeros:,} zeros of {found.weights:,} weights)")
    if found.removed:
        typer.echo(f"parameters  {found.parameters:,}, {found.removed:,} fewer than before")
    if found.manifest is None:
        typer.echo("recipe      none: prunekit did not write this folder")
        return
    from .recipe import Recipe

    typer.echo(f"recipe      {Recipe.build(found.manifest['recipe']).command('OUT')}")
    recovery = found.manifest.get("recovery")
    if recovery is not None:
        from .recovery.options import RecoveryOptions

        typer.echo(f"recovery    {RecoveryOptions.of(recovery).command('OUT', 'RECOVERED')}")
    recorded = sum(linear.holds is not None for linear in found.linears)
    broken = (
        f"BROKEN in {', '.join(found.broken)}" if found.broken else f"holds in all {recorded} linears it was asked of"
    )
    if recorded:
        typer.echo(f"pattern     {broken}")
    typer.echo(f"files       {'CHANGED: ' + ', '.join(found.changed) if found.changed else 'all as written (sha256)'}")


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="Folder, plain or packed; hub id; or smollm2-135m.", metavar="DIR")],
    against: Annotated[
        str | None, typer.Option(metavar="BASE", help="Another model, timed in turn with it; ratios are DIR / BASE.")
    ] = None,
    prompt: Annotated[
        int | None, typer.Option(help="Tokens of the prompt. Default: 512, or what the model's positions leave.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to decode behind the first, one by one.")] = 64,
    repetitions: Annotated[int, typer.Option(help="Rounds that count.")] = 5,
    warmup: Annotated[int, typer.Option(help="Rounds before those.")] = 1,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    runtime: Runtime = "dense",
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Measure how fast and how large a model is, and say which runtime would use its zeros."""
    _quiet()
    from .api import bench as bench_model
    from .progress import for_terminal

    progress = for_terminal()
    sizes: dict[str, Any] = {"prompt": prompt, "tokens": tokens, "repetitions": repetitions, "warmup": warmup}
    computing: dict[str, Any] = {"dtype": dtype, "device": device, "runtime": runtime}
    try:
        found = bench_model(
            model, against=against, **sizes, **computing, trust_remote_code=trust_remote_code, progress=progress
        )
    finally:
        progress.stop()
    if as_json:
        _emit(True, found.summary(), "")
    else:
        _print_bench(found)


def _print_bench(found: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    names = [measured.model for measured in found.measured]
    both = len(names) > 1
    table = Table("", *names, *["ratio"] * both)

    def spread(value: Any, form: str) -> str:
        return f"{value.median:{form}} ({value.low:{form}} to {value.high:{form}})"

    for title, figure, form in (
        ("prefill tokens/s", "prefill", ",.1f"),
        ("first token s", "first_token", ".3f"),
        ("decode tokens/s", "decode", ",.1f"),
    ):
        cells = [spread(measured.spread(figure), form) for measured in found.measured]
        table.add_row(title, *cells, *([spread(found.ratio(figure), ".3f")] if both else []))

    def row(title: str, values: list[int], unit: float, form: str) -> None:
        ratio = [f"{values[0] / values[1]:.3f}"] if both else []
        table.add_row(title, *[f"{value / unit:{form}}" for value in values], *ratio)

    prints = [measured.footprint for measured in found.measured]
    row("peak memory MB", [measured.memory.peak for measured in found.measured], 1e6, ",.0f")
    row("  before loading MB", [measured.memory.before for measured in found.measured], 1e6, ",.0f")
    if found.measured[0].memory.device is not None:
        row("peak on device MB", [measured.memory.device for measured in found.measured], 1e6, ",.0f")
    row("weight files MB", [footprint.files for footprint in prints], 1e6, ",.1f")
    row("  through zlib MB", [footprint.zlib for footprint in prints], 1e6, ",.1f")
    row("  as bitmask MB", [footprint.bitmask for footprint in prints], 1e6, ",.1f")
    row("parameters", [footprint.parameters for footprint in prints], 1, ",.0f")
    row("  not zero", [footprint.nonzero for footprint in prints], 1, ",.0f")
    row("MFLOPs a token", [footprint.flops for footprint in prints], 1e6, ",.1f")
    row("  zeros skipped", [footprint.nonzero_flops for footprint in prints], 1e6, ",.1f")
    Console(width=None if sys.stdout.isatty() else 160).print(table, markup=False)
    typer.echo(
        f"measured    {found.dtype} on {found.device}, {found.threads} threads, runtime {found.runtime}; a prompt of "
        f"{found.prompt} tokens, {found.tokens} decoded; median of {len(found.measured[0].rounds)} rounds (lowest to highest), "
        f"in turn, after {found.warmup} to warm up"
    )
    for measured in found.measured:
        typer.echo(f"{measured.model}: {measured.advice}")


Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]
Model = Annotated[str, typer.Argument(help="Folder, plain or packed; hub id; or smollm2-135m.", metavar="DIR")]


@app.command()
def generate(
    model: Model,
    prompt: Annotated[
        str,
        typer.Option(help="The text to go on with; - reads it from stdin, less its last line end.", show_default=False),
    ],
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is what a user says, put into the model's chat template.")
    ] = False,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens at most. Default: 256, or what the model's positions leave.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token every time; above, it is drawn.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest tokens that have this probability together.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this text comes. Repeatable.")
    ] = None,
    runtime: Runtime = "dense",
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Write what comes behind a prompt, as it comes; then say how fast."""
    _quiet()
    from .api import generate as generate_text
    from .progress import for_terminal

    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed, "stop": stop or ()}
    opening: dict[str, Any] = {"runtime": runtime, "dtype": dtype, "device": device, "revision": revision}
    made = generate_text(
        model,
        _from_stdin() if prompt == "-" else prompt,
        chat=chat,
        max_tokens=max_tokens,
        **sampling,
        **opening,
        trust_remote_code=trust_remote_code,
        progress=for_terminal(),
    )
    for piece in made:
        if not as_json:
            typer.echo(piece, nl=False)
    _emit(as_json, made.summary(), "")
    decode = "" if made.decode is None else f", {made.decode:,.1f} tokens/s behind it"
    typer.echo(
        f"  prompt      {made.prompt_tokens} tokens, {made.prefill:,.1f} tokens/s\n"
        f"  generated   {made.tokens} tokens ({made.finish}), the first after {made.first_token_seconds:.3f} s{decode}",
        err=True,
    )


def _from_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as problem:
        raise InputError(f"the prompt on stdin is no UTF-8 at byte {problem.start}") from None


@app.command()
def serve(
    model: Model,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is every one this machine has.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model. Default: the folder's name, or the hub id.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="PRUNEKIT_API_KEY", help="Ask clients for this bearer token.", show_default=False),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens that one request may generate at most.")] = 1024,
    max_request_bytes: Annotated[int, typer.Option(help="Bytes that a request's body may have.")] = 1_000_000,
    queue: Annotated[int, typer.Option(help="Requests that may wait while one is answered; more get status 429.")] = 16,
    grace: Annotated[
        float,
        typer.Option(help="Seconds a running answer has left behind Ctrl-C or SIGTERM; a second one cuts it off."),
    ] = 10.0,
    runtime: Runtime = "dense",
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Answer OpenAI's /v1/completions and /v1/chat/completions with a model, on this machine."""
    _quiet()
    from .api import serve as serve_model
    from .progress import for_terminal

    listening: dict[str, Any] = {"host": host, "port": port, "name": name, "api_key": api_key}
    limits: dict[str, Any] = {
        "max_tokens": max_tokens,
        "max_request_bytes": max_request_bytes,
        "queue": queue,
        "grace": grace,
    }
    opening: dict[str, Any] = {"runtime": runtime, "dtype": dtype, "device": device, "revision": revision}
    serve_model(model, **listening, **limits, **opening, trust_remote_code=trust_remote_code, progress=for_terminal())


@app.command()
def export(
    folder: Annotated[str, typer.Argument(help="Folder, plain or packed; hub id; or smollm2-135m.", metavar="DIR")],
    out: Annotated[Path, typer.Option(help="Folder to write; for gguf the file, NAME.gguf.", show_default=False)],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="bitmask: packed by zeros; zip-free: plain, as transformers loads it; gguf: dense, for llama.cpp.",
        ),
    ] = "zip-free",
    pad: Annotated[
        bool,
        typer.Option(
            "--pad", help="Fill blocks of different widths up with zeros to one, for loaders without code of ours."
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model in the output folder, or the file.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a model's weights in another form, bit for bit."""
    _quiet()
    from .api import export as export_model
    from .progress import for_terminal

    progress = for_terminal()
    try:
        found = export_model(folder, out=out, format=form, pad=pad, overwrite=overwrite, progress=progress)
    finally:
        progress.stop()
    packed = (
        f"  packed      {found.packed} of {found.tensors} tensors, {found.packed_before:,} -> {found.packed_after:,} bytes "
        f"({found.packed_after / found.packed_before:.4f} x)\n"
        if found.packed
        else ""
    )
    _emit(
        as_json,
        found.summary(),
        f"{folder} -> {found.out} ({found.format})\n"
        f"  files       {found.before:,} -> {found.after:,} bytes ({found.after / found.dense:.4f} x the dense tensors)\n"
        f"{packed}  compared    every tensor read again, bit for bit the same",
    )


@app.command()
def recover(
    model: Annotated[str, typer.Argument(help="Folder, plain or packed; hub id; or smollm2-135m.", metavar="DIR")],
    data: Annotated[
        str,
        typer.Option(metavar="SRC", help="Text: file, folder, preset or hf:ID[:split[:field]].", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write.", show_default=False)],
    steps: Annotated[int | None, typer.Option(help="Steps. Default: two times all windows.")] = None,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 8,
    alpha: Annotated[float, typer.Option(help="Their product is multiplied by alpha / rank.")] = 16.0,
    dropout: Annotated[float, typer.Option(help="Share of an adapter's inputs that is left out.")] = 0.05,
    targets: Annotated[
        str | None,
        typer.Option(metavar="GLOB,...", help="Linears to tune, like '*.down_proj'. Default: all of the blocks."),
    ] = None,
    rate: Annotated[float, typer.Option(help="Learning rate behind the warm-up; it falls to 0 linearly.")] = 1e-4,
    warmup: Annotated[
        float | None,
        typer.Option(help="Steps, or below 1 a share of them. Default: 100, at most a tenth.", show_default=False),
    ] = None,
    batch: Annotated[int, typer.Option(help="Windows a step.")] = 64,
    samples: Annotated[
        int | None, typer.Option(help="Windows to train on. Default: all of the text, at most 25600.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    distill: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Learn from this dense model's logits too.")
    ] = None,
    distill_share: Annotated[float, typer.Option(help="What they count for in the loss.")] = 0.5,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Less memory, more time: activations are computed twice.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything drawn at random.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16: of the passes.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    trust_remote_code: Trust = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue what is in the output folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model in the output folder.")] = False,
    as_json: Json = False,
) -> None:
    """Train a pruned model with low-rank adapters, which are merged at the end; zeros stay where they are."""
    _quiet()
    from .api import recover as recover_model
    from .progress import for_terminal

    adapters: dict[str, Any] = {"rank": rank, "alpha": alpha, "dropout": dropout, "checkpointing": checkpointing}
    schedule: dict[str, Any] = {"steps": steps, "rate": rate, "warmup": warmup, "batch": batch}
    text: dict[str, Any] = {"data": data, "samples": samples, "length": length, "seed": seed}
    dense: dict[str, Any] = {"distill": distill, "distill_share": distill_share}
    computing: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    globs = [] if targets is None else [glob.strip() for glob in targets.split(",")]
    options = {**adapters, **schedule, **text, **dense, **computing, "targets": globs}
    progress = for_terminal()
    try:
        found = recover_model(model, out=out, resume=resume, overwrite=overwrite, progress=progress, **options)
    finally:
        progress.stop()
    tenth = max(1, found.steps // 10)
    first, last = (sum(part) / tenth for part in (found.losses[:tenth], found.losses[-tenth:]))
    _emit(
        as_json,
        found.summary(),
        f"{model} recovered -> {found.out}\n"
        f"  trained     {found.trained:,} parameters on {found.linears} linears, {found.masked} of which keep their zeros\n"
        f"  text        {found.windows:,} windows of {found.length} tokens, {found.tokens:,} tokens in {found.steps} steps\n"
        f"  loss        {first:.4f} in the first {tenth} steps, {last:.4f} in the last\n"
        f"  perplexity  {found.before:.4f} -> {found.after:.4f} on {found.held_out} held-out windows\n"
        f"  zeros       {found.zeros:,} of {found.weights:,} block weights\n"
        f"  time        {found.seconds:.1f} s, memory {found.peak_rss_bytes / 1e9:.2f} GB at most\n"
        f"  reloaded    logits differ by {found.verification.difference:.1e} of their norm "
        f"(through {found.verification.through})",
    )


@app.command()
def sweep(
    grid: Annotated[Path, typer.Argument(help="Grid file (.toml, .yaml, .json): a recipe and a section [grid].")],
    out: Annotated[
        Path, typer.Option(help="Folder of the sweep: a folder per run, and the table.", show_default=False)
    ],
    retry: Annotated[bool, typer.Option("--retry", help="Run again what failed before.")] = False,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Run as Ray tasks: local, auto or host:port. Default: in this process."),
    ] = None,
    cpus_per_run: Annotated[
        int | None, typer.Option(help="With --ray: processors of each run. Default: as many as torch uses.")
    ] = None,
    gpus_per_run: Annotated[
        float | None, typer.Option(help="With --ray: accelerators of each run. Default: 1 on cuda, else 0.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Prune by every recipe of a grid, each into its own folder; what is done is skipped."""
    _quiet()
    from .api import sweep as sweep_grid
    from .progress import for_terminal

    progress = for_terminal()
    options: dict[str, Any] = {"ray": ray, "cpus_per_run": cpus_per_run, "gpus_per_run": gpus_per_run}
    try:
        found = sweep_grid(grid, out=out, retry=retry, progress=progress, **options)
    finally:
        progress.stop()
    if as_json:
        _emit(True, found.summary(), "")
    else:
        _print_sweep(found)
    if found.failed:
        raise typer.Exit(1)


def _print_sweep(found: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    evaluated = any(row.get("perplexity") is not None for row in found.rows)
    removed = any(row["ratio"] for row in found.rows)
    zeros = not removed or any(row["sparsity"] for row in found.rows)
    gone = ["sparsity"] * zeros + ["ratio"] * removed
    table = Table("run", "status", *gone, *["perplexity"] * evaluated, "seconds", "memory")
    for row in found.rows:
        figures = [
            *((name, "{:.4f}") for name in gone),
            *[("perplexity", "{:.4f}")] * evaluated,
            ("seconds.total", "{:.1f}"),
        ]
        cells = ["" if row[name] is None else form.format(row[name]) for name, form in figures]
        memory = "" if row["peak_rss_bytes"] is None else f"{row['peak_rss_bytes'] / 1e9:.2f} GB"
        table.add_row(row["name"], row["status"], *cells, memory)
    Console(width=None if sys.stdout.isatty() else 200).print(table, markup=False)
    for row in found.failed:
        typer.echo(f"failed      {row['name']}: {row['error']} ({row['error_kind']})")
    again = "; --retry runs them again" if found.failed else ""
    done, failed = len(found.rows) - len(found.failed), len(found.failed)
    typer.echo(f"runs        {done} done, {failed} failed; {found.skipped} of them before{again}")
    typer.echo(f"table       {found.results}")


@app.command()
def study(
    file: Annotated[Path, typer.Argument(help="Study file (.toml, .yaml, .json): a grid and a section [study].")],
    model: Annotated[
        str | None,
        typer.Option(help="Folder, hub id, or smollm2-135m, in the place of the file's.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results: NAME.json, NAME.md, NAME.svg.")] = Path(
        "docs/results"
    ),
    work: Annotated[
        Path | None, typer.Option(help="Folder of runs and records. Default: .work/NAME in the folder of the results.")
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]SRC",
            help="Calibration text in the place of the file's, or of the one that the file calls NAME. Repeatable.",
        ),
    ] = None,
    text: Annotated[str | None, typer.Option(help="Evaluation text in the place of the file's.")] = None,
    shape: Shape = None,
    align: Align = None,
    settings: Annotated[list[str] | None, _settings("As for prune; also evaluate.OPTION=VALUE. Repeatable.")] = None,
    keep_models: Annotated[
        bool, typer.Option("--keep-models", help="Leave the pruned models in the folder of runs.")
    ] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Run again what failed before.")] = False,
    as_json: Json = False,
) -> None:
    """Measure the table of a study, check what its paper claims, and write JSON, Markdown and a picture."""
    _quiet()
    from .api import study as run
    from .progress import for_terminal

    progress = for_terminal()
    places: dict[str, Any] = {"model": model, "out": out, "work": work, "text": text}
    lists: dict[str, Any] = {"calibration": calibration or [], "settings": _of_shape(shape, align) + (settings or [])}
    try:
        found = run(file, **places, **lists, keep_models=keep_models, retry=retry, progress=progress)
    finally:
        progress.stop()
    page = found.files[1].read_text(encoding="utf-8")
    _emit(as_json, found.summary(), page + "".join(f"\nwritten     {path}" for path in found.files))
    if found.sweep.failed:
        raise typer.Exit(1)


def _tune(
    recipe: Any,
    out: Annotated[Path, typer.Option(help="Folder of the search.", show_default=False)],
    trials: Annotated[int, typer.Option(help="Recipes to try.")] = 50,
    space: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="full, scores, or a file with a section [space].")
    ] = "full",
    presets: Annotated[
        str | None, typer.Option(help="Methods tried as they are first, like wanda,auto. Default: all of the space.")
    ] = None,
    text: Annotated[
        str, typer.Option(metavar="SRC", help="Text recipes are chosen by. Default: the calibration text, other parts.")
    ] = "",
    text_samples: Annotated[int, typer.Option(help="Windows of it.")] = 16,
    test: Annotated[
        str, typer.Option(metavar="SRC", help="Text the best and the presets are compared on in the end.")
    ] = "builtin:eval",
    test_samples: Annotated[int, typer.Option(help="Windows of it.")] = 16,
    workers: Annotated[int, typer.Option(help="Processes that share the search; with --ray tasks.")] = 1,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Try as Ray tasks: local, auto or host:port. Default: in this process."),
    ] = None,
    cpus_per_run: Annotated[
        int | None, typer.Option(help="With --ray: processors of each task. Default: as many as torch uses.")
    ] = None,
    gpus_per_run: Annotated[float | None, typer.Option(help="With --ray: accelerators of each task.")] = None,
    as_json: Json = False,
) -> None:
    """Search for the recipe whose zeros cost least; the same command goes on with what was begun."""
    from .api import tune as search
    from .progress import for_terminal

    values = recipe.model_dump(exclude={"method", "ratio"}, exclude_unset=True)
    values["target_sparsity"] = values.pop("sparsity", None)
    elsewhere: dict[str, Any] = {"ray": ray, "cpus_per_run": cpus_per_run, "gpus_per_run": gpus_per_run}
    texts: dict[str, Any] = {"text": text, "text_samples": text_samples, "test": test, "test_samples": test_samples}
    names = None if presets is None else [name.strip() for name in presets.split(",") if name.strip()]
    asked: dict[str, Any] = {"trials": trials, "space": space, "presets": names}
    progress = for_terminal()
    try:
        found = search(**values, **asked, **texts, **elsewhere, out=out, workers=workers, progress=progress)
    finally:
        progress.stop()
    if as_json:
        _emit(True, found.summary(), "")
    else:
        _print_tuned(found)


app.command("tune")(
    _takes_recipe(_tune, without=("method", "ratio", "plan", "shape", "align"), spelt={"sparsity": "--target-sparsity"})
)


def _print_tuned(found: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from .report.tuned import chosen

    table = Table("recipe", "perplexity", "on the test text", "seconds", "sparsity")
    for name, trial in [("best", found.best), *[(trial.preset, trial) for trial in found.presets]]:
        figures = [
            f"{trial.perplexity:.4f}",
            f"{trial.test_perplexity:.4f}",
            f"{trial.seconds:.1f}",
            f"{trial.sparsity:.4f}",
        ]
        table.add_row(name, *(figures if trial.refused is None else ["refused", "", "", ""]))
    Console(width=None if sys.stdout.isatty() else 120).print(table, markup=False)
    typer.echo(f"dense       {found.dense[0]:.4f}, {found.dense[1]:.4f} on the test text")
    typer.echo(f"best        {', '.join(chosen(found.best.point))}")
    for trial in found.front:
        typer.echo(f"front       {trial.perplexity:.4f} in {trial.seconds:.1f} s: {', '.join(chosen(trial.point))}")
    shares = [f"{name} {share:.0%}" for name, share in found.importance.items()]
    typer.echo(f"importance  {', '.join(shares) or 'too few trials, or too equal ones, to say'}")
    refused = sum(trial.refused is not None for trial in found.trials)
    typer.echo(f"trials      {len(found.trials)}, {refused} refused; {found.seconds:.0f} s")
    typer.echo(f"written     {found.out}/recipe.toml, tune.md, trials.jsonl, history.svg, front.svg")


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Output folders of runs or sweeps.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page. Default: DIR/report.html, of one DIR.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the page of a finished run anew, with its evaluation; or one page that compares several runs."""
    _quiet()
    from .api import write_report

    found = write_report(folders, out=out)
    card = {
        None: "",
        "written": "\ncard        written anew",
        "kept": "\ncard        left as it is: somebody has edited README.md",
    }[found.card]
    _emit(as_json, found.summary(), f"page        {found.page}, {found.runs} run{'s' * (found.runs > 1)}{card}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `prunekit prune` left.")],
    repo: Annotated[str, typer.Argument(metavar="REPO_ID", help="name or owner/name; made where it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make it private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; made where it is not there. Default: main.")] = None,
    as_json: Json = False,
) -> None:
    """Check a finished folder and upload it to the hub."""
    _quiet()
    from .api import push as upload
    from .progress import for_terminal

    progress = for_terminal()
    try:
        address = upload(folder, repo, private=private, revision=revision, progress=progress)
    finally:
        progress.stop()
    _emit(as_json, {"folder": str(folder), "repo": repo, "commit": address}, f"pushed      {address}")


def _emit(as_json: bool, summary: Any, text: str) -> None:
    if not is_quiet():
        typer.echo(json.dumps(summary, ensure_ascii=False) if as_json else text)


def _quiet() -> None:
    """Keep transformers' own bars and hints off the terminal; prunekit says what matters."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()


def _interrupt(*_: object) -> None:
    """Being told to stop ends a run as Ctrl-C does: what is being written is finished, and the run can be resumed."""
    raise KeyboardInterrupt


def _said(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """A warning as it is printed: of ours nobody wants to know which line of code gave it."""
    if issubclass(category, PrunekitWarning):
        return f"prunekit: {message}\n"
    return _spelt(message, category, filename, lineno, line)


_spelt = warnings.formatwarning


def main() -> None:
    """Entry point: turns errors into one sentence and an exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    warnings.formatwarning = _said
    try:
        app()
    except PrunekitError as problem:
        if not is_quiet():
            typer.echo(f"prunekit: {problem}", err=True)
        sys.exit(problem.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        warnings.formatwarning = _spelt
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the end is near anyway; a signal now would be a traceback
