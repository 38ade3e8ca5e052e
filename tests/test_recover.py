"""A recovered folder has the zeros it had, computes what was trained, and is the same however often its run was stopped."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import prunekit
import tiny
from helpers import Says, shards, stop_at
from prunekit import InputError, StorageError, VerificationError, recovering
from prunekit.calibration.document import Document
from prunekit.calibration.windows import recovery_windows
from prunekit.checkpoint.reader import Reader
from prunekit.checkpoint.writer import JOURNAL_NAME, PLAN_NAME, STATE_PREFIX, Journal, Writer
from prunekit.cli import app
from prunekit.model.anatomy import Linear, read_anatomy
from prunekit.recovery.adapters import Adapters, MaskedLinear, Tuned
from prunekit.recovery.loss import cross_entropy, loss_and_gradient
from prunekit.recovery.options import RecoveryOptions, rate_share
from prunekit.recovery.training import Training
from prunekit.report.page import run_page
from test_cli import call

STEPS = 6
FAST: dict[str, Any] = {"steps": STEPS, "batch": 4, "samples": 40, "length": 32, "rate": 0.01, "dtype": "float32"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny.make_text(), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A tiny Llama, half of whose weights are zero; for reading only."""
    return prune(tmp_path_factory.mktemp("pruned"), text)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, pruned: Path, text: Path) -> Path:
    """The output of a recovery that nothing stopped; for reading only."""
    out = tmp_path_factory.mktemp("whole") / "out"
    prunekit.recover(pruned, data=str(text), out=out, **FAST)
    return out


def prune(folder: Path, text: Path, family: str = "llama", **options: Any) -> Path:
    model = {name: options.pop(name) for name in ("dtype",) if name in options}
    tiny.save_model(folder / "model", family, **model)
    setup: dict[str, Any] = {"calibration": {"source": str(text), "samples": 2, "length": 32}, "dtype": "float32"}
    prunekit.prune(folder / "model", out=folder / "pruned", **(options or {"sparsity": 0.5}), **setup)
    return folder / "pruned"


def tensors(folder: Path) -> dict[str, Tensor]:
    reader = Reader(folder)
    return reader.read(reader.entries)


def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.arange(2 * 16).reshape(2, 16)
    with torch.inference_mode():
        found = model(input_ids=ids, use_cache=False).logits
    assert isinstance(found, Tensor)
    return found


def linear_names(model: PreTrainedModel) -> list[str]:
    return [linear.full_name for linear in read_anatomy(model).linears()]


# Widths


def test_what_was_removed_is_still_said(tmp_path: Path, text: Path, out: Path) -> None:
    tiny.save_model(tmp_path / "model")
    calibration = {"source": str(text), "samples": 2, "length": 32}
    prunekit.prune(tmp_path / "model", out=tmp_path / "smaller", method="shortgpt", ratio=0.3, calibration=calibration)
    prunekit.recover(tmp_path / "smaller", data=str(text), out=out, **FAST)
    assert (out / PLAN_NAME).read_bytes() == (tmp_path / "smaller" / PLAN_NAME).read_bytes()
    assert prunekit.inspect(out).sound


# The mask


@pytest.mark.parametrize(
    ("family", "how"),
    [
        ("llama", {"sparsity": 0.5}),
        ("llama", {"pattern": "2:4", "dtype": torch.bfloat16}),
        ("gpt2", {"sparsity": 0.6}),
        ("qwen2", {"pattern": "2:4"}),
    ],
)
def test_zeros_stay_and_nothing_else_is_touched(
    tmp_path: Path, text: Path, out: Path, family: str, how: dict[str, Any]
) -> None:
    source = prune(tmp_path, text, family, **how)
    found = prunekit.recover(source, data=str(text), out=out, **FAST)
    before, after = tensors(source), tensors(out)
    tuned = [f"{name}.weight" for name in linear_names(AutoModelForCausalLM.from_pretrained(source))]
    stored = {name: next(key for key in before if name.endswith(key)) for name in tuned}
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        if name in stored.values():
            assert torch.equal(after[name] == 0, tensor == 0), name
            assert not torch.equal(after[name], tensor), name
        else:
            assert torch.equal(after[name], tensor), name
    assert found.linears == found.masked == len(tuned)
    assert found.zeros == sum(int((before[key] == 0).sum()) for key in stored.values())
    assert prunekit.inspect(out).sound


def test_linears_that_were_left_dense_are_peft_s_own_and_become_dense_again(
    finished: Path, text: Path, out: Path
) -> None:
    found = prunekit.recover(finished, data=str(text), out=out, **FAST)
    assert (found.linears, found.masked) == (21, 14)
    assert prunekit.inspect(out).sound


def test_a_weight_that_training_moves_to_zero_is_no_new_zero() -> None:
    layer = _masked_layer(nn.Linear(2, 2, bias=False))
    stored = torch.tensor([[1e-7, 1.0], [0.0, -0.0]], dtype=torch.float16)
    layer.base_layer.weight.data = stored.float()
    layer.lora_A["default"].weight.data = torch.tensor([[-1e-7, 1.0]])
    layer.lora_B["default"].weight.data = torch.tensor([[1.0], [1.0]])
    layer.scaling["default"] = 1.0
    merged = Tuned(Linear("name", "block", 0, 2, 2, False), layer, True).merged(stored)
    assert merged[0, 0] != 0
    assert float(merged[0, 0]) == 2**-24
    assert float(merged[0, 1]) == 2.0
    assert torch.equal(merged[1].view(torch.int16), stored[1].view(torch.int16))


def _masked_layer(base: nn.Module, dropout: float = 0.0) -> Any:
    from peft import LoraConfig

    config = LoraConfig(r=1, lora_alpha=2, lora_dropout=dropout)
    return MaskedLinear(base, "default", config=config, r=1, lora_alpha=2)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_the_masked_product_and_its_gradients_are_those_of_the_slow_obvious_way(kind: Any) -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 4) if kind is nn.Linear else Conv1D(4, 6)
    with torch.no_grad():
        base.weight.mul_(torch.rand_like(base.weight) > 0.5)
        base.bias.normal_()
    layer = _masked_layer(base)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(b)
    x = torch.randn(3, 5, 6, requires_grad=True)
    weight = base.weight.detach() if kind is nn.Linear else base.weight.detach().t()
    wanted = x @ (weight + 2 * (b @ a) * (weight != 0)).t() + base.bias
    found = layer(x)
    torch.testing.assert_close(found, wanted)
    slope = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad(found, [x, a, b], slope), torch.autograd.grad(wanted, [x, a, b], slope), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_dropout_leaves_out_inputs_of_the_adapter_and_only_while_it_is_trained() -> None:
    torch.manual_seed(0)
    layer = _masked_layer(nn.Linear(64, 4, bias=False), dropout=0.5)
    nn.init.ones_(layer.lora_A["default"].weight)
    nn.init.ones_(layer.lora_B["default"].weight)
    eye = torch.eye(64)
    with torch.no_grad():
        added = {train: layer.train(train)(eye) - layer.base_layer(eye) for train in (True, False)}
    torch.testing.assert_close(added[False], torch.full((64, 4), 2.0))
    left_out = (added[True].abs() < 1e-6).all(1)
    assert 10 < int(left_out.sum()) < 54
    torch.testing.assert_close(added[True][~left_out], torch.full((int((~left_out).sum()), 4), 4.0))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("sparse", [True, False])
def test_the_merged_model_computes_what_the_adapters_computed(family: str, sparse: bool, tmp_path: Path) -> None:
    (tiny.save_sparse if sparse else tiny.save_model)(tmp_path / "model", family)
    model = prunekit.load(tmp_path / "model", dtype="float32")
    dense = logits(model)
    linears = list(read_anatomy(model).linears())
    masked = {linear.full_name for linear in linears} if sparse else set()
    adapters = Adapters(model, linears, masked, RecoveryOptions(data="", dropout=0.5))
    model.eval()
    assert torch.equal(logits(model), dense)  # before the first step it is the model it was
    torch.manual_seed(1)
    for name, parameter in adapters.parameters.items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    wanted = logits(model)
    for tuned in adapters.tuned:
        tuned.place(tuned.merged(tuned.layer.get_base_layer().weight.detach()))
    found = logits(adapters.detach())
    assert linear_names(model) == [linear.full_name for linear in linears]
    assert float((wanted - dense).norm() / dense.norm()) > 0.01
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    if sparse and family == "llama":
        assert torch.equal(found, wanted)  # to the last bit: the same product of the same weights


# Training


def test_the_loss_goes_down_and_the_held_out_text_gets_likelier(whole: Path, text: Path) -> None:
    found = json.loads((whole / "prunekit.json").read_text())["recovery"]["result"]
    assert len(found["losses"]) == STEPS
    assert found["losses"][-1] < found["losses"][0] - 0.1
    assert found["after"] < 0.9 * found["before"]
    assert [step for step, _ in found["curve"]] == list(range(STEPS + 1))
    assert found["curve"][-1][1] == pytest.approx(found["after"], rel=1e-4)


def test_perplexity_is_that_of_evaluate(pruned: Path, text: Path, out: Path, tmp_path: Path) -> None:
    found = prunekit.recover(pruned, data=str(text), out=out, **FAST)
    tokenizer = tiny.make_tokenizer()
    _, held = recovery_windows(
        [Document("text", text.read_text)], tokenizer, samples=FAST["samples"], length=FAST["length"], seed=0
    )
    (tmp_path / "held.txt").write_text(tokenizer.decode(held.ids.flatten()), encoding="utf-8")
    for folder, figure in ((pruned, found.before), (out, found.after)):
        measured = prunekit.evaluate(folder, text=str(tmp_path / "held.txt"), length=32, dtype="float32")
        assert measured.texts[0].windows == found.held_out
        assert measured.perplexity == pytest.approx(figure, rel=1e-4)


def test_trained_and_held_out_windows_share_no_token() -> None:
    words = [Document(str(number), lambda number=number: f"{number:03d}") for number in range(400)]  # type: ignore[misc]
    trained, held = recovery_windows(words, tiny.make_tokenizer(), samples=None, length=5, seed=3)
    assert (len(trained), len(held)) == (367, 32)
    shown = [tiny.make_tokenizer().decode(window)[:3] for window in (*trained.ids, *held.ids)]
    assert len(set(shown)) == 399
    fewer, others = recovery_windows(words, tiny.make_tokenizer(), samples=10, length=5, seed=3)
    assert len(fewer) == 10
    assert len(others) >= 1
    with pytest.raises(InputError, match="windows of 5 tokens are asked for"):
        recovery_windows(words, tiny.make_tokenizer(), samples=1000, length=5, seed=3)


def test_the_rate_rises_and_falls() -> None:
    shares = [rate_share(step, 10, 4) for step in range(10)]
    assert shares[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert shares[-1] == pytest.approx(1 / 6)
    assert all(left > right for left, right in pairwise(shares[4:]))
    assert rate_share(0, 1, 0) == 1.0


def test_what_depends_on_the_text_is_filled_in() -> None:
    def resolved(**options: Any) -> RecoveryOptions:
        return RecoveryOptions.build({"data": "t", **options}).resolved(windows=3200, dtype="float32", device="cpu")

    assert (resolved().steps, resolved().warmup) == (100, 10)
    assert (resolved(batch=1).steps, resolved(batch=1).warmup) == (6400, 100)
    assert resolved(warmup=0.25).warmup == 25
    assert resolved(warmup=7).warmup == 7
    with pytest.raises(InputError, match="warmup 100 leaves nothing of 50 steps"):
        resolved(warmup=100, steps=50)
    with pytest.raises(InputError, match=r"warmup 1\.5 is neither"):
        resolved(warmup=1.5)


def test_every_window_is_seen_once_before_one_is_seen_twice() -> None:
    options = RecoveryOptions(data="", batch=3, steps=9, warmup=0)
    windows = prunekit.Windows(torch.zeros(7, 4, dtype=torch.long))
    training = Training(None, {"p": nn.Parameter(torch.zeros(1))}, windows, windows, options, None)  # type: ignore[arg-type]
    seen: list[int] = []
    for _ in range(7):
        seen += training._order()
        training.losses.append(0.0)
    assert [sorted(seen[start : start + 7]) for start in (0, 7, 14)] == [list(range(7))] * 3
    assert seen[:7] != seen[7:14]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_loss_and_gradient_are_autograd_s(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunekit.recovery.loss.chunk_tokens", lambda _: 3)
    torch.manual_seed(0)
    ours, dense = torch.randn(2, 2, 6, 11).double()
    ids = torch.randint(11, (2, 6))
    ours.requires_grad_()
    likely, wanted = (torch.log_softmax(logits[:, :-1].flatten(0, 1), -1) for logits in (ours, dense))
    entropy = nn.functional.nll_loss(likely, ids[:, 1:].flatten(), reduction="sum")
    divergence = nn.functional.kl_div(likely, wanted, log_target=True, reduction="sum")
    mixed = (1 - share) * entropy + share * divergence
    (slope,) = torch.autograd.grad(mixed, ours)
    loss, gradient = loss_and_gradient(ours.detach().float(), ids, dense.float(), share=share, scale=0.5)
    assert loss == pytest.approx(float(mixed.detach()), rel=1e-5)
    torch.testing.assert_close(gradient.double(), 0.5 * slope, rtol=1e-4, atol=1e-6)
    assert cross_entropy(ours.detach(), ids) == pytest.approx(float(entropy.detach()), rel=1e-5)


def test_a_model_has_nothing_to_learn_from_itself() -> None:
    ours = torch.randn(2, 4, 11)
    loss, gradient = loss_and_gradient(ours, torch.zeros(2, 4, dtype=torch.long), ours, share=1.0)
    assert loss == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_distillation_brings_the_model_closer_to_the_dense_one(pruned: Path, text: Path, out: Path) -> None:
    dense = pruned.parent / "model"

    def divergence(folder: Path) -> float:
        figures = prunekit.evaluate(folder, against=dense, text=str(text), length=32, samples=8, dtype="float32")
        assert figures.texts[0].kl is not None
        return figures.texts[0].kl

    options = {**FAST, "distill": str(dense), "distill_share": 1.0}
    found = prunekit.recover(pruned, data=str(text), out=out, **options)
    assert found.losses[-1] < found.losses[0]
    assert divergence(out) < 0.9 * divergence(pruned)


def test_checkpointed_blocks_compute_the_same(whole: Path, pruned: Path, text: Path, out: Path) -> None:
    prunekit.recover(pruned, data=str(text), out=out, checkpointing=True, **FAST)
    there = tensors(whole)
    for name, tensor in tensors(out).items():
        torch.testing.assert_close(tensor, there[name], rtol=1e-4, atol=1e-5)


def test_bfloat16_learns_too(pruned: Path, text: Path, out: Path) -> None:
    found = prunekit.recover(pruned, data=str(text), out=out, **{**FAST, "dtype": "bfloat16"})
    assert found.after < found.before


def test_only_the_targets_are_tuned(pruned: Path, text: Path, out: Path) -> None:
    found = prunekit.recover(pruned, data=str(text), out=out, **FAST, targets=["*.1.mlp.down_proj", "self_attn.q_proj"])
    before, after = tensors(pruned), tensors(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{number}.self_attn.q_proj.weight" for number in range(3)} | {
        "model.layers.1.mlp.down_proj.weight"
    }
    assert found.linears == 4


def test_nobody_s_random_numbers_are_moved(pruned: Path, text: Path, out: Path) -> None:
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    prunekit.recover(pruned, data=str(text), out=out, **{**FAST, "steps": 1})
    assert torch.equal(torch.rand(1), wanted)


# What comes in and out


def test_a_packed_folder_and_one_that_prunekit_did_not_write(pruned: Path, text: Path, tmp_path: Path) -> None:
    prunekit.export(pruned, out=tmp_path / "packed", format="bitmask")
    shutil.copytree(pruned, tmp_path / "foreign")
    for name in ("prunekit.json", "report.html", "README.md"):
        (tmp_path / "foreign" / name).unlink()
    for name in ("packed", "foreign"):
        prunekit.recover(tmp_path / name, data=str(text), out=tmp_path / f"{name}-out", **FAST)
    packed, foreign = tmp_path / "packed-out", tmp_path / "foreign-out"
    assert list(shards(packed).values()) == list(shards(foreign).values())
    assert prunekit.inspect(packed).sound
    assert not [path.name for path in foreign.iterdir() if "prunekit" in path.name]
    assert linear_names(AutoModelForCausalLM.from_pretrained(foreign))


def test_manifest_page_and_card_tell_of_it(whole: Path, pruned: Path) -> None:
    before, after = (json.loads((folder / "prunekit.json").read_text()) for folder in (pruned, whole))
    assert {name for name in before if before[name] != after[name]} <= {"outputs", "verification"}
    assert after["recovery"]["earlier"] is None
    page, card = ((whole / name).read_text() for name in ("report.html", "README.md"))
    assert page == run_page(after)
    assert "Recovery" in page
    assert "adapters of rank 8" in card
    assert "bit-identical" not in card
    assert "bit-identical" in (pruned / "README.md").read_text()
    assert "recovery    prunekit recover OUT --data" in call("inspect", whole).out
    assert "recovery" not in call("inspect", pruned).out
    assert prunekit.write_report(whole).card == "written"
    assert (whole / "README.md").read_text() == card


def test_the_command_it_shows_repeats_it(whole: Path, pruned: Path, text: Path, tmp_path: Path) -> None:
    recovery = json.loads((whole / "prunekit.json").read_text())["recovery"]
    command = shlex.split(RecoveryOptions.of(recovery).command(str(pruned), str(tmp_path / "again")))
    assert command[0] == "prunekit"
    assert call(*command[1:]).code == 0
    assert shards(tmp_path / "again") == shards(whole)


def test_a_recovered_folder_can_be_recovered_again(whole: Path, text: Path, out: Path) -> None:
    prunekit.recover(whole, data=str(text), out=out, **{**FAST, "steps": 1})
    recovery = json.loads((out / "prunekit.json").read_text())["recovery"]
    assert recovery["earlier"]["result"]["steps"] == STEPS
    assert prunekit.inspect(out).sound


def test_recover_takes_every_option(pruned: Path, text: Path, out: Path) -> None:
    words = [
        "recover",
        pruned,
        "--data",
        text,
        "--out",
        out,
        "--steps",
        "2",
        "--rank",
        "4",
        "--alpha",
        "8",
        "--dropout",
        "0",
    ]
    words += ["--targets", "*.q_proj,*.mlp.*", "--rate", "1e-3", "--warmup", "0.5", "--batch", "2", "--samples", "8"]
    words += ["--length", "32", "--distill", pruned.parent / "model", "--distill-share", "0.25", "--checkpointing"]
    words += ["--seed", "3", "--dtype", "float32", "--device", "cpu", "--json"]
    for extra in ([], ["--resume"], ["--overwrite", "--trust-remote-code"]):
        done = call(*words, *extra)
        assert done.code == 0, done.err
    assert done.json.keys() >= {
        "out",
        "before",
        "after",
        "losses",
        "curve",
        "steps",
        "zeros",
        "seconds",
        "verification",
    }
    assert (done.json["steps"], done.json["linears"]) == (2, 12)
    assert {name for option in _recover().params for name in option.opts} - {"model"} <= {
        *map(str, words), "--resume", "--overwrite", "--trust-remote-code"
    }  # fmt: skip
    text_form = call(*words[:-1], "--overwrite")
    assert "recovered ->" in text_form.out
    assert "12 of which keep their zeros" in text_form.out


def _recover() -> Any:
    import typer

    group: Any = typer.main.get_command(app)
    return group.commands["recover"]


# Stopped


def interrupt(pruned: Path, text: Path, out: Path, call: int, owner: Any, name: str, **options: Any) -> None:
    """Run until `owner.name` is called for the time `call` (from 0), and be interrupted there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovering, "_SAVE_SECONDS", 0.0)
        patch.setattr(owner, name, stop_at(call, getattr(owner, name)))
        with pytest.raises(KeyboardInterrupt):
            prunekit.recover(pruned, data=str(text), out=out, **FAST, **options)


@pytest.mark.parametrize(
    ("at", "owner", "name"),
    [
        (0, Training, "advance"),
        (4, Training, "advance"),
        (2, Journal, "add"),
        (0, recovering, "write_sheets"),
        (1, Writer, "write_shard"),
        (0, Writer, "write_index"),
        (0, recovering, "verify"),
        (0, Writer, "write_manifest"),
    ],
)
def test_stopped_anywhere_it_ends_in_the_same_bytes(
    whole: Path, pruned: Path, text: Path, out: Path, at: int, owner: Any, name: str
) -> None:
    interrupt(pruned, text, out, at, owner, name)
    if name != "write_manifest":  # what has an index by then was checked
        with pytest.raises(
            InputError,
            match="a recovery that was interrupted: finish it with the same command",
        ):
            prunekit.inspect(out)
    says = Says()
    found = prunekit.recover(pruned, data=str(text), out=out, resume=True, progress=says, **FAST)
    assert shards(out) == shards(whole)
    assert not [path.name for path in out.iterdir() if path.name.startswith(".prunekit")]
    kept = json.loads((whole / "prunekit.json").read_text())["recovery"]["result"]
    assert (found.losses, [list(point) for point in found.curve.items()]) == (kept["losses"], kept["curve"])
    if at == 4:
        assert f"resuming behind step 4 of {STEPS}" in says.said


def test_a_torn_state_costs_a_step_and_two_torn_ones_all(whole: Path, pruned: Path, text: Path, out: Path) -> None:
    interrupt(pruned, text, out, 4, Training, "advance")
    shutil.copytree(out, out.parent / "both")
    for folder, torn, behind in ((out, 1, 3), (out.parent / "both", 2, None)):
        states = sorted(json.loads((folder / JOURNAL_NAME).read_text())["shards"], key=lambda record: -record["step"])
        for record in states[:torn]:
            path = folder / record["file"]
            path.write_bytes(path.read_bytes()[:-1] + b"!")
        says = Says()
        prunekit.recover(pruned, data=str(text), out=folder, resume=True, progress=says, **FAST)
        resumed = [words for words in says.said if words.startswith("resuming")]
        assert resumed == ([] if behind is None else [f"resuming behind step {behind} of {STEPS}"])
        assert shards(folder) == shards(whole)


@pytest.mark.parametrize("unfinished", [True, False])
def test_a_resume_with_other_options_is_refused_and_says_which(
    whole: Path, pruned: Path, text: Path, out: Path, unfinished: bool
) -> None:
    if unfinished:
        interrupt(pruned, text, out, 3, Training, "advance")
    else:
        shutil.copytree(whole, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for options, words in (
        ({"rank": 4}, r"options\.rank is 8 there and 4 here"),
        ({"rate": 0.02}, r"options\.rate is 0\.01 there and 0\.02 here"),
        ({"distill": str(pruned.parent / "model")}, "dense is null there"),
        ({"seed": 1}, r"options\.seed is 0 there and 1 here"),
    ):
        with pytest.raises(InputError, match=words):
            prunekit.recover(pruned, data=str(text), out=out, resume=True, **{**FAST, **options})
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_what_an_interrupted_prune_left_is_not_taken_for_a_recovery(pruned: Path, text: Path, out: Path) -> None:
    out.mkdir()
    Journal.fresh(out, {"recipe": {}}).save()
    with pytest.raises(InputError, match="is what an interrupted run of prune left"):
        prunekit.recover(pruned, data=str(text), out=out, resume=True, **FAST)
    assert (out / JOURNAL_NAME).exists()


def test_a_finished_folder_gives_its_result_and_is_not_written(whole: Path, pruned: Path, text: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    found = prunekit.recover(pruned, data=str(text), out=whole, resume=True, **FAST)
    assert found.record() == json.loads((whole / "prunekit.json").read_text())["recovery"]["result"] | {
        "curve": [*found.curve.items()]
    }
    assert {path.name: path.stat().st_mtime_ns for path in whole.iterdir()} == before


def test_being_told_to_stop_ends_with_130_and_a_sentence(pruned: Path, text: Path, out: Path) -> None:
    words = ["recover", pruned, "--data", text, "--out", out, "--length", "32", "--batch", "4", "--steps", "5"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovering, "_SAVE_SECONDS", 0.0)
        patch.setattr(Training, "advance", stop_at(2, Training.advance))
        done = call(*words)
    assert done.code == 130
    assert f"stopped: 2 of 5 steps are saved in '{out}'; the same command with --resume continues" in done.err
    assert "Traceback" not in done.err
    assert call(*words, "--resume").code == 0


def test_a_disk_that_refuses_leaves_what_can_be_resumed(
    whole: Path, pruned: Path, text: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(recovering, "write_sheets", lambda *_: (_ for _ in ()).throw(StorageError("full")))
        with pytest.raises(StorageError):
            prunekit.recover(pruned, data=str(text), out=out, **FAST)
    assert list(out.glob(f"{STATE_PREFIX}*"))
    prunekit.recover(pruned, data=str(text), out=out, resume=True, **FAST)
    assert shards(out) == shards(whole)


def test_a_lost_zero_is_found_and_nothing_loads_the_folder(
    pruned: Path, text: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Tuned.merged
    monkeypatch.setattr(Tuned, "merged", lambda self, stored: real(self, stored) + (self.linear.index == 2) * 1e-9)
    with pytest.raises(VerificationError, match=r"'model\.layers\.2\..*has other zeros than in"):
        prunekit.recover(pruned, data=str(text), out=out, **FAST)
    with pytest.raises(InputError, match="holds neither"):
        prunekit.load(out)


# Refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"targets": ["*.k_proj", "*.kproj"]},
            r"target '\*\.kproj' matches no linear of the blocks: they are called self_attn\.q",
        ),
        ({"samples": 5000}, "the text has .* tokens, enough for"),
        ({"length": 129}, "length 129 is more than the 128 positions"),
        ({"data": "nowhere.txt"}, r"text 'nowhere\.txt' is neither a file"),
        ({"dtype": "float16"}, "gradients do not fit into float16"),
        ({"rank": 0}, "rank cannot be 0: input should be greater than or equal to 1"),
        ({"rnak": 4}, "'rnak' is not a name a recovery has at that place: did you mean 'rank'"),
        ({"rate": 1e9}, "loss .* in step .*: try --dtype float32, or a smaller --rate"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(
    options: dict[str, Any], words: str, pruned: Path, text: Path, out: Path
) -> None:
    with pytest.raises(InputError, match=words):
        prunekit.recover(pruned, out=out, **{"data": str(text), **FAST, **options})
    assert not out.exists()


def test_without_peft_it_says_what_to_install(
    pruned: Path, text: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(recovering, "find_spec", lambda name: None if name == "peft" else real(name))
    done = call("recover", pruned, "--data", text, "--out", out)
    assert (done.code, done.err) == (
        2,
        "prunekit: recover trains peft's adapters, which are not installed: pip install 'prunekit[recover]'\n",
    )


def test_folders_that_cannot_be_are_refused(pruned: Path, text: Path, tmp_path: Path) -> None:
    quantised, changed, other = (Path(shutil.copytree(pruned, tmp_path / name)) for name in ("q", "c", "o"))
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    (changed / "config.json").write_text(json.dumps(config, indent=1))
    tiny.save_model(tmp_path / "vocabulary", vocab_size=300)
    for folder, out, options, words in (
        (quantised, tmp_path / "out", {}, "is quantised"),
        (changed, tmp_path / "out", {}, "is not what was written"),
        (pruned, tmp_path / "out", {"distill": str(tmp_path / "vocabulary")}, "has another vocabulary"),
        (pruned, pruned, {"overwrite": True}, "own folder"),
        (pruned, other, {}, "is not empty"),
        (pruned, other, {"resume": True}, "is what prune wrote, not recover"),
        (tmp_path / "nowhere", tmp_path / "out", {}, "does not exist"),
    ):
        with pytest.raises(InputError, match=words):
            prunekit.recover(folder, data=str(text), out=out, **FAST, **options)
        assert not (tmp_path / "out").exists()
