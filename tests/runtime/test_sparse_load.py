"""`runtime="sparse"`: the model of the dense run, in the memory of packed weights, for every verb that computes; refusals."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import prunekit
import tiny
from prunekit import benching, loading
from prunekit.checkpoint.bitmask import packed_bytes
from prunekit.errors import PrunekitWarning
from prunekit.runtime.linear import PackedLinear
from prunekit.runtime.packed import PADDING, Packed
from test_cli import call

IDS = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(1))
SPARSE: dict[str, Any] = {"runtime": "sparse", "device": "cpu"}


def logits(model: PreTrainedModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(ids).logits
    return found.float()


def greedy(model: PreTrainedModel, ids: torch.Tensor) -> list[int]:
    found: list[int] = model.generate(ids, max_new_tokens=16, do_sample=False)[0].tolist()
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of which half is zero, `plain` and `packed`; for reading only."""
    folder = tmp_path_factory.mktemp("folders")
    tiny.save_sparse(folder / "plain", "llama", dtype=torch.bfloat16)
    prunekit.export(folder / "plain", out=folder / "packed", format="bitmask")
    return folder


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_computes_what_the_dense_run_does(family: str, tmp_path: Path) -> None:
    tiny.save_sparse(tmp_path / "plain", family)
    prunekit.export(tmp_path / "plain", out=tmp_path / "packed", format="bitmask")
    expected = prunekit.load(tmp_path / "plain", dtype="float32", device="cpu")
    for folder in (tmp_path / "plain", tmp_path / "packed"):
        model = prunekit.load(folder, dtype="float32", **SPARSE)
        assert type(model) is type(expected)
        assert not model.training
        assert sum(isinstance(module, PackedLinear) for module in model.modules()) >= 12
        assert model.generation_config.to_dict() == expected.generation_config.to_dict()
        torch.testing.assert_close(logits(model), logits(expected), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logits(model, IDS[:1, :3]), logits(expected, IDS[:1, :3]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_greedy_text_is_the_same(dtype: str, folders: Path) -> None:
    dense = prunekit.load(folders / "plain", dtype=dtype, device="cpu")
    sparse = prunekit.load(folders / "plain", dtype=dtype, **SPARSE)
    gap = (logits(sparse) - logits(dense)).norm() / logits(dense).norm()
    assert gap < {"float32": 1e-5, "bfloat16": 2**-7, "float16": 2**-10}[dtype]
    for ids in torch.split(torch.cat([IDS[:, :5], IDS[:, 5:10], IDS[:, 10:15]]), 1):
        assert greedy(sparse, ids) == greedy(dense, ids)


def test_shapes_that_no_stock_config_has(tmp_path: Path) -> None:
    tiny.save_sparse(tmp_path / "sparse", "llama")
    prunekit.prune(
        tmp_path / "sparse",
        out=tmp_path / "free",
        method="random",
        ratio=0.2,
        parts={"budget": {"shape": "free"}},
        dtype="float32",
    )
    dense = prunekit.load(tmp_path / "free", dtype="float32", device="cpu")
    torch.testing.assert_close(
        logits(prunekit.load(tmp_path / "free", dtype="float32", **SPARSE)), logits(dense), atol=1e-4, rtol=1e-4
    )


def test_the_head_is_fed_in_one_piece(folders: Path) -> None:
    """Or torch copies its weight for every prompt."""
    model = prunekit.load(folders / "plain", dtype="bfloat16", **SPARSE)
    seen: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].stride()))
    with torch.inference_mode():
        last = model(IDS[:1], logits_to_keep=1).logits
    assert seen == [(32, 32, 1)]
    torch.testing.assert_close(last[0, 0].float(), logits(model, IDS[:1])[0, -1], atol=0.1, rtol=0.05)


# memory


def test_memory_is_that_of_packed_weights(folders: Path) -> None:
    for dtype, width in (("bfloat16", 2), ("float32", 2)):  # what is stored in 16 bits stays so
        model = prunekit.load(folders / "packed", dtype=dtype, **SPARSE)
        packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
        assert len(packed) == 21
        for module in packed:
            rows, columns = module.out_features, module.in_features
            kept = int(torch.count_nonzero(module.unpacked()))
            padding = rows * (8 - columns // 8) + PADDING * width + 8 * (rows + 1)  # up to a word, behind, offsets
            taken = sum(buffer.numel() * buffer.itemsize for buffer in module.buffers())
            assert taken == packed_bytes(rows, columns, kept, width) + padding
        assert sum(parameter.numel() for parameter in model.model.layers.parameters()) == 6 * 32  # norms


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_one_weight_at_a_time_is_dense(kind: str, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []

    class Counted(Packed):
        @classmethod
        def of_parts(cls, *given: Any) -> Packed:
            if len(alive) % 7 == 6:  # the last linear of a block; looking at all objects takes a while
                sizes = [one.shape for one in gc.get_objects() if type(one) is torch.Tensor]
                assert sum(size in ((48, 32), (32, 48)) for size in sizes) <= 1
            alive.append(1)
            return Packed.of_parts(*given)

    monkeypatch.setattr(loading, "Packed", Counted)
    prunekit.load(folders / kind, dtype="bfloat16", **SPARSE)
    assert len(alive) == 21


def test_what_does_not_fit_is_refused(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunekit.machine.available_memory_bytes", lambda: 1000)
    with pytest.raises(prunekit.InputError, match=r"0\.00 GB are free"):
        prunekit.load(folders / "plain", **SPARSE)


# verbs


def test_perplexity_and_tasks(folders: Path, text_file: Path, tmp_path: Path) -> None:
    line = {"choices": [" quick", " brown fox"], "label": 0}
    task = tmp_path / "task.jsonl"
    task.write_text("".join(json.dumps({**line, "context": word}) + "\n" for word in ("one", "two", "three")))
    asked: dict[str, Any] = {"text": str(text_file), "length": 32, "samples": 4, "tasks": str(task), "dtype": "float32"}
    dense = prunekit.evaluate(folders / "plain", device="cpu", **asked)
    sparse = prunekit.evaluate(folders / "packed", against=folders / "plain", **asked, **SPARSE)
    assert sparse.perplexity == pytest.approx(dense.perplexity, rel=1e-5)
    assert sparse.texts[0].before == pytest.approx(dense.perplexity, rel=1e-6)
    assert [row.value for row in sparse.tasks] == [row.value for row in dense.tasks]
    model = prunekit.load(folders / "plain", dtype="float32", **SPARSE)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folders / "plain")
    in_memory = prunekit.evaluate(model, tokenizer=tokenizer, **asked)
    assert in_memory.perplexity == sparse.perplexity


def test_the_command_line_says_which_runtime(folders: Path, text_file: Path) -> None:
    words = (
        "eval",
        folders / "plain",
        "--text",
        text_file,
        "--length",
        "32",
        "--samples",
        "2",
        "--dtype",
        "float32",
        "--json",
    )
    dense, sparse = call(*words).json, call(*words, "--runtime", "sparse", "--device", "cpu").json
    assert sparse["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-5)
    refused = call(*words, "--runtime", "fast")
    assert refused.code == 2
    assert "runtime 'fast' is unknown" in refused.err


def test_generated_text_is_the_same(folders: Path) -> None:
    asked: dict[str, Any] = {"max_tokens": 12, "dtype": "float32", "device": "cpu"}
    dense, sparse = (
        "".join(prunekit.generate(folders / "packed", "the quick", runtime=runtime, **asked))
        for runtime in ("dense", "sparse")
    )
    assert dense == sparse


def test_bench_next_to_the_dense_run(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benching, "_memory_in_child", benching._memory)  # a process takes seconds to start
    found = prunekit.bench(
        folders / "packed", against=folders / "plain", prompt=12, tokens=3, repetitions=2, **SPARSE
    ).summary()
    assert found["runtime"] == "sparse"
    assert found["ratios"]["decode"]["median"] > 0


def test_lm_evaluation_harness_takes_the_model(folders: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folders / "plain")
    pair = Instance("loglikelihood", doc={}, arguments=("the quick", " brown fox"), idx=0)
    scores = []
    for runtime in ("dense", "sparse"):
        model = prunekit.load(folders / "plain", dtype="float32", device="cpu", runtime=runtime)
        scores.append(HFLM(pretrained=model, tokenizer=tokenizer).loglikelihood([pair], disable_tqdm=True)[0][0])
    assert scores[1] == pytest.approx(scores[0], rel=1e-5)


# refusals


def test_a_model_for_computing_is_not_changed_or_saved(folders: Path, tmp_path: Path) -> None:
    model = prunekit.load(folders / "plain", dtype="float32", **SPARSE)
    with pytest.raises(prunekit.InputError, match=r"runtime 'sparse' is for computing"):
        model.save_pretrained(tmp_path / "out")
    with pytest.raises(prunekit.InputError, match=r"'model\.layers\.0\.self_attn\.q_proj' is packed"):
        prunekit.prune_(model, IDS, method="magnitude", sparsity=0.6)


def test_other_devices_and_runtimes_are_refused(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(prunekit.InputError, match=r"runtime 'spars' is unknown: did you mean 'sparse'\?"):
        prunekit.load(folders / "plain", runtime="spars")
    monkeypatch.setattr("prunekit.machine.resolve_device", torch.device)
    with pytest.raises(prunekit.InputError, match="is for processors, and the device is cuda"):
        loading.resolve_place("cuda", "sparse")


def test_a_model_without_zeros_is_refused(llama_folder: Path) -> None:
    with pytest.raises(prunekit.InputError, match=r"needs weights with zeros, and .*llama' has so few"):
        prunekit.load(llama_folder, **SPARSE)


def test_linears_without_zeros_stay_dense_with_a_warning(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "plain", tmp_path / "mixed")
    tensors = load_file(tmp_path / "mixed/model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] += 1
    save_file(tensors, tmp_path / "mixed/model.safetensors", metadata={"format": "pt"})
    dense = prunekit.load(tmp_path / "mixed", dtype="float32", device="cpu")
    with pytest.warns(PrunekitWarning, match="1 of 21 linears have so few zeros"):
        model = prunekit.load(tmp_path / "mixed", dtype="float32", **SPARSE)
    torch.testing.assert_close(logits(model), logits(dense), atol=1e-4, rtol=1e-4)


WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("fewer values", r"packed weight 'model\.layers\.1\.mlp\.up_proj\.weight' is damaged: .* ones and there are"),
        ("more values", r"is damaged: .* ones and there are"),
        ("a bit more", r"is damaged: .* ones and there are"),
        ("not finite", r"holds 1 NaN or infinite values"),
        ("cut short", r"is not a whole safetensors file"),
        ("longer", r"is not a whole safetensors file"),
        ("another shape", r"does not hold the mask and the values"),
    ],
)
def test_damaged_packed_folders_are_refused_before_any_kernel(
    damage: str, message: str, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunekit.runtime.kernels.linear", None)
    folder = Path(shutil.copytree(folders / "packed", tmp_path / "packed"))
    (path,) = folder.glob("bitmask-*.safetensors")
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    tensors = load_file(path)
    mask, values = tensors[f"{WEIGHT}.mask"], tensors[f"{WEIGHT}.values"]
    if damage == "fewer values":
        tensors[f"{WEIGHT}.values"] = values[:-1].clone()
    elif damage == "more values":
        tensors[f"{WEIGHT}.values"] = torch.cat([values, values])
    elif damage == "a bit more":
        mask[0, 0] = int(mask[0, 0]) ^ 1
    elif damage == "not finite":
        values[3] = torch.inf
    elif damage == "another shape":
        tensors[f"{WEIGHT}.mask"] = mask[:-1].clone()
    save_file(tensors, path, metadata=header["__metadata__"])
    if damage == "cut short":
        path.write_bytes(raw[:-5])
    elif damage == "longer":
        path.write_bytes(raw + b"1234")
    with pytest.raises(prunekit.InputError, match=message):
        prunekit.load(folder, dtype="bfloat16", **SPARSE)
