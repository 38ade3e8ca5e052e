"""What lies outside the blocks takes the memory of the rows that are used; blocks read ahead are the blocks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import prunekit
import tiny
from helpers import streamed
from prunekit.checkpoint.reader import SINGLE_NAME, Reader
from prunekit.errors import InputError, StorageError
from prunekit.model.source import ResidentModel
from prunekit.model.stream import Walk, Windows

# tied and not, with and without projections, scaling, soft-capping, biases and norms behind the embedding
FAMILIES = ["llama", "gemma2", "gpt2", "opt", "falcon", "bloom", "gpt_neox"]


def some_ids() -> torch.Tensor:
    return torch.tensor([[3, 17, 3], [250, 0, 97]])


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large tensors are read in so many chunks that one of them is never enough."""
    monkeypatch.setattr("prunekit.checkpoint.reader._CHUNK_BYTES", 1000)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", ["none", "chunked"])
def test_of_the_embedding_only_the_rows_asked_for_are_real(
    head: Any, dtype: torch.dtype, tied: bool, tmp_path: Path, small_chunks: None
) -> None:
    model = tiny.save_model(tmp_path, "llama", tie_word_embeddings=tied)
    source = streamed(tmp_path, dtype)
    source.load_outer(some_ids(), head)
    expected = torch.zeros(tiny.VOCABULARY, 32, dtype=dtype)
    rows = some_ids().unique()
    expected[rows] = model.get_input_embeddings().weight[rows].to(dtype)
    assert torch.equal(source.module.get_input_embeddings().weight, expected)
    assert torch.equal(source.module.model.norm.weight, model.model.norm.weight.to(dtype)), "the rest is there"
    source.load_outer(torch.tensor([5]), head)
    assert not source.module.get_input_embeddings().weight[17].any(), "nothing stays of what was asked before"
    assert torch.equal(source.module.get_input_embeddings().weight[5], model.get_input_embeddings().weight[5].to(dtype))


@pytest.mark.parametrize("tied", [True, False])
def test_with_the_whole_head_everything_that_is_used_is_real(tied: bool, tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path, "llama", tie_word_embeddings=tied)
    source = streamed(tmp_path)
    source.load_outer(some_ids(), "whole")
    rows = slice(None) if tied else some_ids().unique()
    assert torch.equal(source.module.lm_head.weight, model.lm_head.weight)
    assert torch.equal(source.module.get_input_embeddings().weight[rows], model.get_input_embeddings().weight[rows])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_multiplied_in_chunks_gives_the_whole_heads_logits(
    dtype: torch.dtype, family: str, tmp_path: Path, small_chunks: None
) -> None:
    model = tiny.save_model(tmp_path, family)
    source = streamed(tmp_path, dtype)
    ids = some_ids()
    walk = Walk(source, Windows(ids), 2)
    walk.start()
    walk.run_all()
    hidden, flat = walk.hidden[:].flatten(0, 1), ids.flatten()
    source.load_outer(flat, "whole")
    whole = walk.logits(hidden, flat)
    source.load_outer(flat, "chunked")
    chunked = walk.logits(hidden, flat)
    assert chunked.dtype == whole.dtype
    # the same products in another order of sums, where the library splits them by the number of rows
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert (chunked - whole).abs().max() <= tolerance * whole.abs().max()
    if dtype == torch.float32:
        with torch.inference_mode():
            expected = model(ids).logits.flatten(0, 1)
        assert (chunked - expected).abs().max() <= 2e-6 * expected.abs().max()
    source.free_outer()
    head = source.module.get_output_embeddings()
    assert "forward" not in vars(head), "the head is itself again"
    assert head.weight.device.type == "meta"


def test_a_chunked_head_with_a_bias(tmp_path: Path, small_chunks: None) -> None:
    tiny.save_model(tmp_path, "phi3", tie_word_embeddings=False)
    source = streamed(tmp_path)
    source.load_outer(some_ids(), "chunked")
    head = source.module.lm_head
    head.bias = torch.nn.Parameter(torch.arange(float(tiny.VOCABULARY)), requires_grad=False)
    weight = load_file(tmp_path / SINGLE_NAME)["lm_head.weight"]
    hidden = torch.randn(2, 3, 32)
    assert torch.allclose(head(hidden), hidden @ weight.t() + head.bias, atol=1e-5)


@pytest.mark.parametrize("head", ["none", "chunked", "whole"])
def test_a_row_that_is_not_finite_is_refused_though_nobody_asks_for_it(head: Any, tmp_path: Path) -> None:
    tiny.save_model(tmp_path, "llama", tie_word_embeddings=False)
    tensors = load_file(tmp_path / SINGLE_NAME)
    tensors["model.embed_tokens.weight"][200, 3] = float("nan")
    save_file(tensors, tmp_path / SINGLE_NAME, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"'model\.embed_tokens\.weight' \(outside the blocks\) holds 1 NaN"):
        streamed(tmp_path).load_outer(some_ids(), head)


MEASURE = """
import sys
from pathlib import Path
import torch
from prunekit.checkpoint.reader import Reader
from prunekit.machine import return_memory, rss_bytes
from prunekit.model.source import StreamedModel
source = StreamedModel(Reader(Path(sys.argv[1])), torch.float32, torch.device("cpu"))
source.load_outer(torch.arange(8))
source.free_outer()
grown = []
spread = torch.arange(0, 600_000, 20_000)
for ids, head in ((spread, "none"), (spread, "chunked"), (spread, "whole")):
    return_memory()
    before = rss_bytes()
    source.load_outer(ids, head)
    if head == "chunked":
        source.module.lm_head(torch.ones(1, 32))
    return_memory()  # buffers the file was read through
    grown.append(rss_bytes() - before)
    source.free_outer()
print(*grown)
"""


def test_a_large_vocabulary_takes_the_memory_of_the_rows_that_are_used(tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc to know what a process takes")
    vocabulary = 600_000
    tiny.save_model(tmp_path, "llama", vocab_size=vocabulary, tie_word_embeddings=True)
    size = vocabulary * 32 * 4
    path = os.pathsep.join([str(Path(prunekit.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=True,
    )
    few, chunked, whole = map(int, done.stdout.split())
    assert few < size / 3
    assert chunked < size / 3
    assert whole > size * 0.9, "or the figures above say nothing"


def test_what_lies_outside_can_be_reloaded_for_other_tokens_by_a_model_in_memory() -> None:
    model = tiny.make_model("llama")
    before = model.get_input_embeddings().weight.clone()
    source = ResidentModel(model)
    source.load_outer(some_ids(), "chunked")
    source.prefetch(1)
    source.free_outer()
    source.free_block(1)
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert source.load_block(1) is model.model.layers[1]


# Blocks that are read ahead.


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What is read, a name of each, and by which thread."""
    noted: list[tuple[str, str]] = []
    real = Reader.read

    def read(self: Reader, names: Iterable[str], *, pinned: bool = False) -> dict[str, torch.Tensor]:
        names = list(names)
        noted.append((names[0], threading.current_thread().name))
        return real(self, names, pinned=pinned)

    monkeypatch.setattr(Reader, "read", read)
    return noted


def test_a_block_read_ahead_is_the_block(llama_folder: Path, reads: list[tuple[str, str]]) -> None:
    plain, ahead = streamed(llama_folder), streamed(llama_folder)
    for index in range(3):
        plain.load_block(index)
        ahead.prefetch(index)
        module = ahead.load_block(index)
        assert ahead.stored[index].keys() == plain.stored[index].keys()
        assert all(torch.equal(tensor, plain.stored[index][name]) for name, tensor in ahead.stored[index].items())
        assert torch.equal(module.mlp.up_proj.weight, plain.stored[index][f"model.layers.{index}.mlp.up_proj.weight"])
    assert [thread.startswith("prunekit-read") for _, thread in reads] == [False, True] * 3


def test_a_block_is_read_once_however_often_it_is_asked_for(llama_folder: Path, reads: list[tuple[str, str]]) -> None:
    source = streamed(llama_folder)
    source.prefetch(1)
    source.prefetch(1)
    source.load_block(1)
    source.load_block(1)
    source.prefetch(1)  # it is here
    source.prefetch(3)  # there is none
    source.load_block(1)
    assert len(reads) == 1
    source.free_block(1)
    source.load_block(1)
    assert len(reads) == 2


def test_reading_another_block_ahead_forgets_the_first(llama_folder: Path, reads: list[tuple[str, str]]) -> None:
    source = streamed(llama_folder)
    source.prefetch(0)
    source.prefetch(2)
    first, last = source.load_block(0), source.load_block(2)
    plain = streamed(llama_folder)
    assert torch.equal(first.mlp.up_proj.weight, plain.load_block(0).mlp.up_proj.weight)
    assert torch.equal(last.mlp.up_proj.weight, plain.load_block(2).mlp.up_proj.weight)
    names = [name.split(".")[2] for name, thread in reads if thread.startswith("prunekit-read")]
    assert names == ["0", "2"]


def test_two_reads_ahead_do_not_share_memory(llama_folder: Path) -> None:
    source = streamed(llama_folder)
    source.prefetch(0)
    source.load_block(0)
    source.prefetch(1)
    source.load_block(1)
    for tensor in source.stored[0].values():
        tensor.zero_()
    assert all(tensor.any() for tensor in source.stored[1].values())


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_what_goes_wrong_ahead_is_told_when_the_block_is_asked_for(llama_folder: Path, damage: str) -> None:
    source = streamed(llama_folder)
    path = llama_folder / SINGLE_NAME
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    else:
        path.unlink()
    source.prefetch(2)
    with pytest.raises(StorageError, match=r"model\.safetensors"):
        source.load_block(2)
    path.write_bytes(whole)
    source.load_block(2)  # and nothing of it is kept


def test_a_damaged_block_read_ahead_is_refused_when_it_is_asked_for(llama_folder: Path) -> None:
    tensors = load_file(llama_folder / SINGLE_NAME)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, llama_folder / SINGLE_NAME, metadata={"format": "pt"})
    source = streamed(llama_folder)
    source.prefetch(1)
    with pytest.raises(InputError, match=r"up_proj\.weight' \(block 1\) holds 1 NaN or infinite"):
        source.load_block(1)


def test_tensors_given_for_a_block_are_taken_instead(llama_folder: Path, reads: list[tuple[str, str]]) -> None:
    source = streamed(llama_folder)
    given = {name: tensor * 2 for name, tensor in streamed(llama_folder).reader.read(source.block_keys(1)).items()}
    reads.clear()
    module = source.load_block(1, given)
    assert torch.equal(module.mlp.up_proj.weight, given["model.layers.1.mlp.up_proj.weight"])
    assert source.stored[1] is given
    assert reads == []
