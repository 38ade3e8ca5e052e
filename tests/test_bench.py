"""`bench` next to another model: what is asked reaches both, memory comes from processes of their own, ratios go by repetition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import prunekit
import tiny
from prunekit import benching
from prunekit.benching import Memory
from prunekit.evaluation.speed import Round

SHORT: dict[str, Any] = {"prompt": 12, "tokens": 3, "repetitions": 2, "dtype": "float32", "device": "cpu"}


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What children would be asked for; a process takes seconds to start."""
    asked: list[dict[str, Any]] = []

    def fake(wanted: dict[str, Any]) -> Memory:
        asked.append(wanted)
        return Memory(1, 2, None)

    monkeypatch.setattr(benching, "_memory_in_child", fake)
    return asked


def test_a_model_alone_with_the_memory_of_a_process(llama_folder: Path) -> None:
    found = prunekit.bench(llama_folder, **SHORT)
    summary = found.summary()
    assert (summary["prompt"], summary["tokens"], summary["repetitions"], summary["warmup"]) == (12, 3, 2, 1)
    assert (summary["against"], summary["ratios"]) == (None, None)
    for figure in ("prefill_tokens_per_second", "first_token_seconds", "decode_tokens_per_second"):
        assert 0 < summary[figure]["low"] <= summary[figure]["median"] <= summary[figure]["high"]
    memory = summary["memory"]
    assert 50e6 < memory["before"] < memory["peak"] < 2e9
    assert memory["device"] is None


def test_two_models_by_repetition(
    tmp_path: Path, llama_folder: Path, no_child: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save_sparse(tmp_path / "sparse", "llama")
    rounds = [[Round(10, 2, 6), Round(30, 2, 8), Round(20, 2, 9)], [Round(10, 1, 3), Round(10, 2, 8), Round(10, 4, 3)]]
    monkeypatch.setattr(benching, "measure", lambda *_, **__: rounds)
    found = prunekit.bench(tmp_path / "sparse", against=llama_folder, **SHORT)
    summary = found.summary()
    # medians of the ratios, not ratios of the medians
    assert summary["ratios"]["prefill"] == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert summary["ratios"]["first_token"] == {"median": 1.0, "low": 0.5, "high": 2.0}
    assert summary["ratios"]["decode"] == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert summary["pattern"] == "unstructured"
    assert summary["against"]["pattern"] == "dense"
    assert summary["against"]["model"] == str(llama_folder)
    assert [wanted["folder"] for wanted in no_child] == [str(tmp_path / "sparse"), str(llama_folder)]


def test_the_runtime_is_that_of_the_model_alone(
    llama_folder: Path, no_child: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = benching.load_model, []

    def load(folder: Path, *, runtime: str, **options: Any) -> Any:
        asked.append(runtime)
        return real(folder, **options)

    monkeypatch.setattr(benching, "load_model", load)
    monkeypatch.setattr(benching, "resolve_place", lambda device, runtime: device)
    prunekit.bench(llama_folder, against=llama_folder, runtime="2:4", **SHORT)
    assert asked == ["2:4", "dense"]
    assert [wanted["options"]["runtime"] for wanted in no_child] == ["2:4", "dense"]


def test_a_packed_folder_is_measured_like_any(tmp_path: Path, no_child: list[Any]) -> None:
    tiny.save_sparse(tmp_path / "plain", "llama")
    prunekit.export(tmp_path / "plain", out=tmp_path / "packed", format="bitmask")
    found = prunekit.bench(tmp_path / "packed", against=tmp_path / "plain", **SHORT)
    packed, plain = (measured.footprint for measured in found.measured)
    assert packed.files == packed.bitmask == plain.bitmask < plain.files
    assert packed.nonzero_flops == plain.nonzero_flops
    assert packed.zlib == pytest.approx(plain.zlib, rel=0.01)


def test_a_child_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\necho Traceback >&2\necho 'MemoryError: enough' >&2\nexit 3\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(prunekit.PrunekitError, match=r"'MODEL' .* failed \(exit code 3\): MemoryError: enough"):
        benching._memory_in_child({"folder": "MODEL"})


def test_what_cannot_be_measured_is_refused(llama_folder: Path, tmp_path: Path, no_child: list[Any]) -> None:
    for change, message in (
        ({"prompt": 200}, "do not fit the model's 128 positions"),
        ({"repetitions": 0}, "measure nothing"),
        ({"runtime": "2:4"}, "NVIDIA"),
        ({"against": tmp_path / "nowhere"}, "does not exist"),
    ):
        with pytest.raises(prunekit.InputError, match=message):
            prunekit.bench(llama_folder, **{**SHORT, **change})
    assert no_child == []
