"""SliceGPT: turned models compute the same, sliced ones what a slow oracle over the whole model projects."""

from __future__ import annotations

import copy
import json
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import prunekit
import tiny
from helpers import shards, stop_at
from prunekit import InputError
from prunekit.calibration.text import documents
from prunekit.calibration.windows import calibration_windows, load_tokenizer
from prunekit.checkpoint.writer import HIDDEN_PREFIX, Journal, Writer
from prunekit.model.anatomy import read_anatomy
from prunekit.model.resizing import add_shortcuts
from prunekit.model.source import StreamedModel
from prunekit.shrink.residual import find_layouts
from prunekit.shrink.turning import Turned, principal, turn_branch
from prunekit.shrink.units import find_structures
from prunekit.shrink.width import Stream, channels, parameters

pytestmark = pytest.mark.usefixtures("own_module_cache")

IDS = torch.arange(40).reshape(2, 20) * 5 % 250
TURNS = ["llama", "mistral", "qwen2", "qwen3", "phi3"]
WINDOWS, LENGTH = 12, 32


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny.make_text(600), encoding="utf-8")
    return path


def cut(folder: Path, out: Path, text: Path, ratio: float = 0.2, by: str = "channels", **more: Any) -> prunekit.Result:
    return prunekit.prune(
        folder,
        out=out,
        **{
            "method": "slicegpt",
            "ratio": ratio,
            "parts": {"width": {"name": by}},
            "calibration": {"source": str(text), "samples": WINDOWS, "length": LENGTH},
            "dtype": "float32",
            **more,
        },
    )


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS).logits


def generated(model: PreTrainedModel) -> Tensor:
    return model.generate(IDS[:1], max_new_tokens=8, do_sample=False)


def anywhere(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()


def layouts_of(model: PreTrainedModel) -> Any:
    anatomy = read_anatomy(model)
    return find_layouts(model, anatomy, find_structures(model, anatomy))


# Turned, and nothing lost


def thin_model(folder: Path, family: str, kept: int, **options: Any) -> PreTrainedModel:
    """A tiny model of whose stream only a subspace of `kept` dimensions is ever used, and not one along its channels."""
    model = tiny.save_model(folder, family, **options)
    basis = torch.linalg.qr(torch.randn(32, kept, generator=torch.Generator().manual_seed(0)))[0]
    projection = basis @ basis.T
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ projection)
        for layer in model.model.layers:
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight.copy_(projection @ writer.weight)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("family", TURNS)
def test_a_stream_of_fewer_dimensions_loses_nothing(family: str, tied: bool, tmp_path: Path, text: Path) -> None:
    model = thin_model(tmp_path / "base", family, 24, tie_word_embeddings=tied, rms_norm_eps=0.1)
    result = cut(tmp_path / "base", tmp_path / "out", text)
    loaded = anywhere(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    assert torch.equal(generated(loaded), generated(model))
    assert loaded.model.embed_tokens.weight.shape == (tiny.VOCABULARY, 24)
    assert result.channels == (32, 24)


def test_turned_with_all_channels_kept_the_model_computes_the_same() -> None:
    # what no run writes: transformers would load it without its shortcuts
    model = tiny.make_model("llama")
    draw = torch.Generator().manual_seed(1)
    bases = [torch.linalg.qr(torch.randn(32, 32, generator=draw))[0] for _ in range(6)]
    turned = copy.deepcopy(model)
    with torch.no_grad():
        turned.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ bases[0])
        places = iter(zip(bases, [*bases[1:], None], strict=True))
        for layer, before, layout in zip(turned.model.layers, model.model.layers, layouts_of(model), strict=True):
            add_shortcuts(layer, layout.named)
            for branch in layout.branches:
                for name, tensor in turn_branch(branch, layout, dict(before.named_parameters()), *next(places)).items():
                    layer.get_parameter(name).copy_(tensor)
    torch.testing.assert_close(logits(turned), logits(model), rtol=1e-4, atol=1e-4)
    assert torch.equal(generated(turned), generated(model))


def test_gains_of_norms_go_into_the_linears_behind_them() -> None:
    model = tiny.make_model("llama", dtype=torch.float64)
    layout, block = layouts_of(model)[0], model.model.layers[0]
    tensors = dict(block.named_parameters())
    values = torch.randn(5, 32, dtype=torch.float64)
    for branch in layout.branches:
        turned = turn_branch(branch, layout, tensors, torch.eye(32), None)
        assert bool((turned[f"{branch.norm}.weight"] == 1).all())
        for reader in branch.readers:
            wanted = block.get_submodule(reader.name).weight @ block.get_submodule(branch.norm)(values).T
            normed = values * (values.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).rsqrt()
            torch.testing.assert_close(
                turned[f"{reader.name}.weight"] @ normed.T, wanted, rtol=1e-5, atol=1e-6
            )  # the class's norm is float32 inside


def test_what_is_lost_at_a_place_is_the_sum_of_the_other_eigenvalues() -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(200, 16, generator=draw) @ torch.randn(16, 16, generator=draw)
    gram = (values.T @ values).double()
    eigenvalues = torch.linalg.eigvalsh(gram).flip(0)
    for width in (1, 7, 16):
        basis = principal(gram, width)
        torch.testing.assert_close(basis.T @ basis, torch.eye(width), rtol=1e-5, atol=1e-5)
        lost = (values - values @ basis @ basis.T).double().square().sum()
        assert float(lost) == pytest.approx(float(eigenvalues[width:].sum()), rel=1e-4, abs=1e-3)
        seen = (values @ basis).square().sum(0)
        assert torch.equal(seen.sort(descending=True)[0], seen), "the largest comes first"


# Sliced


class Oracle:
    """A whole Llama in float64 whose stream is projected, found place by place from all tokens at once."""

    def __init__(self, folder: Path, ids: Tensor, width: int) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        self.projections: list[Tensor] = []  # behind the embedding, and behind each branch but the last
        for place in range(2 * len(self.model.model.layers)):
            stream = self.streams(ids)[place].reshape(-1, self.model.config.hidden_size)
            found = torch.linalg.eigh(stream.T @ stream)[1][:, -width:]
            self.projections.append(found @ found.T)

    def logits(self, ids: Tensor) -> Tensor:
        self.streams(ids)
        return self.found

    @torch.no_grad()
    def streams(self, ids: Tensor) -> list[Tensor]:
        """The stream at every place, projected at those that are known already."""
        model, seen = self.model.model, []
        places = {}
        with ExitStack() as stack:
            for index, layer in enumerate(model.layers):

                def enter(module: nn.Module, args: Any, index: int = index) -> Any:
                    seen.append(args[0])
                    places[index] = self.projected(args[0], 2 * index)
                    return (places[index], *args[1:])

                def attended(module: nn.Module, args: Any, output: Tensor, index: int = index) -> Tensor:
                    seen.append(places[index] + output)
                    return self.projected(places[index] + output, 2 * index + 1) - places[index]

                stack.callback(layer.register_forward_pre_hook(enter).remove)
                stack.callback(layer.self_attn.o_proj.register_forward_hook(attended).remove)
            self.found = self.model(ids).logits
        return seen

    def projected(self, stream: Tensor, place: int) -> Tensor:
        return stream @ self.projections[place] if place < len(self.projections) else stream


@pytest.mark.parametrize("by", ["channels", "parameters"])
def test_a_sliced_folder_computes_what_the_oracle_projects(by: str, tmp_path: Path, text: Path) -> None:
    tiny.save_model(tmp_path / "base", "llama", rms_norm_eps=0.1)
    result = cut(tmp_path / "base", tmp_path / "out", text, by=by)
    assert result.channels is not None
    assert result.channels[1] == {"channels": 24, "parameters": 16}[by]
    windows = calibration_windows(
        documents(str(text), "calibration"),
        load_tokenizer(tmp_path / "base", trust_remote_code=False),
        samples=WINDOWS,
        length=LENGTH,
        seed=0,
        sampling="random",
    )
    oracle = Oracle(tmp_path / "base", windows.ids, result.channels[1])
    found = logits(anywhere(tmp_path / "out"))
    wanted = oracle.logits(IDS).float()
    assert float((found - wanted).norm() / wanted.norm()) < 1e-3
    dense = logits(oracle.model).float()
    assert float((dense - wanted).norm() / dense.norm()) > 0.1, "much is sliced off"


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_exactly(tied: bool, tmp_path: Path, text: Path) -> None:
    tiny.save_model(tmp_path / "base", "qwen2", tie_word_embeddings=tied)
    result = cut(tmp_path / "base", tmp_path / "out", text)
    d, kept, inner, layers, vocabulary, keys = 32, 24, 48, 3, tiny.VOCABULARY, 16
    readers = kept * (d + 2 * keys + 2 * inner) + d + 2 * keys  # and biases of query, key and value
    block = readers + kept * (d + inner) + 2 * kept + 2 * kept**2
    last = (d - kept) * (inner + kept)  # the last perceptron adds to the model's own channels
    after = layers * block + last + vocabulary * (kept + d) + d
    assert result.parameters - result.removed == after
    before = layers * (d * (2 * d + 2 * keys + 3 * inner) + d + 2 * keys + 2 * d)
    assert (result.block_parameters, result.block_removed) == (before, before - layers * block - last)
    loaded = prunekit.load(tmp_path / "out", dtype="float32", device="cpu")
    assert sum(parameter.numel() for parameter in loaded.parameters()) == after
    assert result.summary()["channels"] == {"before": d, "after": kept}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| channels of the residual stream | 24 of 32 |" in card
    assert f"({result.block_removed:,} of {result.block_parameters:,})" in card
    assert "24 of 32 channels of the residual stream stay" in (tmp_path / "out" / "report.html").read_text()


def test_the_folder_says_what_it_is_and_every_verb_reads_it(tmp_path: Path, text: Path) -> None:
    tiny.save_model(tmp_path / "base", "llama")
    cut(tmp_path / "base", tmp_path / "out", text)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["hidden_size"], config["tie_word_embeddings"]) == (32, False)
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours = prunekit.load(tmp_path / "out", dtype="float32", device="cpu")
    assert torch.equal(logits(ours), logits(anywhere(tmp_path / "out")))
    found = prunekit.evaluate(tmp_path / "out", text=str(text), length=32, samples=2, dtype="float32")
    ids = calibration_windows(
        documents(str(text), "calibration"),
        load_tokenizer(tmp_path / "out", trust_remote_code=False),
        samples=2,
        length=32,
        seed=0,
        sampling="first",
    ).ids
    with torch.no_grad():
        loss = nn.functional.cross_entropy(ours(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert found.perplexity == pytest.approx(float(loss.exp()), rel=1e-4)
    inspected = prunekit.inspect(tmp_path / "out")
    assert inspected.sound
    assert {linear.shape for linear in inspected.linears if "shortcut" in linear.name} == {(24, 24), (32, 24)}
    again = prunekit.prune(
        tmp_path / "out",
        out=tmp_path / "sparse",
        method="wanda",
        sparsity=0.5,
        calibration={"source": str(text), "samples": 4, "length": 32},
    )
    assert again.verification is not None
    assert torch.isfinite(logits(anywhere(tmp_path / "sparse"))).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_was_rounded_is_what_was_computed_with(dtype: torch.dtype, tmp_path: Path, text: Path) -> None:
    tiny.save_model(tmp_path / "base", "llama", dtype=dtype)
    for computed in ("float32", str(dtype).removeprefix("torch.")):
        result = cut(tmp_path / "base", tmp_path / computed, text, dtype=computed)
        assert result.verification is not None
        assert result.verification.difference <= 1e-6
        entries = StreamedModel.open(tmp_path / computed, dtype="float32", device="cpu").reader.entries
        assert {entry.dtype for entry in entries.values()} == {dtype}


def test_in_files_and_streamed_it_is_the_same(tmp_path: Path, text: Path) -> None:
    tiny.save_model(tmp_path / "base", "llama")
    cut(tmp_path / "base", tmp_path / "memory", text)
    result = cut(tmp_path / "base", tmp_path / "files", text, memory_budget=1)
    assert result.verification is not None
    assert (result.verification.through, result.verification.difference) == ("streamed", 0.0)
    assert shards(tmp_path / "memory") == shards(tmp_path / "files")


# Width


def stream(ratio: str) -> Stream:
    return Stream(100, Fraction(ratio), 1000, lambda width: 10 * width + width**2 // 10)


def test_the_width_is_the_widest_that_leaves_the_ratio_out() -> None:
    assert [parameters(stream(ratio), align=1) for ratio in ("0", "0.2", "0.9", "0.999")] == [61, 52, 9, 0]
    assert parameters(stream("0.2"), align=8) == 48
    assert [channels(stream(ratio), align=8) for ratio in ("0", "0.2", "0.29", "0.95")] == [96, 80, 64, 0]
    assert channels(stream("0.29"), align=1) == 71, "0.29 is the decimal that was written"


def test_as_many_parameters_go_as_were_asked_for(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "base", "llama", num_hidden_layers=2, hidden_size=64)
    source = StreamedModel.open(tmp_path / "base", dtype="float32", device="cpu")
    whole = sum(p.numel() for p in source.module.model.layers.parameters())
    turned = Turned(source, layouts_of(source.module), 1)
    of = {width: Turned(source, turned.layouts, width).block_parameters() for width in range(1, 65)}
    width = parameters(Stream(64, Fraction("0.3"), whole, of.__getitem__), align=1)
    assert of[width] <= 0.7 * whole < of[width + 1]


# Resuming


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A folder with a model and the output of a run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    tiny.save_model(folder / "base", "llama", tie_word_embeddings=True)
    cut(folder / "base", folder / "out", text)
    return folder


@pytest.mark.parametrize("lost", [False, True], ids=["hidden-states-there", "hidden-states-lost"])
@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [(Writer, "write_shard", 0), (Writer, "write_shard", 2), (Writer, "write_shard", 3), (Journal, "note_hidden", 1)],
)
def test_a_killed_run_ends_in_the_same_bytes(
    owner: Any, name: str, call: int, lost: bool, whole: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, stop_at(call, getattr(owner, name)))
        with pytest.raises(KeyboardInterrupt):
            cut(whole / "base", tmp_path / "out", text)
    if lost:
        for path in (tmp_path / "out").glob(f"{HIDDEN_PREFIX}*"):
            path.unlink()
    cut(whole / "base", tmp_path / "out", text, resume=True)
    assert shards(tmp_path / "out") == shards(whole / "out")


@pytest.mark.parametrize("damaged", [1, 2])
def test_a_damaged_shard_is_made_again(damaged: int, whole: Path, text: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "write_index", lambda self, records: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            cut(whole / "base", tmp_path / "out", text)
    sorted((tmp_path / "out").glob("*.safetensors"))[damaged - 1].write_bytes(b"")
    cut(whole / "base", tmp_path / "out", text, resume=True)
    assert shards(tmp_path / "out") == shards(whole / "out")


# What is refused


@pytest.mark.parametrize("family", sorted(set(tiny.FAMILIES) - set(TURNS)))
def test_other_families_are_refused_in_a_sentence(family: str) -> None:
    with pytest.raises(
        InputError, match=r"does not compute the same with its residual stream turned: .*; take a method"
    ):
        layouts_of(tiny.make_model(family))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"residual_multiplier": 0.5}, "a turned block 0 does not return the turned outputs"),
        ({"embedding_multiplier": 2.0}, "more than an embedding is in what reaches the first block"),
        ({}, None),
    ],
)
def test_whether_a_model_can_be_turned_is_tried_and_not_looked_up(changes: dict[str, Any], why: str | None) -> None:
    sizes = {**tiny.FAMILIES["llama"], "attention_multiplier": 0.3, "logits_scaling": 3.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.FAMILIES, "granite", sizes)
        model = tiny.make_model("granite", **changes)
    if why is None:
        assert [branch.part for branch in layouts_of(model)[0].branches] == ["self_attn", "mlp"]
    else:
        with pytest.raises(InputError, match=why):
            layouts_of(model)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"ratio": 0.0}, "ratio 0 keeps all 32 channels"),
        ({"ratio": 0.9}, "ratio 0.9 leaves none of the 32 channels"),
        ({"parts": {"budget": {"align": 8}}}, "method 'slicegpt' has no budget"),
        ({"parts": {"width": {"name": "none"}}}, "needs a width"),
        ({"parts": {"width": {"name": "channel"}}}, "did you mean 'channels'"),
        ({"parts": {"width": {"align": 0}}}, "of at least 1"),
        ({"calibration": {"mode": "dense"}}, "behind all that is sliced before it"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    more: dict[str, Any], why: str, llama_folder: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=why):
        cut(llama_folder, tmp_path / "out", text, **more)
    assert not (tmp_path / "out").exists()


def test_a_sliced_folder_is_sliced_or_shrunk_or_padded_no_further(whole: Path, text: Path, tmp_path: Path) -> None:
    for method in ("slicegpt", "magnitude-sp"):
        with pytest.raises(InputError, match="was sliced, and shortcuts are in its blocks"):
            cut(whole / "out", tmp_path / "out", text, method=method, parts={})
    with pytest.raises(InputError, match="no stock class has a place for them"):
        prunekit.export(whole / "out", out=tmp_path / "out", pad=True)
