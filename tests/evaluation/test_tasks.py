"""Multiple choice: the files, how they are cut into tokens, and lm-evaluation-harness's own figures on the same questions."""

from __future__ import annotations

import gc
import json
import math
import random
import weakref
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import prunekit
import tiny
from prunekit import InputError, evaluating
from prunekit.evaluation.tasks import Item, encode, file_tasks, judge, read_task
from test_cli import call

needs_harness = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed: pip install 'prunekit[eval]'"
)


def draw_items(count: int = 60, seed: int = 0, *, empty: bool = True) -> list[dict[str, Any]]:
    """Questions with 2 to 5 choices; some contexts end with spaces, some are empty, some items have several contexts."""
    draw = random.Random(seed)
    words = tiny.make_text(400, seed).split()
    say = lambda least, most: " ".join(draw.choice(words) for _ in range(draw.randint(least, most)))  # noqa: E731
    items: list[dict[str, Any]] = []
    for number in range(count):
        choices = [say(1, 3) for _ in range(draw.randint(2, 5))]
        item: dict[str, Any] = {"context": say(1, 8), "choices": choices, "label": draw.randrange(len(choices))}
        item["context"] += "  " if number % 7 == 1 else ""
        if empty and number % 9 == 4:
            item["context"] = ""
        items.append(item)
    return items


def write(path: Path, items: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def test_both_forms_of_a_question(tmp_path: Path) -> None:
    several = {"context": "", "choices": ["x y", "z y"], "label": 1, "contexts": ["x", "z"], "continuation": "y"}
    path = write(tmp_path / "t.jsonl", [{"context": "a", "choices": ["b", "cd"], "label": 0}, several])
    assert read_task(path) == [
        Item((("a", " b"), ("a", " cd")), (1, 2), 0),
        Item((("x", " y"), ("z", " y")), (1, 1), 1),
    ]
    assert len(read_task(path, limit=1)) == 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "Expecting property name"),
        ("[1]", "it is not an object"),
        ('{"context": "a", "choices": ["b"]}', "it has no 'label'"),
        ('{"choices": ["b"], "label": 0}', "it has no 'context'"),
        ('{"context": "a", "choices": ["b"], "label": 1}', "label 1 is not the number of one of its 1 choices"),
        ('{"context": "a", "choices": ["b"], "label": true}', "label True is not the number"),
        ('{"context": "a", "choices": ["b"], "label": "0"}', "label '0' is not the number"),
        ('{"context": "a", "choices": [""], "label": 0}', "a choice is empty"),
        ('{"context": "a", "choices": [1], "label": 0}', "contexts and choices must be text"),
        ('{"contexts": ["a"], "label": 0}', "it has no 'continuation'"),
    ],
)
def test_a_line_that_is_no_question_is_named(line: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"context": "a", "choices": ["b"], "label": 0}\n\n' + line + "\n")
    with pytest.raises(InputError, match=f"line 3 of '{path}' is no question: {reason}"):
        read_task(path)


def test_files_folders_and_names(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", draw_items(2))
    write(tmp_path / "a.jsonl", draw_items(2))
    files, others = file_tasks([str(tmp_path), "hellaswag", "own.yaml"])
    assert list(files) == ["a", "b"]
    assert others == ["hellaswag", "own.yaml"]
    with pytest.raises(InputError, match="two tasks are called 'a'"):
        file_tasks([str(tmp_path), str(tmp_path / "a.jsonl")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no \.jsonl files"):
        file_tasks([str(tmp_path / "empty")])
    with pytest.raises(InputError, match="cannot be read"):
        read_task(tmp_path / "missing.jsonl")
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no questions"):
        read_task(tmp_path / "none.jsonl")


def test_tokens_keep_their_space_and_a_text_begins_somewhere() -> None:
    tokenizer = tiny.make_tokenizer()
    (plain,) = encode(Item((("ab ", " c"),), (1,), 0), tokenizer, 128)
    assert tokenizer.decode(plain.tokens) == "ab  c"
    assert plain.scored == 3, "the spaces belong to what follows"
    (bare,) = encode(Item((("", " c"),), (1,), 0), tokenizer, 128)
    assert bare.tokens[0] == tokenizer.bos_token_id
    assert bare.scored == 2


def test_the_first_of_equal_choices_counts_and_length_is_that_of_the_choice() -> None:
    items = [Item((("", "a"), ("", "b")), (1, 10), 0), Item((("", "a"), ("", "b")), (1, 10), 1)]
    acc, acc_norm = judge(items, [[-2.0, -2.0], [-2.0, -10.0]])
    assert acc.tolist() == [1, 0]
    assert acc_norm.tolist() == [0, 1]


@needs_harness
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_files_score_as_in_the_harness(family: str, tmp_path: Path) -> None:
    """The same questions as a task of its own, through its own loop: the same answers, question by question."""
    from prunekit.evaluation.harness import score_tasks
    from prunekit.evaluation.tasks import score_items
    from prunekit.progress import Silent

    model, tokenizer = tiny.make_model(family), tiny.make_tokenizer()
    path = write(tmp_path / "own.jsonl", draw_items())
    yaml = harness_task(tmp_path, path)
    theirs = score_tasks(model, tokenizer, [str(yaml)])["own"]
    ours = score_items("own", read_task(path), model, tokenizer, progress=Silent())
    assert theirs.n == ours.n == 60
    for metric in ("acc", "acc_norm"):
        assert ours.metrics[metric].values is not None
        assert np.array_equal(ours.metrics[metric].values, theirs.metrics[metric].values)
        assert ours.metrics[metric].value == pytest.approx(theirs.metrics[metric].value)
        assert ours.metrics[metric].stderr == pytest.approx(theirs.metrics[metric].stderr)
    assert 0.1 < ours.metrics["acc"].value < 0.9, "or anything would agree"


def harness_task(folder: Path, data: Path) -> Path:
    yaml = folder / "own.yaml"
    yaml.write_text(
        "task: own\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files: {{test: '{data}'}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{context}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: label\n"
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
        "  - {metric: acc_norm, aggregation: mean, higher_is_better: true}\n"
    )
    return yaml


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """A tiny model, and the same with some noise on its weights."""
    tiny.save_model(tmp_path / "base")
    model: PreTrainedModel = tiny.make_model("llama")
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "after")
    tiny.make_tokenizer().save_pretrained(tmp_path / "after")
    return tmp_path / "after", tmp_path / "base"


def test_one_model_is_in_memory_at_a_time(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[PreTrainedModel]] = []
    still_held: list[bool] = []
    whole = evaluating.Opened.whole

    def noted(opened: evaluating.Opened, trust_remote_code: bool) -> PreTrainedModel:
        still_held.append(any(other() is not None for other in loaded))
        model = whole(opened, trust_remote_code)
        loaded.append(weakref.ref(model))
        model.itself = [model]  # what refers to itself is gone only when it is collected
        return model

    monkeypatch.setattr(evaluating.Opened, "whole", noted)
    after, base = models
    task = tmp_path / "task.jsonl"
    task.write_text("".join(f"{json.dumps(item)}\n" for item in draw_items(3)), encoding="utf-8")
    gc.disable()  # or chance decides
    try:
        prunekit.evaluate(after, against=base, tasks=[str(task)], dtype="float32")
    finally:
        gc.enable()
    assert still_held == [False, False]


def test_against_the_model_it_was_made_from(models: tuple[Path, Path], text_file: Path, tmp_path: Path) -> None:
    after, base = models
    other = tmp_path / "other.txt"
    other.write_text(tiny.make_text(300, seed=4), encoding="utf-8")
    options: dict[str, Any] = {"text": [str(text_file), str(other)], "length": 32, "samples": 6, "dtype": "float32"}
    found = prunekit.evaluate(after, against=base, **options)
    assert [row.text for row in found.texts] == [str(text_file), str(other)]
    for row, path in zip(found.texts, (text_file, other), strict=True):
        alone = {"length": 32, "samples": 6, "dtype": "float32", "text": str(path)}
        assert row.perplexity == pytest.approx(prunekit.evaluate(after, **alone).perplexity, rel=1e-6)
        assert row.before == pytest.approx(prunekit.evaluate(base, **alone).perplexity, rel=1e-6)
        assert row.ratio_interval is not None
        assert row.ratio_interval[0] < row.perplexity / row.before < row.ratio_interval[1]
        ids = tiny.make_tokenizer()(path.read_text(), return_tensors="pt")["input_ids"][0, : 6 * 32].reshape(6, 32)
        divergence, changed = slow_divergence(after, base, ids)
        assert row.kl == pytest.approx(divergence, rel=1e-4)
        assert row.top1_changed == pytest.approx(changed)
    same = prunekit.evaluate(base, against=base, **options).texts[0]
    assert (same.kl, same.top1_changed, same.ratio_interval) == (0, 0, (1, 1))


def slow_divergence(after: Path, base: Path, ids: torch.Tensor) -> tuple[float, float]:
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        p, q = (
            AutoModelForCausalLM.from_pretrained(folder).double()(ids).logits[:, :-1].softmax(-1)
            for folder in (base, after)
        )
    total = math.fsum((p * (p / q).log()).flatten().tolist())
    return total / (6 * 31), float((p.argmax(-1) != q.argmax(-1)).double().mean())


def test_the_command_prints_and_keeps_what_it_found(models: tuple[Path, Path], text_file: Path, tmp_path: Path) -> None:
    after, base = models
    task = write(tmp_path / "own.jsonl", draw_items(30))
    words = ["eval", after, "--against", base, "--text", text_file, "--tasks", task, "--limit", "25", "--length", "32",
             "--samples", "4", "--dtype", "float32"]  # fmt: skip
    done = call(*words, "--save", "--json")
    assert done.code == 0, done.err
    shown = done.json["tasks"]["own"]
    assert shown["n"] == 25
    assert shown["accuracy"] == shown["metrics"]["acc"]["value"]
    low, high = shown["metrics"]["acc"]["difference_interval"]
    assert low <= shown["metrics"]["acc"]["value"] - shown["metrics"]["acc"]["before"] <= high
    kept = json.loads((after / "evaluation.json").read_text())
    assert kept["texts"] == done.json["texts"]
    assert [(row["task"], row["metric"], row["n"]) for row in kept["tasks"]] == [
        ("own", "acc", 25),
        ("own", "acc_norm", 25),
    ]
    plain = call(*words)
    assert "times as much (95 %:" in plain.out
    assert "acc_norm" in plain.out

    only = call("eval", base, "--text", "none", "--tasks", task, "--dtype", "float32", "--json")
    assert only.json["perplexity"] is None
    assert only.json["tasks"]["own"]["metrics"]["acc"]["before"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "none"], "nothing to evaluate"),
        (["--tasks", "missing.jsonl"], "task file 'missing.jsonl' cannot be read"),
        (["--text", "none", "--tasks", "TASK", "--limit", "0"], "limit 0 is no number of questions"),
        (["--against", "nowhere"], "'nowhere'"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    words: list[str], message: str, models: tuple[Path, Path], tmp_path: Path
) -> None:
    task = write(tmp_path / "own.jsonl", draw_items(2))
    words = [str(task) if word == "TASK" else word for word in words]
    done = call("eval", models[1], "--length", "32", "--samples", "1", "--dtype", "float32", *words)
    assert done.code == 2
    assert message in done.err


def test_other_tokens_cannot_be_compared(models: tuple[Path, Path], text_file: Path) -> None:
    after, base = models
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="into different tokens"):
        prunekit.evaluate(after, against=base, text=str(text_file), length=32, samples=2, dtype="float32")


def test_without_the_harness_one_is_told_how_to_get_it(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prunekit.evaluation import harness

    monkeypatch.setattr(harness, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"task 'hellaswag' is no \.jsonl file.*prunekit\[eval\]"):
        prunekit.evaluate(llama_folder, text="none", tasks="hellaswag", dtype="float32")


@needs_harness
def test_a_name_the_harness_does_not_know(llama_folder: Path) -> None:
    with pytest.raises(
        InputError, match="task 'helaswag' is unknown to lm-evaluation-harness: did you mean 'hellaswag'"
    ):
        prunekit.evaluate(llama_folder, text="none", tasks="helaswag", dtype="float32")
