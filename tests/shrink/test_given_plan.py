"""A plan that is given: carried out it is the masked model, an earlier run comes out once more, another model's is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import prunekit
import tiny
from prunekit import InputError
from prunekit.checkpoint.reader import sha256_file
from prunekit.checkpoint.writer import PLAN_NAME
from prunekit.model.anatomy import read_anatomy
from prunekit.shrink.plan import Plan
from prunekit.shrink.units import ATTENTION, find_structures
from test_cli import call


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    tiny.save_model(folder / "model", "llama", num_hidden_layers=4)
    (folder / "text.txt").write_text(tiny.make_text(600), encoding="utf-8")
    return folder


def prune(place: Path, out: Path, **more: Any) -> prunekit.Result:
    calibration = {"source": str(place / "text.txt"), "samples": 4, "length": 32}
    return prunekit.prune(place / "model", out=out, **{"calibration": calibration, "dtype": "float32", **more})


def whole(model: PreTrainedModel) -> dict[str, Any]:
    """The plan that removes nothing, as JSON."""
    structures = find_structures(model, read_anatomy(model))
    return Plan.whole(structures).to_json(structures)


def cut(model: PreTrainedModel, shape: str) -> dict[str, Any]:
    """A plan by hand: half of the channels of every block, or blocks of all kinds."""
    content = whole(model)
    for index, block in enumerate(content["blocks"]):
        for entry in block.values():
            if shape == "uniform" or (index == 0 and entry["units"] > 8):
                entry["kept"] = [unit for unit in entry["kept"] if unit % 3 and entry["units"] > 8] or entry["kept"]
    if shape == "free":
        content["blocks"][1] = None
    return content


def without(content: dict[str, Any], index: int, kind: str) -> dict[str, Any]:
    """The same plan without one sublayer."""
    for name, entry in content["blocks"][index].items():
        if ("attn" in name or "attention" in name) == (kind == ATTENTION):
            entry["kept"] = []
    return content


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def hashes(folder: Path) -> list[str]:
    return [sha256_file(path) for path in sorted(folder.glob("*.safetensors"))]


def ids() -> torch.Tensor:
    return torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("family", "shape"),
    [*((family, "free") for family in sorted(tiny.FAMILIES)), ("llama", "uniform"), ("gpt2", "uniform")],
)
@pytest.mark.filterwarnings("ignore:.*no config for these widths.*")
def test_a_plan_that_is_carried_out_is_the_masked_model(family: str, shape: str, tmp_path: Path, place: Path) -> None:
    tiny.save_model(tmp_path / "model", family)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    plan = cut(model, shape)
    path = write(tmp_path / "plan.json", plan)
    result = prune(tmp_path, tmp_path / "out", plan=path, calibration=str(place / "text.txt"), seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    smaller = prunekit.load(tmp_path / "out", dtype="float32")
    with torch.no_grad():
        dense = model(ids()).logits
        with prunekit.masked(model, path):
            masked = model(ids()).logits
        assert torch.equal(model(ids()).logits, dense)
        torch.testing.assert_close(smaller(ids()).logits, masked, rtol=1e-4, atol=2e-5)
    assert not torch.allclose(masked, dense, rtol=1e-2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert json.loads((tmp_path / "out" / PLAN_NAME).read_text(encoding="utf-8")) == plan
    assert result.removed == result.parameters - sum(each.numel() for each in smaller.parameters())


@pytest.mark.parametrize("method", ["planned", "planned+least-squares", "planned+blockwise"])
def test_units_sublayers_and_blocks_go_together(method: str, tmp_path: Path, place: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    content = without(without(cut(model, "free"), 0, ATTENTION), 2, "mlp")
    content["blocks"][3]["self_attn.o_proj"]["kept"] = [1]
    prune(place, tmp_path / "out", plan=write(tmp_path / "plan.json", content), method=method)
    smaller = prunekit.load(tmp_path / "out", dtype="float32")
    with torch.no_grad(), prunekit.masked(model, content):
        masked, found = model(ids()).logits, smaller(ids()).logits
    assert torch.allclose(found, masked, rtol=1e-4, atol=2e-5) == (method == "planned")
    assert json.loads((tmp_path / "out" / PLAN_NAME).read_text(encoding="utf-8")) == content


@pytest.mark.parametrize("method", ["wanda-sp", "flap", "shortgpt", "drop"])
def test_the_plan_of_a_run_gives_its_weights_once_more(method: str, tmp_path: Path, place: Path) -> None:
    prune(place, tmp_path / "first", method=method, ratio=0.4)
    again = "planned+bias" if method == "flap" else "planned"
    prune(place, tmp_path / "again", method=again, plan=tmp_path / "first" / PLAN_NAME)
    assert (tmp_path / "again" / PLAN_NAME).read_bytes() == (tmp_path / "first" / PLAN_NAME).read_bytes()
    assert hashes(tmp_path / "again") == hashes(tmp_path / "first")


def test_the_command_line_plans_prunes_repeats_and_resumes(tmp_path: Path, place: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    content = cut(model, "free")
    content["blocks"][0], content["blocks"][1] = content["blocks"][1], content["blocks"][0]  # the first one goes
    path = write(tmp_path / "plan.json", content)
    words = [place / "model", "--plan", path, "--calibration", place / "text.txt", "--dtype", "float32"]
    planned = call("plan", *words, "--json")
    assert planned.code == 0, planned.err
    done = call("prune", *words, "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    manifest = json.loads((tmp_path / "out" / "prunekit.json").read_text(encoding="utf-8"))
    assert planned.json["removed"] == manifest["run"]["removed"]
    assert (manifest["recipe"]["method"], manifest["recipe"]["ratio"]) == ("planned", None)
    assert manifest["inputs"]["plan"] == sha256_file(path)
    assert "What the given plan leaves out" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    again = prunekit.Recipe.build(manifest["recipe"]).command(str(tmp_path / "again")).split()
    assert call(*again[1:]).code == 0
    assert hashes(tmp_path / "again") == hashes(tmp_path / "out")
    # the same plan from another place is the same run; another plan is not
    moved = path.rename(tmp_path / "moved.json")
    words[2] = moved
    assert call("prune", *words, "--out", tmp_path / "out", "--resume").code == 0
    content["blocks"][2]["mlp.down_proj"]["kept"] = [0]
    write(moved, content)
    other = call("prune", *words, "--out", tmp_path / "out", "--resume")
    assert (other.code, "inputs.plan" in other.err) == (2, True), other.err


def edited(change: Any) -> Any:
    def edit(model: PreTrainedModel) -> Any:
        content = whole(model)
        change(content["blocks"])
        return content

    return edit


@pytest.mark.parametrize(
    ("make", "more", "message"),
    [
        (lambda model: whole(tiny.make_model("llama")), {}, "for a model of 3 blocks, this one has 4"),
        (
            lambda model: whole(tiny.make_model("llama", num_hidden_layers=4, intermediate_size=40)),
            {},
            "'mlp.down_proj' of block 0 has 48 units, the plan was made for 40",
        ),
        (
            lambda model: whole(tiny.make_model("llama", num_hidden_layers=4, hidden_size=64)),
            {},
            "has 1,536 parameters, the plan was made for 6144: it belongs to another model",
        ),
        (
            lambda model: whole(tiny.make_model("gpt2", n_layer=4)),
            {},
            "block 0 has no structure attn.c_proj, mlp.c_proj",
        ),
        (
            edited(lambda blocks: blocks[1]["mlp.down_proj"].update(kept=[3, 48])),
            {},
            "ascending numbers below 48, each",
        ),
        (edited(lambda blocks: blocks[1]["mlp.down_proj"].update(kept=[3, 3])), {}, "ascending numbers below 48, each"),
        (
            edited(lambda blocks: [each.update(kept=[]) for each in blocks[1].values()]),
            {},
            "block 1 would be left empty",
        ),
        (edited(lambda blocks: blocks.__setitem__(slice(None), [None] * 4)), {}, "the plan keeps no block"),
        (edited(lambda blocks: blocks[0].update({"mlp.down_proj": []})), {}, "is to be written like"),
        (lambda model: None, {}, "this is no plan of prunekit"),
        (whole, {"ratio": 0.2}, "ratio 0.2 and plan '.*' both say how much goes"),
        (whole, {"method": "flap"}, "'flap' would choose that itself: leave out the plan, or take --method planned"),
        (whole, {"method": "wanda"}, "'wanda' would choose that itself"),
        (whole, {"sparsity": 0.5}, "sparsity 0.5 is for methods that zero single weights"),
        (whole, {"parts": {"score": {"name": "flap"}}}, "score 'flap' is there to choose .* the plan says what stays"),
        (whole, {"parts": {"score": {"p": 2}}}, "'score.p' is an option of a score and method 'planned' has none"),
        (whole, {"parts": {"budget": {"align": 8}}}, "'budget.align' .* the plan says what stays: leave it out"),
        (whole, {"method": "planned+global-cost"}, "budget 'global-cost' is there to choose what goes"),
        (whole, {"method": "planned+evolution"}, "search 'evolution' is there to choose what goes"),
        (whole, {"plan": None, "method": "planned"}, "'planned' is told what stays: give it a plan with --plan"),
        (
            edited(lambda blocks: blocks.__setitem__(1, None)),
            {"method": "planned+least-squares", "parts": {"compensate": {"target": "dense"}}},
            "drops whole blocks, and compensate.target=dense",
        ),
        (
            edited(lambda blocks: blocks.__setitem__(1, None)),
            {"method": "planned+blockwise", "parts": {"tune": {"target": "dense"}}},
            "drops whole blocks, and tune.target=dense",
        ),
    ],
)
def test_what_cannot_be_carried_out_is_refused_and_nothing_is_written(
    make: Any, more: dict[str, Any], message: str, tmp_path: Path, place: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    path = write(tmp_path / "plan.json", make(model))
    with pytest.raises(InputError, match=message):
        prune(place, tmp_path / "out", **{"plan": path, **more})
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_read_is_refused(tmp_path: Path, place: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    with pytest.raises(InputError, match=r"none\.json' cannot be read: No such file"):
        prune(place, tmp_path / "out", plan=tmp_path / "none.json")
    (tmp_path / "torn.json").write_text('{"format": 1, "blo', encoding="utf-8")
    with pytest.raises(InputError, match=r"torn\.json' is not valid JSON"):
        prune(place, tmp_path / "out", plan=tmp_path / "torn.json")
    with (
        pytest.raises(InputError, match=r"torn\.json' is not valid JSON"),
        prunekit.masked(model, tmp_path / "torn.json"),
    ):
        pass
    assert not (tmp_path / "out").exists()


def test_heads_that_can_only_stay_are_refused(tmp_path: Path, place: Path) -> None:
    # the number of a head decides its slope
    model = tiny.save_model(tmp_path / "model", "bloom")
    content = whole(model)
    for block in content["blocks"]:
        for entry in block.values():
            entry["kept"] = entry["kept"][: max(1, entry["units"] // 2)]
    with pytest.raises(InputError, match="BloomForCausalLM does not compute the same with fewer"):
        prune(
            tmp_path, tmp_path / "out", plan=write(tmp_path / "plan.json", content), calibration=str(place / "text.txt")
        )
    assert not (tmp_path / "out").exists()
