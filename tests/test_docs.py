"""What README and docs show is executed: every command, every piece of Python, every recipe, on tiny models and short texts.

A page is run from top to bottom in a folder of its own, where what it takes for granted lies ready (`path/to/model`, `my-text.jsonl`).
Models are tiny, texts local, windows few and short, and of a grid's axes only the first point is taken; options are those of the page.
What cannot be executed is preceded by `<!-- only checked: WORDS (reason) -->`: those lines or statements of the next block that hold
WORDS are then parsed and not run; without `: WORDS`, the whole block.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch.distributed.run import get_args_parser

import prunekit
import tiny
from prunekit import InputError, benching, cli, parts, studies
from prunekit.calibration import text as texts
from prunekit.calibration.document import Document
from prunekit.catalogue import METHODS, Method
from prunekit.checkpoint import embedded, locate
from prunekit.grid import EvaluationOptions, Grid
from prunekit.jobs import check_options
from prunekit.recipe import KINDS, Calibration, Recipe, tomllib
from prunekit.search.recipes import RecipeSpace
from prunekit.studies import Study, read_study
from test_cli import call

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCORES = "src/prunekit/sparsify/scores/"

BLOCK = re.compile(
    r"^(?:<!-- only checked(?P<words>: [^\n]+?)? \((?P<reason>[^\n]+)\) -->\n+)?```(?P<info>[^\n]*)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
# what a line of a command block begins with
KNOWN = ("prunekit ", "make ", "pip ", "torchrun ")
# what options become: enough to run, and no more
SHORT = {
    "--samples": "3",
    "--length": "32",
    "--text-samples": "2",
    "--test-samples": "2",
    "--trials": "3",
    "--limit": "2",
    "--prompt": "8",
    "--tokens": "2",
    "--max-tokens": "2",
    "--repetitions": "1",
    "--warmup": "0",
}
TINY = {"num_hidden_layers": 2, "max_position_embeddings": 32}
# options that all budgets of methods that remove structures have
SHAPES = ("shape", "align", "skip_first", "skip_last", "least", "only")
# verbs that go on in the folder they are given
CONTINUING = ("sweep", "study", "tune")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, its title, its text, and the words of what is not to be run; "" are in everything."""

    language: str
    title: str
    body: str
    words: str | None

    def runs(self, line: str) -> bool:
        return self.words is None or self.words not in line


def blocks(page: Path) -> list[Block]:
    found = []
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        language, _, more = match["info"].partition(" ")
        title = more.removeprefix('title="').removesuffix('"')
        words = None if match["reason"] is None else (match["words"] or "").removeprefix(": ")
        found.append(Block(language, title, match["body"], words))
    return found


def commands(block: Block) -> list[str]:
    """The lines of a block of commands; none where it is a tree of folders, or what a program printed."""
    lines = [line.strip() for line in block.body.replace("\\\n", " ").splitlines() if line.strip()]
    if block.language not in ("", "sh", "bash", "console") or not any(line.startswith(KNOWN) for line in lines):
        return []
    return lines


def spans(page: Path) -> list[str]:
    """What stands between backticks in a page's prose."""
    prose = BLOCK.sub("", page.read_text(encoding="utf-8"))
    return [span.replace("\\|", "|") for span in re.findall(r"`([^`\n]+)`", prose)]


# Checks that run nothing


@cache
def verbs() -> Any:
    return typer.main.get_command(cli.app).commands


def verb_called(name: str) -> Any:
    assert name in verbs(), f"prunekit has no verb '{name}': it has {', '.join(verbs())}"
    return verbs()[name]


def options_of(verb: str) -> set[str]:
    return {name for option in verb_called(verb).params for name in option.opts}


def check_prunekit(words: Sequence[str]) -> None:
    """The verb and every option are there, and take such values. `words` begin with the verb."""
    verb_called(words[0]).make_context(words[0], list(words[1:]))


def check_setting(setting: str) -> None:
    """The part has such an option, or says with a capital that any can stand there."""
    kind, _, option = setting.partition("=")[0].partition(".")
    if kind == "calibration":
        known = set(Calibration.model_fields)
    elif kind == "evaluate":
        known = set(EvaluationOptions.model_fields)
    elif kind == "pattern":
        known = {"group", "permute"}
    else:
        assert kind in set().union(*KINDS.values()), f"'{setting}': no part is called '{kind}'"
        known = {"name", "overrides", "ignore", *SHAPES} if kind == "budget" else {"name"}
        for home in (kind, f"unit-{kind}") if kind in ("score", "budget") else (kind,):
            known = known.union(*(part.options for part in parts.parts(home).values()))
    assert option.partition(".")[0] in known or option.isupper(), f"'{setting}': {kind} has no option '{option}'"


def check_make(words: Sequence[str]) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(words) <= set(targets), f"the Makefile has no target {set(words) - set(targets)}"


def check_pip(words: Sequence[str]) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for extras in re.findall(r"(?:\.|prunekit)\[([^]]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(known), f"prunekit has no extra among {extras}"


def check_torchrun(words: Sequence[str]) -> None:
    parsed = get_args_parser().parse_args(list(words))
    assert parsed.module
    assert parsed.training_script == "prunekit"
    check_prunekit(parsed.training_script_args)


CHECKS = {"prunekit": check_prunekit, "make": check_make, "pip": check_pip, "torchrun": check_torchrun}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_prose_calls_a_command_or_an_option_is_one(page: Path) -> None:
    anywhere = {"--help"}.union(*(options_of(verb) for verb in verbs()))
    for span in spans(page):
        first, _, rest = span.partition(" ")
        if first == "prunekit" and rest and not rest.startswith("-"):
            verb, *words = rest.split()
            known = options_of(verb)
            assert {word for word in words if word.startswith("--")} <= known, (
                f"`{span}` has an option that {verb} has not"
            )
        elif first == "torchrun" and rest:
            check_torchrun(shlex.split(rest.replace("...", "MODEL --out OUT")))
        elif first in ("make", "pip") and rest:
            CHECKS[first](shlex.split(rest))
        elif re.match(r"--[a-z]", span):
            assert first.partition("=")[0] in anywhere, f"`{span}`: no verb has this option"
            if first == "--set" and re.match(r"'?(?!part\.)[a-z]+\.", rest):
                check_setting(shlex.split(rest)[0])


def test_tests_that_pages_name_are_there() -> None:
    sources = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    for page in PAGES:
        for span in spans(page):
            if named := re.fullmatch(r"(?:[\w/]*?(test_\w+\.py)::)?(test_\w+)", span):
                text = sources.get(named[1], "") if named[1] else "".join(sources.values())
                assert f"def {named[2]}(" in text, f"{page.name}: there is no {span}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_is_of_a_kind_that_is_tested(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(blocks(page)) * 2 == len(re.findall(r"^\s*```", text, re.MULTILINE)), "a block that was not found"
    for block in blocks(page):
        assert block.language in ("", "sh", "bash", "console", "text", "python", "toml", "yaml", "json"), block.language
        for line in commands(block):
            assert line.startswith(KNOWN), f"'{line}': say in tests/test_docs.py how it is tested"
        assert block.words is None or block.words in block.body, f"'{block.words}' is not in the block below it"


def test_what_is_not_there_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- only checked: push (a hub) -->\n```\nprunekit push OUT\nmake demo\n```\n\n```python\nx = 1\n```\n"
        '<!-- only checked (no file) -->\n```toml title="a.toml"\nb = "```"\n```\n'
    )
    first, second, third = blocks(page)
    assert commands(first) == ["prunekit push OUT", "make demo"]
    assert [first.runs(line) for line in commands(first)] == [False, True]
    assert (second.language, second.runs("x = 1")) == ("python", True)
    assert (third.title, third.body, third.runs("b")) == ("a.toml", 'b = "```"\n', False)
    with pytest.raises(AssertionError, match="prunekit has no verb 'prun'"):
        check_prunekit(["prun"])
    with pytest.raises(Exception, match="No such option: --sparse"):
        check_prunekit(["prune", "MODEL", "--out", "OUT", "--sparse", "0.5"])
    with pytest.raises(AssertionError, match="score has no option 'alhpa'"):
        check_setting("score.alhpa=1")
    with pytest.raises(AssertionError, match="the Makefile has no target"):
        check_make(["dmeo"])
    with pytest.raises(AssertionError, match="no extra among plot"):
        check_pip(["install", ".[plot]"])


# Running


class Checked(prunekit.PrunekitError):
    """A study of ours, understood with all the words of the page. It is not run: each would take seconds, even with one recipe."""

    exit_code = 0


@pytest.fixture(scope="module")
def granted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pages take for granted: a model, a pruned one, a text, questions."""
    folder = tmp_path_factory.mktemp("granted")
    model = folder / "path" / "to" / "model"
    tiny.save_model(model, dtype=torch.bfloat16, **TINY)
    prunekit.prune(model, out=folder / "path" / "to" / "pruned", method="magnitude")
    text = tiny.make_text()
    (folder / "my-text.jsonl").write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    question = {"context": "what is", "choices": ["this", "that"], "label": 1}
    (folder / "my-questions.jsonl").write_text(f"{json.dumps(question)}\n" * 3, encoding="utf-8")
    return folder


@pytest.fixture
def place(granted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder a page is run in, with nothing behind it: no hub, no long text, no cluster, no large grid."""
    shutil.copytree(granted, tmp_path, dirs_exist_ok=True)
    (tmp_path / "studies").symlink_to(ROOT / "studies")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # what is written here need not outlive a power cut
    model = tmp_path / "path" / "to" / "model"
    read_grid = Grid.read

    def download(name: str, *_: object) -> Path:
        if name == "MODEL" or name.count("/") == 1:
            return model
        raise InputError(f"'{name}' is nothing that lies here, and no command before it made it")

    def short_documents(*_: object, **__: object) -> list[Document]:
        return [Document("short", tiny.make_text)]

    def short_study(path: Path, **words: Any) -> Study:
        study = read_study(path, **words)  # all that the page says is checked
        if path.parent.name == "studies":
            raise Checked(f"{path} is as it should be")
        options = study.options.model_copy(update={"claims": [], "published": []})
        return replace(
            study, options=options, grid=shortened(study.grid), rows=study.rows[:1], columns=study.columns[:1]
        )

    monkeypatch.setattr(embedded, "embedded_folder", lambda _: model)
    monkeypatch.setattr(locate, "_download", download)
    for name in ("builtin_documents", "_preset", "_hub"):
        monkeypatch.setattr(texts, name, short_documents)
    monkeypatch.setattr(Grid, "read", lambda path: shortened(read_grid(path)))
    monkeypatch.setattr(studies, "read_study", short_study)
    monkeypatch.setattr("prunekit.on_ray.ray_executor", lambda *_, **__: None)  # then runs are carried out here
    monkeypatch.setattr("prunekit.on_ray.ray_workers", lambda *_, **__: None)
    monkeypatch.setattr(
        benching, "_memory_in_child", benching._memory
    )  # not in a process of its own, which takes seconds
    return tmp_path


@contextmanager
def new_scores(room: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The files in `room` are scores of prunekit for the time being."""
    room.mkdir()
    home, registered = import_module("prunekit.sparsify.scores"), parts.parts("score")
    known = dict(registered)
    patch.setattr(home, "__path__", [*home.__path__, str(room)])
    yield
    registered.clear()
    registered.update(known)
    for file in room.glob("*.py"):
        if sys.modules.pop(f"{home.__name__}.{file.stem}", None):
            delattr(home, file.stem)


def shortened(grid: Grid) -> Grid:
    """A grid of one recipe, which takes no time."""
    calibration = grid.base.get("calibration", {}) | {"samples": 3, "length": 32}
    evaluate = grid.evaluate and grid.evaluate.model_copy(update={"samples": 2, "length": 32})
    axes = {name: values[:1] for name, values in grid.axes.items()}
    return Grid(base=grid.base | {"calibration": calibration}, axes=axes, evaluate=evaluate)


def run_command(line: str) -> None:
    """A line of a command block, shortened; what it writes is written anew."""
    words = shlex.split(line, comments=True)[1:]
    check_prunekit(words)
    known = options_of(words[0])
    for option, value in SHORT.items():
        if option in words:
            words[words.index(option) + 1] = value
        elif option in known and words[0] != "study":
            words += [option, value]
    if "--out" in words and words[0] not in CONTINUING and not {"--resume", "--overwrite"} & set(words):
        remove(Path(words[words.index("--out") + 1]))
    done = call(*words)
    assert done.code == 0, f"{line}\n{done.err}"


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def run_python(block: Block, names: dict[str, Any], room: Path, patch: pytest.MonkeyPatch) -> None:
    """A block of Python: a score's file, a row of the catalogue, tests, or a script, whose output folders are made anew."""
    if block.title.startswith(SCORES):
        (room / block.title.removeprefix(SCORES)).write_text(block.body, encoding="utf-8")
    elif block.title == "src/prunekit/catalogue.py":
        row = eval(block.body, {"Method": Method})
        patch.setitem(METHODS, row.name, row)
    else:
        for out in re.findall(r'\bout="([^"]+)"', block.body):
            remove(Path(out))
        tree = ast.parse(block.body)
        tree.body = [node for node in tree.body if block.runs(ast.get_source_segment(block.body, node) or "")]
        exec(compile(tree, block.title or "page", "exec"), names)
    if block.title.startswith("tests/"):
        tests = [value for name, value in names.items() if name.startswith("test_")]
        assert tests
        for test in tests:
            test()


def check_recipe(block: Block) -> None:
    """A recipe, grid or study, which is put where commands look for it; or a piece of one."""
    if block.title:
        Path(block.title).write_text(block.body, encoding="utf-8")
        values = Recipe.read(Path(block.title))
    else:
        values = tomllib.loads(block.body)
    if "study" in values:
        read_study(Path(block.title))
    elif "space" in values:
        assert RecipeSpace.of(values["space"]).genes
    elif "grid" in values:
        assert Grid.build({"model": "MODEL", "method": "wanda", **values}).combinations()
    else:
        check_options(Recipe.build({"model": "MODEL", "method": "wanda", **values}))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_everything_a_page_shows_runs(page: Path, place: Path) -> None:
    names: dict[str, Any] = {"model": tiny.make_model("llama", **TINY), "tokenizer": tiny.make_tokenizer()}
    shown = blocks(page)
    for block in shown:
        if block.language in ("toml", "yaml", "json"):
            check_recipe(block)
    with pytest.MonkeyPatch.context() as patch, new_scores(place / "scores", patch):
        for block in shown:
            if block.language == "python":
                run_python(block, names, place / "scores", patch)
            for line in commands(block):
                if line.startswith("prunekit ") and block.runs(line):
                    run_command(line)
                else:
                    first, *words = shlex.split(line, comments=True)
                    CHECKS[first](words)


def test_adding_a_criterion_adds_it_everywhere_and_the_page_leaves_nothing_behind(place: Path) -> None:
    before = call("methods", "--json").json
    with pytest.MonkeyPatch.context() as patch, new_scores(place / "scores", patch):
        for block in blocks(ROOT / "docs" / "adding.md"):
            if block.title.startswith("src/"):
                run_python(block, {}, place / "scores", patch)
        assert re.search(r"^wanda-l1 +sparsify +per row +Wanda with", call("methods").out, re.MULTILINE)
        assert "--set score.power=...   (default 1.0)" in call("methods", "wanda-l1").out
        refused = call("prune", "MODEL", "--set", "score.name=wanda-l1", "--set", "score.power=-1", "--out", "OUT")
        assert refused.code == 2
        assert "'score.power' cannot be -1: it takes a number of at least 0" in refused.err
    assert call("methods", "--json").json == before
    assert "wanda-l1" not in parts.parts("score")


def test_the_api_page_has_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: prunekit\.(\w+)$", page, re.MULTILINE)) == sorted(prunekit.__all__)


def test_the_site_is_built_without_a_warning_and_asks_nothing_of_the_network(tmp_path: Path) -> None:
    site = tmp_path / "site"
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {page.stem for page in PAGES[1:]} <= {page.stem for page in site.glob("*.html")}
    for page in site.rglob("*.html"):
        fetched = re.findall(
            r"<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=\"?([^\" >]+)", page.read_text("utf-8")
        )
        assert fetched
        assert not [address for address in fetched if re.match(r"(?:https?:)?//", address)], page.name
