"""The public functions: prune a folder or a model in memory, evaluate, plan, inspect, report, export, load, time, push, list methods.

Each takes plain arguments, builds a `Recipe`, and calls the room that does the work. The command line is a thin layer over these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import pruning
from .binding import Bound
from .calibration.windows import recipe_windows, window_length
from .catalogue import METHODS, PARTS, UNIT_PARTS, Method, find_method
from .checkpoint.locate import locate
from .errors import InputError, nearest
from .evaluating import Evaluation, Opened
from .evaluating import evaluate as run_evaluation
from .inspection import Inspection, inspect_folder, read_weight
from .model.anatomy import read_anatomy
from .model.source import ResidentModel
from .model.stream import Windows
from .parts import find_part
from .planning import Plan, make_plan
from .progress import Progress, Silent
from .pruning import Result
from .recipe import Recipe
from .shrink.given import given_plan
from .shrink.masking import masked as masked_blocks
from .shrink.shrinker import Shrinker
from .shrink.slicewalk import bound_width
from .sparsify.budget import Budget
from .sparsify.linear import Sparsifier

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .benching import Bench
    from .comparing import Comparison
    from .exporting import Export
    from .generation.engine import Generation
    from .recovering import Recovery
    from .reporting import Report
    from .studying import Findings
    from .sweeping import Sweep
    from .tuning import Tuned

__all__ = [
    "Evaluation",
    "Inspection",
    "Plan",
    "Result",
    "bench",
    "compare",
    "draw_weight",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "load",
    "masked",
    "methods",
    "plan",
    "prune",
    "prune_",
    "push",
    "recover",
    "serve",
    "study",
    "sweep",
    "tune",
    "write_report",
]


def prune(
    model: str | Path,
    *,
    out: str | Path,
    method: str | None = None,
    sparsity: float | None = None,
    pattern: str | None = None,
    ratio: float | None = None,
    plan: str | Path | None = None,
    calibration: str | Mapping[str, Any] = "builtin",
    resume: bool = False,
    overwrite: bool = False,
    memory_budget: int | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Result:
    """Prune a model folder and write another.

    Args:
        model: a folder, a hub id, or `smollm2-135m`.
        out: the folder to write; it must be empty or new unless `resume` or `overwrite` is given.
        method: a row of `methods()`; `wanda` where none is given, or with a plan `planned`.
        sparsity: fraction of zeros in every linear; half where neither this nor `pattern` is given.
        pattern: `"K:G"`, keep K of every G consecutive inputs, or a fraction of zeros.
        ratio: of a method that removes structures, the fraction of the block parameters to remove; a fifth where it is not given.
        plan: a JSON file that says what stays, like the `prune_plan.json` of an earlier run; for `planned`, which may compensate.
        calibration: a text source, or a mapping of `Calibration` fields (`source`, `samples`, `length`, `sampling`, `mode`, `batch`).
        resume: continue what is in `out`.
        overwrite: replace what is in `out`.
        memory_budget: bytes the hidden states may take in memory, those that a method keeps besides as many again, and later the whole
            model for the reload check; beyond, the ones go to files in `out` and the other is streamed. Default: half of what is free.
        progress: told what is going on; silent by default.
        **settings: the recipe's other fields: `seed`, `dtype`, `device`, `revision`, `trust_remote_code`, `parts`.

    Returns:
        What was done, figures included.

    Raises:
        InputError: something in the input is wrong; nothing of this run is left in `out`.
        StorageError: the disk refused; finished blocks can be resumed.
        VerificationError: what was written does not compute what was pruned.
    """
    method = method or ("wanda" if plan is None else "planned")
    recipe = Recipe.build(
        {"model": str(model), "method": method, "sparsity": sparsity, "pattern": pattern, "ratio": ratio}
        | {"plan": None if plan is None else str(plan), "calibration": _calibration(calibration)}
        | settings
    )
    return pruning.run(
        recipe, Path(out), resume=resume, overwrite=overwrite, memory_budget=memory_budget, progress=progress
    )


def prune_(
    model: PreTrainedModel,
    tokens: Any,
    *,
    method: str = "wanda",
    sparsity: float | None = None,
    pattern: str | None = None,
    ratio: float | None = None,
    calibration: str | Mapping[str, Any] = "builtin",
    seed: int = 0,
    parts: Mapping[str, dict[str, Any]] | None = None,
    progress: Progress | None = None,
) -> Result:
    """Prune a model that lies in memory, in place, in its own dtype and on its own device.

    A method that removes structures works on copies of blocks and puts aside what changes. When the last block is done, the model's own
    modules are given that: smaller parameters, new ones wherever anything changed (make optimisers afterwards), and a new config. Where
    `prune` would save another class (Mistral's for some widths of a Llama), they become modules of that class. Where blocks have
    different widths, the config notes them, and a folder written by `save_pretrained` is for `prunekit.load`.

    Args:
        model: a causal language model of transformers.
        tokens: a tokenizer (windows are then cut from `calibration`); or token ids [windows, length]; or a mapping with `input_ids`
            and `attention_mask` (1 = a real token), both [windows, length]; or `Windows`.
        method, sparsity, pattern, ratio, calibration, seed, parts, progress: as for `prune`.

    Raises:
        InputError: something in the input is wrong. Where weights are zeroed, blocks before the one named may be pruned already; where
            structures are removed, the model is as it was.
        VerificationError: a block without its removed units computes something else; the model is as it was.
    """
    recipe = Recipe.build(
        {"model": "in memory", "method": method, "sparsity": sparsity, "pattern": pattern, "ratio": ratio}
        | {"calibration": _calibration(calibration), "seed": seed, "parts": dict(parts or {})}
    )
    return pruning.prune_in_memory(model, recipe, _windows(model, tokens, recipe), progress)


def evaluate(
    model: str | Path | PreTrainedModel,
    *,
    text: str | Sequence[str] = "builtin:eval",
    tasks: str | Sequence[str] = (),
    against: str | Path | None = None,
    length: int | None = None,
    samples: int | None = None,
    limit: int | None = None,
    tokenizer: Any = None,
    dtype: str = "auto",
    device: str = "auto",
    runtime: str = "dense",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity of a model on texts, a block in memory at a time, and its accuracy on tasks, the whole model in memory.

    Args:
        model: a folder, a hub id, `smollm2-135m`, or a model in memory (then `tokenizer` is needed).
        text: a text source, or several; `none` for none.
        tasks: multiple-choice files (`.jsonl`, see `prunekit.evaluation.tasks`) or folders of them; tasks of lm-evaluation-harness by
            name, or its task files (`.yaml`), which need `prunekit[eval]`.
        against: the model this one was made from: the same windows and questions are asked of both, and differences have intervals.
        length: tokens per window; 2048 or the model's maximum by default.
        samples: use only the first so many windows of each text.
        limit: use only the first so many questions of each task.
        tokenizer: for a model in memory.
        dtype, device, revision, trust_remote_code: as for `prune`; a model in memory keeps its own dtype and device.
        runtime: as for `load`; of `model`, not of the other. Any but `dense` has the whole model in memory for texts, too.
        progress: told what is going on; silent by default.

    Raises:
        InputError: something in the input is wrong.
    """
    progress = progress or Silent()
    opening: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    if isinstance(model, (str, Path)):
        opened = Opened.folder_of(str(model), **opening, runtime=runtime, revision=revision, progress=progress)
    elif tokenizer is None:
        raise InputError("a model in memory is evaluated with tokenizer=...: give the one that belongs to it")
    else:
        opened = Opened(type(model).__name__, ResidentModel(model, packed=True), tokenizer)
    base = None
    if against is not None:
        base = Opened.folder_of(str(against), **opening, revision=None, progress=progress)
    return run_evaluation(
        opened,
        base,
        texts=[text] if isinstance(text, str) else list(text),
        tasks=[tasks] if isinstance(tasks, str) else list(tasks),
        length=length,
        samples=samples,
        limit=limit,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )


def plan(
    recipe: Recipe, out: str | Path = ".", progress: Progress | None = None, *, memory_budget: int | None = None
) -> Plan:
    """What pruning by this recipe would take: memory, disk, time. Starts nothing. Raises `InputError`."""
    return make_plan(recipe, Path(out), progress or Silent(), memory_budget)


def compare(
    model: str | Path,
    methods: Sequence[str],
    *,
    out: str | Path,
    sparsity: float | None = None,
    pattern: str | None = None,
    calibration: str | Mapping[str, Any] = "builtin",
    text: str = "builtin:eval",
    text_samples: int | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Comparison:
    """Several methods on one model, measured once: perplexity, zeros, time, and how far their masks agree.

    Statistics are those of the dense model, so that all methods share them; figures differ from those of `prune`, where each block's
    inputs come from the pruned blocks before it.

    Args:
        model: a folder, a hub id, or `smollm2-135m`.
        methods: rows of `methods()`, with parts added by `+`.
        out: folder for `compare.json`, `compare.md` and `compare.svg`; needs `prunekit[plots]`.
        sparsity, pattern, calibration: as for `prune`.
        text, text_samples: what perplexity is measured on, in windows as long as those of the calibration, and how many.
        progress: told what is going on; silent by default.
        **settings: the recipe's other fields.

    Raises:
        InputError: something in the input is wrong; nothing was written.
    """
    from .comparing import compare as compare_recipes

    if not methods:
        raise InputError("no method is named: --methods magnitude,wanda,ria")
    shared = {"model": str(model), "sparsity": sparsity, "pattern": pattern, "calibration": _calibration(calibration)}
    recipes = [Recipe.build({**shared, **settings, "method": method}) for method in methods]
    return compare_recipes(recipes, Path(out), text=text, samples=text_samples, progress=progress)


def sweep(
    grid: str | Path | Mapping[str, Any],
    *,
    out: str | Path,
    retry: bool = False,
    ray: str | None = None,
    cpus_per_run: int | None = None,
    gpus_per_run: float | None = None,
    progress: Progress | None = None,
) -> Sweep:
    """Prune by every recipe of a grid, each into a folder of its own; what is done already is skipped.

    A run that fails does not end the sweep: it is recorded with its reason, and later calls leave it alone unless `retry` is given.
    An interrupted sweep is continued by the same call.

    Args:
        grid: a grid file (TOML, YAML, JSON), or what it would hold: a recipe's values, axes under `grid`, options under `evaluate`.
        out: the folder of the sweep: a model folder per run, `runs/` with their records, and the table `results.jsonl`, with pyarrow
            also `results.parquet`.
        retry: run again what failed before.
        ray: carry the runs out as Ray tasks: `local`, `auto` or `host:port`. Needs `prunekit[ray]`. Default: one after the other here.
        cpus_per_run: with `ray`, processors and threads of each run; torch's number of threads by default.
        gpus_per_run: with `ray`, accelerators of each run; by default 1 where it runs on cuda, else 0.
        progress: told what is going on; silent by default.

    Returns:
        The table's rows and how many of them were skipped.

    Raises:
        InputError: the grid is wrong (nothing was run), or Ray cannot be used.
        StorageError: the disk refused a record or the table.
    """
    from .grid import Grid
    from .sweeping import run_grid  # above this module: a sweep evaluates by `evaluate`

    progress = progress or Silent()
    executor = None
    if ray is not None:
        from .on_ray import ray_executor

        executor = ray_executor(ray, cpus=cpus_per_run, gpus=gpus_per_run, progress=progress)
    elif cpus_per_run is not None or gpus_per_run is not None:
        raise InputError("--cpus-per-run and --gpus-per-run are what a Ray task declares: give --ray ADDRESS too")
    made = Grid.build(grid) if isinstance(grid, Mapping) else Grid.read(Path(grid).expanduser())
    return run_grid(made, Path(out), retry=retry, executor=executor, progress=progress)


def study(
    file: str | Path,
    *,
    model: str | Path | None = None,
    out: str | Path = "docs/results",
    work: str | Path | None = None,
    calibration: Sequence[str] = (),
    text: str | None = None,
    settings: Sequence[str] = (),
    retry: bool = False,
    keep_models: bool = False,
    progress: Progress | None = None,
) -> Findings:
    """Run a study: a grid whose perplexities make one table, written as JSON, Markdown and a picture, with the paper's claims checked.

    An interrupted study is continued by the same call, and a finished one runs nothing again.

    Args:
        file: a grid file (TOML, YAML, JSON) with a section `study`; see `prunekit.studies`.
        model: takes the place of the file's.
        out: the folder of the results, which are named after the file.
        work: the folder of runs and records; by default `.work/NAME` in `out`.
        calibration: a text source takes the place of the file's; `NAME=SOURCE` says where a text lies that the file calls NAME.
        text: takes the place of the evaluation text.
        settings: `part.option=value` as of `--set`, or `evaluate.option=value`.
        retry: run again what failed before.
        keep_models: leave the pruned models in `work`; otherwise each is removed once it is evaluated.
        progress: told what is going on; silent by default.

    Raises:
        InputError: the study is wrong (nothing was run), or there is no matplotlib.
        StorageError: the disk refused a record or a result.
    """
    from .studies import read_study
    from .studying import run_study

    options = {"model": None if model is None else str(model), "text": text}
    made = read_study(Path(file), calibration=calibration, settings=settings, **options)
    words = ["prunekit", "study", str(file)]
    given = [("--model", [model] if model is not None else []), ("--calibration", calibration)]
    given += [("--text", [text] if text is not None else []), ("--set", settings)]
    words += [str(part) for name, values in given for value in values for part in (name, value)]
    words += [] if str(out) == "docs/results" else ["--out", str(out)]
    return run_study(
        made,
        Path(out),
        work=None if work is None else Path(work),
        retry=retry,
        keep_models=keep_models,
        words=words,
        progress=progress or Silent(),
    )


def tune(
    model: str | Path,
    *,
    out: str | Path,
    target_sparsity: float | None = None,
    pattern: str | None = None,
    trials: int = 50,
    space: str | Mapping[str, Any] = "full",
    presets: Sequence[str] | None = None,
    calibration: str | Mapping[str, Any] = "builtin",
    text: str = "",
    text_samples: int = 16,
    test: str = "builtin:eval",
    test_samples: int = 16,
    workers: int = 1,
    ray: str | None = None,
    cpus_per_run: int | None = None,
    gpus_per_run: float | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Tuned:
    """Search for the recipe whose zeros cost least perplexity; the same call goes on with what was begun.

    Args:
        model: a folder, a hub id, or `smollm2-135m`.
        out: the folder of the search: `recipe.toml` is the best recipe, `tune.md` the page.
        target_sparsity: fraction of zeros in every linear; half where neither this nor `pattern` is given.
        pattern: `"K:G"` in its place.
        trials: how many recipes are tried.
        space: `full`, `scores`, a file with a section [space], or that section; see `prunekit.search.recipes`.
        presets: methods that are tried as they are, before anything is drawn; by default all of the space.
        calibration: as for `prune`.
        text, text_samples: what recipes are chosen by, and how many windows of it; by default parts of the calibration text that no
            calibration window touches.
        test, test_samples: what the best is compared with the presets on, when the search is over.
        workers: processes that share the search; one by default, and only then do equal seeds make equal trials.
        ray, cpus_per_run, gpus_per_run: as for `sweep`; `workers` is then how many tasks there are.
        progress: told what is going on; silent by default.
        **settings: the recipe's other fields: `seed`, `dtype`, `device`, `revision`, `trust_remote_code`, `parts`.

    Raises:
        InputError: something in the input is wrong, texts that share passages among it; nothing was written.
        HistoryError: `out` holds another search, or a damaged one; nothing was changed.
        StorageError: the disk refused a result.
    """
    from .search.recipes import RecipeSpace, section_of
    from .tuning import Tuning, tune_recipes

    base = {"model": str(model), "sparsity": target_sparsity, "pattern": pattern}
    base = {name: value for name, value in base.items() if value is not None}
    given = section_of(space)
    made = Tuning(
        {**base, "calibration": _calibration(calibration), **settings},
        given,
        trials,
        tuple(RecipeSpace.of(given).methods if presets is None else presets),
        text,
        text_samples,
        test,
        test_samples,
    )
    elsewhere = None
    if ray is not None:
        from .on_ray import ray_workers

        options: dict[str, Any] = {"cpus": cpus_per_run, "gpus": gpus_per_run, "progress": progress}
        elsewhere = ray_workers(ray, made.recipe, Path(out), workers=workers if workers > 1 else None, **options)
    elif cpus_per_run is not None or gpus_per_run is not None:
        raise InputError("--cpus-per-run and --gpus-per-run are what a Ray task declares: give --ray ADDRESS too")
    return tune_recipes(made, Path(out), workers=workers, run_elsewhere=elsewhere, progress=progress)


def write_report(folders: str | Path | Sequence[str | Path], *, out: str | Path | None = None) -> Report:
    """Write the page of a finished run anew, with what `evaluation.json` beside it says; or one page that compares several runs.

    With the page of one run the model card is written too, its metadata with the evaluation's figures, unless somebody has edited it.

    Args:
        folders: an output folder, or several, of runs and of sweeps; a sweep stands for all its runs.
        out: the page; by default `report.html` in the folder, where there is one only.

    Raises:
        InputError: a folder is of no finished run, or it is not said where the page goes.
        StorageError: the disk refused the page.
    """
    from .reporting import make_report

    given = [folders] if isinstance(folders, (str, Path)) else folders
    return make_report([Path(folder) for folder in given], None if out is None else Path(out))


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    progress: Progress | None = None,
) -> str:
    """Upload a finished output folder to the hub, after its patterns and hashes were checked; returns the commit's address.

    Uploaded is what the run wrote and its manifest lists, the card, the page and the evaluation; no other file.

    Args:
        folder: what `prune` left.
        repo: `name` or `owner/name`; made where it is not there.
        private: make it private; one that is there stays as it is.
        revision: the branch, made where it is not there; the main one by default.
        token: by default the one that `hf auth login` or HF_TOKEN left.
        endpoint: address of the hub.
        progress: told what is going on; silent by default.

    Raises:
        InputError: the folder is unfinished or has changed, or the hub refuses name, token or right.
        PrunekitError: the hub cannot be reached, or failed.
    """
    from .publishing import upload

    progress = progress or Silent()
    return upload(
        Path(folder), repo, private=private, revision=revision, token=token, endpoint=endpoint, progress=progress
    )


def draw_weight(folder: str | Path, weight: str, path: str | Path) -> None:
    """Draw a linear's weight as a heat map with the norms of its rows and columns, to a `.svg` or `.png` file.

    Args:
        folder: a model folder, a hub id, or `smollm2-135m`.
        weight: the linear's name, like `model.layers.0.self_attn.q_proj`.
        path: the picture.

    Raises:
        InputError: there is no such linear, or no matplotlib.
        StorageError: the disk refused the picture.
    """
    from .report.plots import check_drawable, draw_weight

    check_drawable(Path(path))
    draw_weight(read_weight(locate(str(folder)), weight), weight, Path(path))


def inspect(folder: str | Path) -> Inspection:
    """What a model folder holds: zeros by linear, the recipe it was made by, whether its pattern and hashes are right.

    Raises `InputError` where it is no model folder.
    """
    return inspect_folder(locate(str(folder)))


def load(
    folder: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    runtime: str = "dense",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """The transformers model of a folder, in eval mode; also of a packed one (`export(format="bitmask")`), which only prunekit reads.

    Args:
        folder: a folder, a hub id, or `smollm2-135m`.
        dtype: `auto` (bfloat16 where the hardware multiplies it, else float32), `float32`, `bfloat16` or `float16`.
        device: `auto`, `cpu`, `cuda`, ...
        runtime: `dense`; `sparse`, where the weights of the blocks stay packed in memory and a processor multiplies them so; or `2:4`,
            which puts 2:4 weights on a CUDA device into the form its sparse tensor cores multiply. See docs/faster.md.
        revision, trust_remote_code: as for `prune`.
        progress: told what is going on; silent by default.

    Raises:
        InputError: the folder is no whole model, does not fit into memory, or is not for the runtime.
    """
    from .loading import load_model

    place = locate(str(folder), revision=revision, trust_remote_code=trust_remote_code, progress=progress)
    return load_model(place, dtype=dtype, device=device, runtime=runtime, trust_remote_code=trust_remote_code)


def generate(
    model: str | Path,
    prompt: str,
    *,
    chat: bool = False,
    max_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = 0,
    stop: str | Sequence[str] = (),
    runtime: str = "dense",
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Generation:
    """What a model writes behind a prompt, streamed: iterate over the result for pieces of text as they come; figures are there behind.

    Args:
        model: a folder, plain or packed; a hub id; or `smollm2-135m`.
        prompt: the text to go on with; with `chat` what a user says to the assistant.
        chat: put the prompt into the model's chat template.
        max_tokens: to generate at most; 256, or what the model's positions leave.
        temperature: 0 takes the likeliest token every time; above, tokens are drawn.
        top_p: only the likeliest tokens that together have this probability are drawn.
        seed: of the draws; None draws differently every time.
        stop: a string that ends the text, or several; it is not part of the text.
        runtime, dtype, device, revision, trust_remote_code: as for `load`.
        progress: told what is going on; silent by default.

    Raises:
        InputError: something in the input is wrong, or `chat` is asked of a model without a template.
    """
    from .generating import generate_text, open_engine
    from .generation.sampling import Sampling

    sampling = Sampling.build(
        {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        | {"stop": (stop,) if isinstance(stop, str) else tuple(stop)}
    )
    engine = open_engine(
        str(model),
        dtype=dtype,
        device=device,
        runtime=runtime,
        revision=revision,
        trust_remote_code=trust_remote_code,
        progress=progress,
        chat=chat,
    )
    return generate_text(engine, prompt, sampling, chat=chat)


def serve(
    model: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    api_key: str | None = None,
    max_tokens: int = 1024,
    max_request_bytes: int = 1_000_000,
    queue: int = 16,
    grace: float = 10.0,
    runtime: str = "dense",
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> None:
    """Answer OpenAI's `/v1/completions` and `/v1/chat/completions` with a model, until SIGINT or SIGTERM. Needs `prunekit[serve]`.

    Args:
        model: a folder, plain or packed; a hub id; or `smollm2-135m`.
        host, port: where to listen; port 0 takes a free one, which `progress` is told.
        name: what clients call the model; by default the folder's name or the hub id.
        api_key: what clients must send as a bearer token; by default nobody is asked.
        max_tokens: that one request may generate at most.
        max_request_bytes: of a request's body.
        queue: requests that may wait while one is answered; more are refused with status 429.
        grace: seconds that the request being answered has left after the first signal.
        runtime, dtype, device, revision, trust_remote_code: as for `generate`.
        progress: told of the address, then of every request; silent by default.

    Raises:
        InputError: something in the input is wrong, or FastAPI or uvicorn is not installed.
        KeyboardInterrupt: a request was cut off, by a second signal or when its grace was over.
    """
    from .serving import Limits, serve_model

    limits = Limits.build(
        {"max_tokens": max_tokens, "max_request_bytes": max_request_bytes, "queue": queue, "grace": grace}
    )
    serve_model(
        str(model),
        host=host,
        port=port,
        name=name,
        api_key=api_key,
        limits=limits,
        opening={
            "dtype": dtype,
            "device": device,
            "runtime": runtime,
            "revision": revision,
            "trust_remote_code": trust_remote_code,
        },
        progress=progress or Silent(),
    )


def export(
    folder: str | Path,
    *,
    out: str | Path,
    format: str = "zip-free",
    pad: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Export:
    """Write a model's weights in another form, bit for bit; what was written is read again and compared.

    Args:
        folder: a folder, plain or packed; a hub id; or `smollm2-135m`.
        out: the folder to write, which must be empty or new unless `overwrite` is given; for `gguf` the file, `NAME.gguf`.
        format: `bitmask`, weights packed by their zeros (docs/bitmask.md); `zip-free`, the plain folder that transformers loads; or
            `gguf`, the dense file llama.cpp reads (Llama and Qwen2; needs `prunekit[embedded]`).
        pad: give blocks of different widths (`--shape free`) one, with zeros that change no logits, so that the model's own class
            loads them without code from the folder; plain only.
        overwrite: replace what is in `out`.
        progress: told what is going on; silent by default.

    Raises:
        InputError: something in the input is wrong; nothing was written.
        StorageError: the disk refused; what was written is removed.
        VerificationError: what was written does not hold the same bits; it is removed.
    """
    from .exporting import FORMATS, Form, export_folder
    from .to_gguf import export_gguf

    if format not in FORMATS:
        raise InputError(f"format '{format}' is unknown: {nearest(format, FORMATS)}")
    if pad and format != "zip-free":
        raise InputError(f"--pad writes a plain folder: leave out --format {format}, and export what --pad wrote")
    place = locate(str(folder), progress=progress)
    if format == "gguf":
        return export_gguf(place, Path(out), overwrite=overwrite, progress=progress)
    form: Form = "padded" if pad else "bitmask" if format == "bitmask" else "zip-free"
    return export_folder(place, Path(out), form=form, overwrite=overwrite, progress=progress)


def recover(
    model: str | Path,
    *,
    data: str,
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Recovery:
    """Train a pruned model with low-rank adapters (LoRA, by peft) and write the folder with them merged; zeros stay where they are.

    Defaults are those of LLM-Pruner. What was trained is what is written: zeros of every pruned linear and logits are compared before
    the run is called done.

    Args:
        model: a folder, plain or packed; a hub id; or `smollm2-135m`.
        data: the text to train on, as for `calibration`; a tenth of its windows, at most 32, is held out and measured.
        out: the folder to write; it must be empty or new unless `resume` or `overwrite` is given.
        resume: continue what is in `out`.
        overwrite: replace what is in `out`.
        progress: told what is going on; silent by default.
        **options: `steps`, `rank` (8), `alpha` (16), `dropout` (0.05), `targets` (globs of linears; all of the blocks), `rate` (1e-4),
            `warmup` (steps, or a share below 1), `batch` (64 windows a step), `samples` (windows to train on), `length` (256),
            `distill` (a dense model to learn from), `distill_share` (0.5, what its divergence counts for), `checkpointing`, `seed`,
            `dtype`, `device`, `trust_remote_code`.

    Returns:
        What was done, with the loss of every step and held-out perplexities.

    Raises:
        InputError: something in the input is wrong, or peft is not installed; nothing of this run is left in `out`.
        StorageError: the disk refused; the last state that was saved can be resumed.
        VerificationError: what was written is not what was trained, or has other zeros.
    """
    from .recovering import recover_folder
    from .recovery.options import RecoveryOptions

    made = RecoveryOptions.build({"data": str(data), **options})
    progress = progress or Silent()
    place = locate(str(model), trust_remote_code=made.trust_remote_code, progress=progress)
    return recover_folder(place, Path(out), made, resume=resume, overwrite=overwrite, progress=progress)


def bench(
    model: str | Path,
    *,
    against: str | Path | None = None,
    prompt: int | None = None,
    tokens: int = 64,
    repetitions: int = 5,
    warmup: int = 1,
    dtype: str = "auto",
    device: str = "auto",
    runtime: str = "dense",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Bench:
    """How fast and how large a model is, one prompt at a time; with `against`, next to another, timed in turn with it.

    Args:
        model: a folder, plain or packed; a hub id; or `smollm2-135m`.
        against: another one.
        prompt: tokens of the prompt; 512, or what the model's positions leave.
        tokens: to decode behind the first, one by one.
        repetitions: rounds that count.
        warmup: rounds before those.
        dtype, device, trust_remote_code: as for `load`.
        runtime: as for `load`; of `model`, not of the other.
        progress: told what is going on; silent by default.

    Raises:
        InputError: something in the input is wrong.
    """
    from .benching import bench_folders

    names = [str(name) for name in (model, against) if name is not None]
    folders = [(name, locate(name, trust_remote_code=trust_remote_code, progress=progress)) for name in names]
    return bench_folders(
        folders,
        prompt=prompt,
        tokens=tokens,
        repetitions=repetitions,
        warmup=warmup,
        dtype=dtype,
        device=device,
        runtime=runtime,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )


@contextmanager
def masked(model: PreTrainedModel, plan: str | Path | Mapping[str, Any]) -> Iterator[None]:
    """Let a model in memory compute as if a plan had been carried out, generation with a cache included.

        with prunekit.masked(model, "smaller/prune_plan.json"):
            loss = model(ids, labels=ids).loss

    What would go is zeroed on its way; no weight is touched or copied, and the logits are those of the smaller model to rounding (of
    one that was cut alone: a plan does not hold what a compensation changed). It takes as long as the whole model.

    Args:
        model: a causal language model.
        plan: a JSON file like the `prune_plan.json` of a run, or what one holds.

    Raises:
        InputError: the plan cannot be read, or it is the plan of another model.
    """
    anatomy = read_anatomy(model)
    given, structures = given_plan(model, anatomy, plan if isinstance(plan, Mapping) else Path(plan).expanduser())
    with masked_blocks(model, anatomy, structures, given):
        yield


def methods(name: str | None = None) -> list[dict[str, Any]]:
    """The catalogue, one mapping a method, or the one called `name`: parts, group, what is measured, options, paper."""
    rows = [find_method(name)] if name is not None else list(METHODS.values())
    listed = []
    for row in rows:
        parts, budget, more = _parts_of(row)
        options: dict[str, Any] = {}
        for bound in parts:
            options |= {f"{bound.part.word}.{name}": value for name, value in bound.options.items()}
        options |= {f"budget.{name}": value for name, value in budget.options.items()} if budget else {}
        options |= more
        listed.append(
            {
                "name": row.name,
                "kind": row.kind,
                "summary": row.summary,
                "score": row.score,
                "refine": row.refine,
                "reconstruct": row.reconstruct,
                "tune": row.tune,
                "compensate": row.compensate,
                "depth": row.depth,
                "width": row.width,
                "search": row.search,
                "formulas": {bound.part.word: bound.part.summary for bound in parts},
                "notes": [bound.part.note for bound in parts if bound.part.note],
                "group": row.group,
                "budget": budget.part.name if budget else None,
                "needs": sorted(_read(parts if budget is None else [*parts, budget])),
                "calibration": dict(row.calibration),
                "options": options,
                "paper": row.paper,
            }
        )
    return listed


def _read(parts: Sequence[Bound]) -> frozenset[str]:
    """What some parts read of a model with the options they are bound to."""
    return frozenset().union(*(bound.part.needed(bound.options) for bound in parts)) - {"scores"}


def _parts_of(row: Method) -> tuple[list[Bound], Bound | None, dict[str, Any]]:
    """A method's parts, its budget if it has one, and options that are no part's, each with its default."""
    if row.width is not None:
        return [bound_width(row, {})], None, {}
    if row.kind == "shrink":
        shrinker = Shrinker.of(row, {})
        given = shrinker.budget
        if shrinker.score is None:
            return shrinker.parts, None, {}
        common = {
            f"budget.{name}": value for name, value in given.resolved.items() if name not in ("name", *given.options)
        }
        return shrinker.parts, Bound(given.part, given.options), common
    budget = Budget.of(row)
    more = {"pattern.group": row.group, "budget.overrides": {}, "budget.ignore": []}
    return Sparsifier.of(row, {}).parts, Bound(budget.part, budget.options), more


def addable() -> list[dict[str, str]]:
    """The parts that can be added to a method by name, as in `wanda+dsnot`: name, kind, to what kind of method, what they do, paper."""
    found = [(find_part(kind, name), "sparsify") for name, kind in PARTS.items()]
    kinds = {"budget": "unit-budget"}
    found += [(find_part(kinds.get(kind, kind), name), "shrink") for name, kind in UNIT_PARTS.items()]
    return [
        {"name": part.name, "kind": part.word, "to": to, "summary": part.summary, "paper": part.paper}
        for part, to in found
    ]


def _calibration(given: str | Mapping[str, Any]) -> dict[str, Any]:
    return {"source": given} if isinstance(given, str) else dict(given)


def _windows(model: PreTrainedModel, tokens: Any, recipe: Recipe) -> Windows:
    if isinstance(tokens, Windows):
        windows = tokens if tokens.keep is None else Windows(tokens.ids, tokens.keep.bool())
    elif isinstance(tokens, Tensor):
        windows = Windows(tokens)
    elif isinstance(tokens, Mapping) and "input_ids" in tokens:
        try:
            ids = torch.as_tensor(tokens["input_ids"])
            mask = torch.as_tensor(tokens.get("attention_mask", torch.ones_like(ids))).bool()
        except (ValueError, TypeError, RuntimeError) as problem:
            raise InputError(f"input_ids and attention_mask must be tables of whole numbers: {problem}") from None
        windows = Windows(ids, None if bool(mask.all()) else mask)
    elif callable(tokens):
        length = window_length(model.config, recipe.calibration.length, Silent())
        windows = recipe_windows(recipe, tokens, length=length)
    else:
        raise InputError(
            f"calibration tokens cannot be {type(tokens).__name__}: give a tokenizer, token ids or a batch"
        )
    if windows.ids.ndim != 2 or windows.ids.dtype not in (torch.int64, torch.int32) or not len(windows):
        raise InputError(
            f"token ids must be whole numbers [windows, length], not {windows.ids.dtype} {list(windows.ids.shape)}"
        )
    if windows.keep is not None and (windows.keep.shape != windows.ids.shape or not bool(windows.keep.any(1).all())):
        raise InputError("the attention mask must have the shape of the token ids and leave a token in every window")
    return Windows(windows.ids.long().cpu(), None if windows.keep is None else windows.keep.cpu())
