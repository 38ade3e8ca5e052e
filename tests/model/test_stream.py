"""The test that counts: blocks streamed one at a time reproduce the plain model's logits, for every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from prunekit.checkpoint.reader import Reader
from prunekit.model.source import ResidentModel, StreamedModel
from prunekit.model.stream import Walk, Windows


def streamed_logits(source: StreamedModel | ResidentModel, windows: Windows, batch: int) -> torch.Tensor:
    walk = Walk(source, windows, batch)
    walk.start()
    for block in source.anatomy.blocks:
        walk.run(block.index, source.load_block(block.index))
        source.free_block(block.index)
    source.load_outer()
    return torch.stack([walk.logits(hidden, ids) for hidden, ids in zip(walk.hidden, windows.ids, strict=True)])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_streamed_blocks_reproduce_the_plain_logits(family: str, tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path, family)
    ids = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = torch.cat([model(ids[:2]).logits, model(ids[2:]).logits])
    source = StreamedModel(Reader(tmp_path), torch.float32, torch.device("cpu"))
    found = streamed_logits(source, Windows(ids), batch=2)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()
