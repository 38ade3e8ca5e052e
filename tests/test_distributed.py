"""Several processes give what one gives: the same bits on equal threads, the same refusals, and an orderly end when one is lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import prunekit
import tiny
from helpers import shards
from prunekit.checkpoint.writer import JOURNAL_NAME
from prunekit.distributed import Ranks
from prunekit.errors import PrunekitError

# What every scenario of `DRIVER` asks for. Six windows; a batch of two leaves 2 ranks unequal shares of three batches.
BASE: dict[str, Any] = {"dtype": "float32", "calibration": {"samples": 6, "length": 32, "batch": 2}}
SCENARIOS: dict[str, dict[str, Any]] = {
    "rows": {},
    "groups": {"pattern": "2:4"},
    "layer": {"parts": {"pattern": {"group": "layer"}}},
    "dense": {"calibration": {"mode": "dense"}},
    "no-data": {"method": "magnitude"},
    "files": {"memory_budget": 1},
}

# Runs every scenario in each of the processes; a file a rank tells what happened to it.
DRIVER = """
import json, os, sys
from pathlib import Path
import torch
import prunekit
from prunekit import PrunekitError
torch.set_num_threads(1)
told = {}
for name, options in json.loads(Path(sys.argv[1]).read_text()).items():
    try:
        told[name] = prunekit.prune(**options).summary()
    except PrunekitError as problem:
        told[name] = f"{type(problem).__name__}: {problem}"
Path(sys.argv[1]).with_name(f"told-{os.environ['RANK']}.json").write_text(json.dumps(told))
"""


def options(folder: Path, out: Path, **changes: Any) -> dict[str, Any]:
    calibration = {**BASE["calibration"], "source": str(folder / "text.txt"), **changes.pop("calibration", {})}
    return {"model": str(folder / "llama"), "out": str(out), **BASE, **changes, "calibration": calibration}


def torchrun(ranks: int, *words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


def by_hand(ranks: int, *words: str | Path) -> tuple[list[int], str]:
    """Exit codes by rank and what the first process said; where one is lost nobody ends the others, as torchrun does at some time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = []
    for rank in range(ranks):
        given = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        pipe = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        command = [sys.executable, *map(str, words)]
        started.append(subprocess.Popen(command, env=given, stdout=subprocess.DEVNULL, stderr=pipe, text=True))
    told = started[0].communicate(timeout=600)[1]
    return [process.wait(timeout=600) for process in started], told


def together(folder: Path, ranks: int, scenarios: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What each of the processes was told, by scenario."""
    (folder / "driver.py").write_text(DRIVER)
    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    done = torchrun(ranks, folder / "driver.py", folder / "scenarios.json")
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(ranks)]


def alone(**given: Any) -> prunekit.Result:
    """In this process, on one thread, as each rank has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return prunekit.prune(**given)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    tiny.save_model(folder / "llama", "llama")
    (folder / "text.txt").write_text(tiny.make_text(), encoding="utf-8")
    return folder


def test_two_processes_write_what_one_writes(folder: Path) -> None:
    scenarios = {name: options(folder, folder / f"two-{name}", **changes) for name, changes in SCENARIOS.items()}
    broken = folder / "broken"
    model = tiny.save_model(broken, "llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(float("nan"))
    model.save_pretrained(broken)
    scenarios["broken"] = options(folder, folder / "two-broken") | {"model": str(broken)}
    scenarios["few"] = options(folder, folder / "two-few", calibration={"samples": 1})
    told = together(folder, 2, scenarios)
    for name, changes in SCENARIOS.items():
        single = alone(**options(folder, folder / f"one-{name}", **changes))
        assert shards(folder / f"two-{name}") == shards(folder / f"one-{name}"), name
        both = [json.loads((folder / f"{kind}-{name}" / "prunekit.json").read_text()) for kind in ("one", "two")]
        assert [manifest["run"].pop("processes") for manifest in both] == [1, 2]
        for manifest in both:
            del manifest["blocks"]  # when each was done, and the memory then
            for changing in ("seconds", "peak_rss_bytes", "memory"):
                del manifest["run"][changing]
            for linear in manifest["linears"]:
                del linear["seconds"]
        errors = [[linear.pop("output_error") for linear in manifest["linears"]] for manifest in both]
        assert errors[0] == pytest.approx(errors[1], rel=1e-5)
        if name == "no-data":  # a window a process, where one process has one
            for manifest in both:
                del manifest["calibration_tokens"], manifest["run"]["windows"], manifest["run"]["tokens"]
        assert both[0] == both[1], name
        assert told[0][name] == told[1][name], "every process is given the result"
        assert told[0][name]["zeros"] == single.zeros
    for rank in told:
        assert rank["broken"].startswith("InputError: tensor 'model.layers.1.mlp.up_proj.weight'")
        assert rank["few"].startswith("InputError: 2 processes cannot share 1 calibration windows")
    assert not (folder / "two-broken").exists()
    assert not (folder / "two-few").exists()


def test_two_processes_refit_and_measure_as_one_does(folder: Path) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "sparsegpt": {"method": "sparsegpt", "pattern": "2:4"},
        "ria-r2-dsnot": {"method": "ria+r2-dsnot"},
        "dsnot-owl": {"method": "dsnot+owl"},
        "stochastic": {"method": "stochastic-ria", "parts": {"pattern": {"group": "row"}}},
    }
    scenarios = {name: options(folder, folder / f"pair-{name}", **changes) for name, changes in kinds.items()}
    parts = {"pattern": {"permute": True}}
    shrinking: dict[str, dict[str, Any]] = {
        "obs": {"method": "obs", "ratio": 0.3},
        "numerical": {"method": "numerical", "ratio": 0.3},
        "followed": {"method": "wanda-sp+least-squares", "ratio": 0.3, "parts": {"compensate": {"target": "dense"}}},
        "shortgpt": {"method": "shortgpt", "ratio": 0.3},
        "narrowed": {"method": "minitron", "parts": {"budget": {"name": "widths", "hidden": 18, "mlp": 30}}},
        "gated": {"method": "llm-bip", "ratio": 0.45, "parts": {"score": {"gated": True, "norm": True}}},
    }
    scenarios |= {name: options(folder, folder / f"pair-{name}", **changes) for name, changes in shrinking.items()}
    scenarios["gradients"] = options(folder, folder / "pair-gradients", method="nirvana", ratio=0.3)
    scenarios["sliced"] = options(folder, folder / "pair-sliced", method="slicegpt", ratio=0.2)
    scenarios["permuted"] = options(folder, folder / "pair-permuted", method="wanda", pattern="2:4", parts=parts)
    for target in ("own", "dense"):
        aims = {"tune": {"target": target}}
        out = folder / f"pair-tuned-{target}"
        scenarios[f"tuned-{target}"] = options(folder, out, method="wanda+blockwise", parts=aims)
    told = together(folder, 2, scenarios)
    for name, changes in kinds.items():
        assert "zeros" in told[0][name], told[0][name]
        alone(**options(folder, folder / f"single-{name}", **changes))
        ours, theirs = (tensors(folder / f"{kind}-{name}") for kind in ("pair", "single"))
        for key, value in ours.items():
            assert torch.equal(value == 0, theirs[key] == 0), f"{name}: {key}"
            # products of some of the rows may round otherwise than products of all
            torch.testing.assert_close(value, theirs[key], rtol=1e-4, atol=1e-5, msg=f"{name}: {key}")
    for name, changes in shrinking.items():
        alone(**options(folder, folder / f"single-{name}", **changes))
        plans = [(folder / f"{kind}-{name}" / "prune_plan.json").read_text() for kind in ("pair", "single")]
        assert plans[0] == plans[1], name
        ours, theirs = (tensors(folder / f"{kind}-{name}") for kind in ("pair", "single"))
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-4, atol=1e-5, msg=f"{name}: {key}")
    alone(**options(folder, folder / "single-sliced", method="slicegpt", ratio=0.2))
    ids = torch.arange(32)[None] * 5 % 250
    with torch.no_grad():
        ours, theirs = (
            prunekit.load(folder / f"{kind}-sliced", dtype="float32")(ids).logits for kind in ("pair", "single")
        )
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-3
    assert "wants gradients, which one process computes" in told[0]["gradients"]
    # orders that retain equally much are told apart by rounding, so another number of processes may take another one
    assert told[0]["permuted"] == told[1]["permuted"]
    assert told[0]["permuted"]["permuted"] == 6
    assert prunekit.inspect(folder / "pair-permuted").sound
    # a step of tuning sees a batch of either process: other weights than one process has, but the same everywhere
    for tuned in ("tuned-own", "tuned-dense"):
        assert told[0][tuned] == told[1][tuned]
        assert told[0][tuned]["verification"]["difference"] <= told[0][tuned]["verification"]["tolerance"]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def interrupted(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """A run of one process that is stopped when it comes to the shard of the last block."""
    from prunekit.checkpoint.writer import Writer

    real = Writer.write_shard

    def stop(self: Writer, position: int, pieces: Any) -> Any:
        if position == 3:
            raise KeyboardInterrupt
        return real(self, position, pieces)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            alone(**options(folder, out, **changes))


def test_another_number_of_processes_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: dict[str, dict[str, Any]] = {"rows": {}, "dense": {"calibration": {"mode": "dense"}}}
    scenarios = {}
    for name, changes in kinds.items():
        interrupted(folder, folder / f"begun-{name}", monkeypatch, **changes)
        scenarios[name] = options(folder, folder / f"begun-{name}", resume=True, **changes)
    told = together(folder, 3, scenarios)
    for name, changes in kinds.items():
        assert told[2][name]["zeros"] > 0
        alone(**options(folder, folder / f"whole-{name}", **changes))
        assert shards(folder / f"begun-{name}") == shards(folder / f"whole-{name}"), name


def test_a_lost_process_ends_the_run_and_it_can_be_resumed(folder: Path) -> None:
    out, driver = folder / "lost", folder / "lost.py"
    driver.write_text(
        "import os, signal, sys\n"
        "from prunekit.sparsify.walk import SparsifyWalk\n"
        "real = SparsifyWalk.prune_block\n"
        "def prune_block(self, block, *rest):\n"
        "    if block.index == 2 and os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(self, block, *rest)\n"
        "SparsifyWalk.prune_block = prune_block\n"
        "from prunekit.cli import main\n"
        "sys.argv[0] = 'prunekit'\n"
        "main()\n"
    )
    words = ["prune", str(folder / "llama"), "--calibration", str(folder / "text.txt"), "--samples", "6"]
    words += ["--length", "32", "--dtype", "float32", "--set", "calibration.batch=2", "--out", str(out)]
    codes, told = by_hand(2, driver, *words)
    assert codes == [PrunekitError.exit_code, -signal.SIGKILL], told
    assert "Traceback" not in told
    assert "prunekit: another process of this run was lost" in told
    assert "2 of 3 blocks are finished" in told
    assert (out / JOURNAL_NAME).is_file()
    done = torchrun(2, "-m", "prunekit", *words, "--resume", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["out"] == str(out)
    assert len(done.stdout.splitlines()) == 1, "one process talks"
    alone(**options(folder, folder / "lost-whole"))
    assert shards(out) == shards(folder / "lost-whole")


def test_one_process_shares_with_nobody() -> None:
    ranks = Ranks()
    assert ranks.first
    assert ranks.share_of(7) == slice(0, 7)
    assert ranks.gather("a") == ["a"]
    assert ranks.share(lambda: 3) == 3
    tensor = torch.arange(3)
    ranks.sum_up([tensor])
    assert tensor.tolist() == [0, 1, 2]


@pytest.mark.parametrize(("count", "size"), [(0, 2), (1, 3), (7, 2), (8, 3), (9, 9)])
def test_shares_cover_everything_once_and_differ_by_one_at_most(count: int, size: int) -> None:
    ranks = Ranks()
    ranks.size = size
    covered: list[int] = []
    sizes = []
    for rank in range(size):
        ranks.rank = rank
        share = ranks.share_of(count)
        covered += range(count)[share]
        sizes.append(share.stop - share.start)
    assert covered == list(range(count))
    assert max(sizes) - min(sizes) <= 1
