"""Pictures show what they were given. What studies draw is looked at in test_study.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from prunekit.inspection import read_weight
from prunekit.report import plots
from tiny import save_model


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    found: list[Figure] = []
    save = Figure.savefig

    def note(self: Figure, *words: Any, **options: Any) -> None:
        found.append(self)
        save(self, *words, **options)

    monkeypatch.setattr(Figure, "savefig", note)
    return found


def parts_of(figure: Figure) -> tuple[Any, Any, Any]:
    """The heat map's image, the line of column norms, that of row norms."""
    by_label = {axes.get_xlabel() or axes.get_ylabel(): axes for axes in figure.axes}
    columns, rows = by_label["column\nnorm"].lines[0], by_label["row norm"].lines[0]
    (image,) = (axes.images[0] for axes in figure.axes if axes.images)
    return image, columns, rows


def test_a_weight_is_drawn_with_its_norms(tmp_path: Path, drawn: list[Figure]) -> None:
    weight = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    plots.draw_weight(weight, "some.linear", tmp_path / "w.png")
    image, columns, rows = parts_of(drawn[0])
    torch.testing.assert_close(torch.tensor(image.get_array().data), weight.abs())
    torch.testing.assert_close(torch.tensor(columns.get_ydata()), weight.square().sum(0).sqrt())
    torch.testing.assert_close(torch.tensor(rows.get_xdata()), weight.square().sum(1).sqrt())
    assert list(rows.get_ydata()) == list(range(12))
    title = drawn[0].get_suptitle()
    assert "some.linear" in title
    assert "[12 × 20], 8.3% zeros" in title


def test_a_large_weight_is_averaged_over_blocks(
    tmp_path: Path, drawn: list[Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "_FINEST", 4)
    weight = torch.randn(4, 10, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    plots.draw_weight(weight, "w", tmp_path / "w.png")
    image, columns, _ = parts_of(drawn[0])
    size = weight.float().abs()
    blocks = [size[:, 0:3], size[:, 3:6], size[:, 6:9], size[:, 9:]]  # the last one has only what is left
    torch.testing.assert_close(torch.tensor(image.get_array().data), torch.stack([b.mean(1) for b in blocks], 1))
    assert len(columns.get_ydata()) == 10
    assert image.get_extent() == [0.0, 12.0, 4.0, 0.0]
    assert image.axes.get_xlim() == (0.0, 10.0)
    assert any("mean of 1 × 3 entries" in axes.get_ylabel() for axes in drawn[0].axes)


def test_a_weight_of_zeros_can_be_drawn(tmp_path: Path) -> None:
    plots.draw_weight(torch.zeros(3, 5), "w", tmp_path / "w.svg")
    assert (tmp_path / "w.svg").stat().st_size > 0


@pytest.mark.parametrize(
    ("family", "name"), [("llama", "model.layers.2.mlp.down_proj"), ("gpt2", "transformer.h.1.mlp.c_fc")]
)
def test_a_weight_is_read_as_out_by_in(family: str, name: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "m", family)
    stored = model.get_submodule(name).weight
    assert isinstance(stored, torch.Tensor)
    expected = stored.detach().T if family == "gpt2" else stored.detach()
    assert torch.equal(read_weight(tmp_path / "m", name), expected)
