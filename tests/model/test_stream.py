"""The test that counts: blocks streamed one at a time reproduce the plain model's logits, for every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import tiny
from helpers import draw_ids, streamed
from prunekit.errors import InputError
from prunekit.model.source import ResidentModel, StreamedModel
from prunekit.model.stream import Recorder, Walk, Windows, split_call

pytestmark = pytest.mark.usefixtures("seeded")


def streamed_logits(source: StreamedModel | ResidentModel, windows: Windows, batch: int) -> torch.Tensor:
    walk = Walk(source, windows, batch)
    walk.start()
    for block in source.anatomy.blocks:
        walk.run(block.index, source.load_block(block.index))
        source.free_block(block.index)
    source.load_outer(windows.ids, "whole")
    return torch.stack([walk.logits(hidden, ids) for hidden, ids in zip(walk.hidden[:], windows.ids, strict=True)])


def plain_logits(model: PreTrainedModel, windows: Windows, batch: int) -> torch.Tensor:
    parts = []
    for start in range(0, len(windows), batch):
        part = windows[start : start + batch]
        mask = None if part.keep is None else part.keep.long()
        with torch.inference_mode():
            parts.append(model(part.ids, attention_mask=mask).logits)
    return torch.cat(parts)


def assert_same(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-6) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_streamed_blocks_reproduce_the_plain_logits(family: str, tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path, family)
    ids = draw_ids(3, 24)
    with torch.inference_mode():
        expected = torch.cat([model(ids[:2]).logits, model(ids[2:]).logits])
    source = streamed(tmp_path)
    found = streamed_logits(source, Windows(ids), batch=2)
    assert_same(found, expected)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_resident_model_gives_the_same_and_is_left_as_it_was(family: str) -> None:
    model = tiny.make_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [(name, id(module)) for name, module in model.named_modules()]
    windows = Windows(draw_ids(3, 24))
    expected = plain_logits(model, windows, batch=2)
    assert_same(streamed_logits(ResidentModel(model), windows, batch=2), expected)
    assert [(name, id(module)) for name, module in model.named_modules()] == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_padded_windows_reproduce_the_logits_of_real_tokens(family: str, side: str, tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path, family)
    lengths = [24, 15, 20]  # the second batch is all padded, the first only in part
    keep = torch.zeros(3, 24, dtype=torch.bool)
    for row, length in enumerate(lengths):
        keep[row, :length] = True
    windows = Windows(draw_ids(3, 24), keep if side == "right" else keep.flip(1))
    assert windows.keep is not None
    assert windows.tokens == sum(lengths)
    expected = plain_logits(model, windows, batch=2)
    found = streamed_logits(streamed(tmp_path), windows, batch=2)
    assert_same(found[windows.keep], expected[windows.keep])
    # The mask must have mattered, or the comparison above says nothing.
    unmasked = plain_logits(model, Windows(windows.ids), batch=2)
    if side == "left":
        assert (unmasked[windows.keep] - expected[windows.keep]).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "opt", "gemma3_text"])
def test_how_windows_are_batched_does_not_matter(family: str) -> None:
    source = ResidentModel(tiny.make_model(family))
    keep = torch.ones(5, 16, dtype=torch.bool)
    keep[3, 9:] = False
    windows = Windows(draw_ids(5, 16), keep)
    one, three = (streamed_logits(source, windows, batch)[keep] for batch in (1, 3))
    assert_same(three, one, 1e-5)


def test_batches_cover_every_window_once_and_the_last_may_be_short() -> None:
    source = ResidentModel(tiny.make_model("llama"))
    windows = Windows(draw_ids(5, 7))  # an odd length, too
    walk = Walk(source, windows, 2)
    assert [(part.start, part.stop) for part in walk.batches] == [(0, 2), (2, 4), (4, 5)]
    assert_same(streamed_logits(source, windows, 2), plain_logits(source.module, windows, 5), 1e-5)
    assert [(part.start, part.stop) for part in Walk(source, windows, 9).batches] == [(0, 5)]
    # by default as many windows as hold 2048 tokens, and at least one
    assert [part.stop - part.start for part in Walk(source, Windows(torch.zeros(5, 1000).long())).batches] == [2, 2, 1]
    assert len(Walk(source, Windows(torch.zeros(2, 5000).long())).batches) == 2


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt", "falcon"])
def test_bfloat16_forward_of_a_float32_checkpoint(family: str, tmp_path: Path) -> None:
    tiny.save_model(tmp_path, family)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    windows = Windows(draw_ids(3, 16))
    found = streamed_logits(streamed(tmp_path, torch.bfloat16), windows, batch=2)
    assert torch.equal(found, plain_logits(model, windows, batch=2)), "the same operations on the same numbers"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_base_models_checkpoint_without_prefix(family: str, tmp_path: Path) -> None:
    # Tied, or the head would be missing from what the base model saves.
    model = tiny.make_model(family, tie_word_embeddings=True)
    model.base_model.save_pretrained(tmp_path)
    source = streamed(tmp_path)
    assert not any(key.startswith(("model.", "transformer.")) for key in source.reader.entries)
    windows = Windows(draw_ids(2, 16))
    assert_same(streamed_logits(source, windows, batch=2), plain_logits(model, windows, batch=2))


def test_a_base_models_checkpoint_without_its_head_is_refused(tmp_path: Path) -> None:
    tiny.make_model("llama", tie_word_embeddings=False).base_model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"lacks 1 tensors .*'lm_head\.weight'"):
        streamed(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_in_memory_only_between_load_and_free(tied: bool, tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path, "llama", tie_word_embeddings=tied)
    source = streamed(tmp_path)

    def loaded() -> set[str]:
        return {name for name, parameter in source.module.named_parameters() if parameter.device.type != "meta"}

    outer = {"model.embed_tokens.weight", "model.norm.weight"} | (set() if tied else {"lm_head.weight"})
    assert loaded() == set()
    source.load_outer(draw_ids(1, 8), "whole")
    assert loaded() == outer
    assert (source.module.lm_head.weight is source.module.model.embed_tokens.weight) == tied
    assert torch.equal(source.module.lm_head.weight, model.lm_head.weight)
    block = source.load_block(1)
    assert loaded() == outer | {name for name, _ in model.named_parameters() if name.startswith("model.layers.1.")}
    assert torch.equal(block.mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)
    source.free_outer()
    source.free_block(1)
    assert loaded() == set()
    assert source.stored == {}
    assert (source.module.lm_head.weight is source.module.model.embed_tokens.weight) == tied
    assert source.parameter_count == sum(parameter.numel() for parameter in model.parameters())

    windows = Windows(draw_ids(2, 8))
    streamed_logits(source, windows, batch=1)
    source.free_outer()
    assert loaded() == set(), "a whole walk leaves nothing behind either"


def test_a_recorder_notes_its_call_and_reads_like_its_block() -> None:
    model = tiny.make_model("gemma3_text")
    block = model.model.layers[1]
    recorder = Recorder(block, {type(block): None})
    block.attention_type = "sliding"  # what some models read of their blocks before they call them
    assert recorder.attention_type == "sliding"
    assert recorder.self_attn is block.self_attn
    assert list(recorder.parameters()) == [], "the block is not the recorder's child"
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = recorder.no_such_thing

    hidden = torch.randn(2, 3, 4)
    assert recorder(hidden, "positional", flag=True) is hidden
    assert recorder.hidden is hidden
    assert recorder.call is not None
    assert (recorder.call.before, recorder.call.after, recorder.call.named) == ((), ("positional",), {"flag": True})
    recorder.answer = torch.zeros(1)
    assert recorder(hidden) is recorder.answer
    assert Recorder(block, {type(block): 2})(hidden) == (hidden, None, None), "in the form the block returns"


def test_split_call_and_replay_are_inverse() -> None:
    def block(*args: object, **kwargs: object) -> object:
        return args, kwargs

    hidden, other, mask = torch.randn(1, 2, 3), torch.randn(1, 2, 3), torch.ones(1, 2, 3, dtype=torch.long)
    for args, kwargs in (
        ((hidden, other), {"flag": 1}),
        ((mask, hidden, "last"), {}),  # integers are no hidden states
        ((), {"rotary": other, "hidden_states": hidden}),  # the name decides where there is one
        ((mask,), {"states": hidden, "flag": None}),
    ):
        split, call = split_call(args, kwargs)
        assert split is hidden
        assert call.replay(block, hidden) == (args, kwargs)
    with pytest.raises(InputError, match="without hidden states"):
        split_call((mask, torch.randn(2, 3)), {"flag": 1})


def test_hidden_states_are_what_the_model_hands_its_blocks() -> None:
    model = tiny.make_model("gemma2")  # it scales its embeddings, so they are not the first hidden states
    windows = Windows(draw_ids(3, 12))
    seen: list[list[torch.Tensor]] = [[], [], []]
    handles = [
        block.register_forward_pre_hook(lambda _, args, seen=seen[index]: seen.append(args[0].clone()))
        for index, block in enumerate(model.model.layers)
    ]
    plain_logits(model, windows, batch=3)
    for handle in handles:
        handle.remove()
    source = ResidentModel(model)
    walk = Walk(source, windows, 3)
    walk.start()
    for index, block in enumerate(model.model.layers):
        assert_same(walk.hidden[:], seen[index][0])
        walk.run(index, block)


def test_activations_that_are_not_finite_name_the_block() -> None:
    model = tiny.make_model("llama")
    source = ResidentModel(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(float("nan"))
    walk = Walk(source, Windows(draw_ids(2, 8)), 1)
    walk.start()
    walk.run(0, source.load_block(0))
    with pytest.raises(
        InputError, match=r"block 1 \('model\.layers\.1'\) hold NaN or infinite values in torch\.float32"
    ):
        walk.run(1, source.load_block(1))


@pytest.mark.parametrize("place", ["model.embed_tokens", "model.norm"])
def test_blocks_are_back_in_place_after_an_exception(place: str) -> None:
    model = tiny.make_model("llama")
    source = ResidentModel(model)
    blocks = list(model.model.layers)
    windows = Windows(draw_ids(2, 8))
    walk = Walk(source, windows, 1)
    walk.start()

    class StopHereError(Exception):
        pass

    def stop(*_: object) -> None:
        raise StopHereError

    handle = model.get_submodule(place).register_forward_hook(stop)
    for failing in (Walk(source, windows, 1).start, lambda: walk.logits(walk.hidden[:][0], windows.ids[0])):
        with pytest.raises(StopHereError):
            failing()
        assert all(found is block for found, block in zip(model.model.layers, blocks, strict=True))
    handle.remove()


def test_a_model_that_skips_a_block_is_refused() -> None:
    class Skipping(nn.Module):
        """Calls its first two blocks only."""

        def __init__(self, model: PreTrainedModel) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
            hidden = self.model.model.embed_tokens(input_ids)
            for block in list(self.model.model.layers)[:2]:
                hidden = block(hidden, position_embeddings=self.model.model.rotary_emb(hidden, input_ids))
            return hidden

    source = ResidentModel(Skipping(tiny.make_model("llama")))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="does not call every block"):
        Walk(source, Windows(draw_ids(1, 8)), 1).start()


@pytest.mark.parametrize(("length", "tokens"), [(16, 8), (5, 5)])
def test_a_probe_is_short_and_always_the_same(length: int, tokens: int) -> None:
    walk = Walk(ResidentModel(tiny.make_model("gemma2")), Windows(draw_ids(3, length)))
    walk.prepare()
    found = [walk.run_probe(1, walk.source.load_block(1)) for _ in range(2)]
    assert found[0].shape == (1, tokens, 32)
    assert torch.equal(*found)
    assert not torch.equal(found[0], walk.run_probe(2, walk.source.load_block(2)))
