"""A run that was stopped, however it was stopped, goes on where it stopped and ends in the same bytes."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import prunekit
import tiny
from helpers import Says, ctrl_c, shards, stop_at
from prunekit import InputError, PrunekitError, StorageError, VerificationError
from prunekit.checkpoint import writer
from prunekit.checkpoint.shard import Piece, write_shard
from prunekit.checkpoint.writer import JOURNAL_NAME, MANIFEST_NAME, Journal, Writer
from prunekit.sparsify.walk import SparsifyWalk

BLOCKS = 3
SHARDS = BLOCKS + 1  # the first holds what is outside the blocks


class Setting:
    """A model, a text, and the shards that an uninterrupted run makes of them."""

    def __init__(self, folder: Path, mode: str) -> None:
        self.model, self.text, self.mode = folder / "model", folder / "text.txt", mode
        tiny.save_model(self.model, "llama")
        self.text.write_text(tiny.make_text(), encoding="utf-8")
        self.run(folder / "whole")
        self.whole = shards(folder / "whole")

    def run(self, out: Path, *, resume: bool = False, model: Path | None = None, **options: Any) -> prunekit.Result:
        calibration = {"source": str(self.text), "samples": 6, "length": 32, "mode": self.mode}
        calibration |= options.pop("calibration", {})
        options = {"dtype": "float32", **options}
        return prunekit.prune(model or self.model, out=out, calibration=calibration, resume=resume, **options)


@pytest.fixture(scope="module", params=["sequential", "dense"])
def both_modes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("setting"), "sequential")


def interrupt(
    setting: Setting, out: Path, call: int, owner: Any = Writer, name: str = "write_shard", **options: Any
) -> None:
    """Run until `owner.name` is called for the time `call` (from 0), and be interrupted there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, stop_at(call, getattr(owner, name)))
        with pytest.raises(KeyboardInterrupt):
            setting.run(out, **options)


def loads(folder: Path) -> bool:
    try:
        prunekit.evaluate(folder, text="builtin:eval", length=32, samples=1, dtype="float32")
    except InputError:
        return False
    return True


@pytest.mark.parametrize("call", range(SHARDS))
def test_interrupted_before_any_shard_is_written(both_modes: Setting, out: Path, call: int) -> None:
    interrupt(both_modes, out, call)
    assert len(shards(out)) == call
    assert not loads(out)
    both_modes.run(out, resume=True)
    assert shards(out) == both_modes.whole


@pytest.mark.parametrize("call", range(SHARDS))
def test_interrupted_between_a_shard_and_its_note(both_modes: Setting, out: Path, call: int) -> None:
    interrupt(both_modes, out, call, Journal, "add")
    both_modes.run(out, resume=True)
    assert shards(out) == both_modes.whole


@pytest.mark.parametrize("step", ["write_index", "carry_over", "write_manifest"])
def test_interrupted_while_finishing(setting: Setting, out: Path, step: str) -> None:
    interrupt(setting, out, 0, Writer, step)
    assert shards(out) == setting.whole
    result = setting.run(out, resume=True)
    assert shards(out) == setting.whole
    assert result.verification is not None
    assert prunekit.inspect(out).sound


def test_interrupted_twice(both_modes: Setting, out: Path) -> None:
    interrupt(both_modes, out, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Writer, "write_shard", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            both_modes.run(out, resume=True)
    result = both_modes.run(out, resume=True)
    assert shards(out) == both_modes.whole
    assert [report.name for report in result.linears] == [
        f"model.layers.{block}.{name}" for block in range(BLOCKS) for name in LINEARS
    ]


LINEARS = [*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down"))]


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_torn_shard_is_done_again(setting: Setting, out: Path, damage: str) -> None:
    interrupt(setting, out, 3)
    path = out / "model-00003-of-00004.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-100] if damage == "cut" else content)
    setting.run(out, resume=True)
    assert shards(out) == setting.whole


def test_the_finished_blocks_are_not_pruned_again(setting: Setting, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(setting, out, 3)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    written = []
    real = Writer.write_shard

    def note(self: Writer, position: int, tensors: Any) -> Any:
        written.append(position)
        return real(self, position, tensors)

    monkeypatch.setattr(Writer, "write_shard", note)
    setting.run(out, resume=True)
    assert written == [3]
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before


def test_resume_starts_where_nothing_is(setting: Setting, out: Path) -> None:
    setting.run(out, resume=True)
    assert shards(out) == setting.whole
    (out.parent / "empty").mkdir()
    setting.run(out.parent / "empty", resume=True)
    assert shards(out.parent / "empty") == setting.whole


def test_resume_of_a_finished_folder_gives_its_result_and_writes_nothing(setting: Setting, out: Path) -> None:
    first = setting.run(out)
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.iterdir()}
    assert setting.run(out, resume=True) == first
    assert {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in out.iterdir()} == before


@pytest.fixture(scope="module", params=["unfinished", "finished"])
def begun(request: pytest.FixtureRequest, setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that a run has begun, or finished; refusals must leave it alone, so it serves many tests."""
    folder = tmp_path_factory.mktemp("begun") / "out"
    if request.param == "finished":
        setting.run(folder)
    else:
        interrupt(setting, folder, 2)
    return folder


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 0.25}, "recipe.sparsity is 0.5 there and 0.25 here"),
        ({"pattern": "2:4"}, 'recipe.pattern is null there and "2:4" here'),
        ({"method": "magnitude"}, 'recipe.method is "wanda" there and "magnitude" here'),
        ({"seed": 1}, "recipe.seed is 0 there and 1 here"),
        ({"dtype": "bfloat16"}, 'recipe.dtype is "float32" there and "bfloat16" here'),
        ({"calibration": {"samples": 5}}, "recipe.calibration.samples is 6 there and 5 here"),
        ({"calibration": {"mode": "dense"}}, 'recipe.calibration.mode is "sequential" there and "dense" here'),
    ],
)
def test_resume_with_another_recipe_is_refused(
    setting: Setting, begun: Path, options: dict[str, Any], words: str
) -> None:
    before = {path.name: path.read_bytes() for path in begun.iterdir()}
    with pytest.raises(InputError, match="belongs to another run") as caught:
        setting.run(begun, resume=True, **options)
    assert words in str(caught.value)
    assert {path.name: path.read_bytes() for path in begun.iterdir()} == before


def test_resume_on_another_text_is_refused_though_it_has_the_same_name(setting: Setting, begun: Path) -> None:
    text = setting.text.read_text()
    setting.text.write_text(text.upper())
    try:
        with pytest.raises(InputError, match=r"calibration_tokens is .* there and .* here"):
            setting.run(begun, resume=True)
    finally:
        setting.text.write_text(text)


def test_resume_of_another_model_is_refused(setting: Setting, begun: Path, tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "other", "llama", seed=1)
    with pytest.raises(InputError, match=r"inputs\.model\.safetensors is .* there and .* here"):
        setting.run(begun, resume=True, model=tmp_path / "other")


def test_resume_of_the_same_model_under_another_path_goes_on(setting: Setting, out: Path, tmp_path: Path) -> None:
    interrupt(setting, out, 2)
    (tmp_path / "moved").symlink_to(setting.model)
    setting.run(out, resume=True, model=tmp_path / "moved")
    assert shards(out) == setting.whole


def test_resume_with_other_kernels_is_refused_where_they_would_sum(
    setting: Setting, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunekit.pruning.gram_kernel", lambda dtype, device: "another")
    with pytest.raises(InputError, match=r'gram_kernel is "torch" there and "another" here'):
        setting.run(begun, resume=True)


def test_a_folder_of_before_something_counted_is_refused_in_a_sentence(setting: Setting, out: Path) -> None:
    setting.run(out)
    manifest = json.loads((out / MANIFEST_NAME).read_text(encoding="utf-8"))
    del manifest["gram_kernel"]
    (out / MANIFEST_NAME).write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(InputError, match=r'gram_kernel is null there and "torch" here'):
        setting.run(out, resume=True)


@pytest.mark.parametrize("content", ["", "not json", "[]", '{"identity": {}}'])
def test_an_overwritten_journal_is_refused(setting: Setting, out: Path, content: str) -> None:
    interrupt(setting, out, 2)
    (out / JOURNAL_NAME).write_text(content)
    before = shards(out)
    with pytest.raises(InputError, match="--overwrite"):
        setting.run(out, resume=True)
    assert shards(out) == before


def test_a_folder_that_holds_no_run_is_not_resumed(setting: Setting, out: Path) -> None:
    out.mkdir()
    (out / "notes.md").write_text("mine")
    with pytest.raises(InputError, match="holds no run of prunekit"):
        setting.run(out, resume=True)
    assert (out / "notes.md").read_text() == "mine"


def test_a_full_disk_keeps_what_is_finished(setting: Setting, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync
    fsync_of_block_1 = []

    def refuse(handle: int) -> None:
        if "model-00003" in str(Path(f"/proc/self/fd/{handle}").resolve()):
            fsync_of_block_1.append(handle)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to know which file is synced")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match="No space left on device"):
        setting.run(out)
    assert fsync_of_block_1
    assert sorted(shards(out)) == ["model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"]
    assert not [path.name for path in out.iterdir() if path.name.endswith("tmp")]
    monkeypatch.undo()
    setting.run(out, resume=True)
    assert shards(out) == setting.whole


def test_a_failed_verification_is_not_passed_by_resuming(
    setting: Setting, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the journal has the hash of the wrong file, so a resume that trusted it would compare wrong with wrong, and agree
    def write_wrongly(path: Path, pieces: list[Piece], metadata: Any) -> str:
        other = [Piece.of(piece.name, torch.zeros(piece.shape, dtype=piece.dtype)) for piece in pieces]
        changed = "model.layers.1.mlp.down_proj.weight" in [piece.name for piece in pieces]
        return write_shard(path, other if changed else pieces, metadata)

    monkeypatch.setattr(writer, "write_shard", write_wrongly)
    with pytest.raises(VerificationError):
        setting.run(out)
    monkeypatch.undo()
    try:
        setting.run(out, resume=True)
    except prunekit.PrunekitError:
        assert not (out / "prunekit.json").exists()  # refusing is as good as doing it again
    else:
        assert shards(out) == setting.whole


# Real processes: what no patch can imitate.


def command(setting: Setting, out: Path) -> list[str]:
    words = ["prune", str(setting.model), "--calibration", str(setting.text), "--samples", "6", "--length", "32"]
    return [*words, "--dtype", "float32", "--out", str(out)]


def test_killed_in_the_middle_of_a_write(setting: Setting, out: Path, tmp_path: Path) -> None:
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import os, signal, sys\n"
        "from prunekit.checkpoint import shard\n"
        "real = shard._fill\n"
        "def fill(path, **named):\n"
        "    real(path, **named)\n"
        "    if '00003-of' in str(path):\n"
        "        os.truncate(path, 1000)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "shard._fill = fill\n"
        "from prunekit.cli import main\n"
        "sys.argv[0] = 'prunekit'\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, driver, *command(setting, out)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    left = sorted(shards(out))
    assert left == ["model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"]
    assert not (out / "config.json").exists()
    setting.run(out, resume=True)  # in another process than the one that died
    assert shards(out) == setting.whole
    assert not [path.name for path in out.iterdir() if path.name.endswith("tmp")]


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_from_outside(kind: signal.Signals, setting: Setting, out: Path, tmp_path: Path) -> None:
    """SIGINT or SIGTERM to a process that sits in a write: the write is finished, it exits with 130, and says what to do."""
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import runpy, sys, time\n"
        "from prunekit.checkpoint.writer import Writer\n"
        "real = Writer.write_shard\n"
        "def write_shard(self, position, tensors):\n"
        "    if position == 2:\n"
        "        print('waiting', file=sys.stderr, flush=True)\n"
        "        time.sleep(3)\n"
        "    return real(self, position, tensors)\n"
        "Writer.write_shard = write_shard\n"
        "sys.argv[0] = 'prunekit'\n"
        "runpy.run_module('prunekit', run_name='__main__', alter_sys=True)\n"
    )
    process = subprocess.Popen([sys.executable, driver, *command(setting, out)], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if line.strip() == "waiting":
                break
        time.sleep(0.2)  # into the sleep
        process.send_signal(kind)
        _, message = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in message
    assert re.search(r"2 of 3 blocks are finished .* --resume", message)
    setting.run(out, resume=True)
    assert shards(out) == setting.whole


@pytest.mark.parametrize(("key", "verb"), [("export", "export"), ("recovery", "recover")])
def test_what_another_verb_made_of_a_run_is_not_taken_for_the_run(
    setting: Setting, out: Path, key: str, verb: str
) -> None:
    setting.run(out)
    manifest = json.loads((out / MANIFEST_NAME).read_text())
    (out / MANIFEST_NAME).write_text(json.dumps({**manifest, key: {}}))
    with pytest.raises(InputError, match=f"is what {verb} wrote, not prune"):
        setting.run(out, resume=True)


def test_a_finished_folder_that_was_damaged_is_not_passed_by_resuming(setting: Setting, out: Path) -> None:
    setting.run(out)
    (out / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00004\.safetensors changed since"):
        setting.run(out, resume=True)


def test_a_reload_check_that_cannot_be_made_keeps_the_shards(
    setting: Setting, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise InputError("something about the folder that was written")

    with monkeypatch.context() as patch:
        patch.setattr("prunekit.pruning.verify", fail)
        with pytest.raises(PrunekitError, match="reload check could not be made"):
            setting.run(out)
    assert shards(out) == setting.whole
    assert not loads(out)
    setting.run(out, resume=True)
    assert shards(out) == setting.whole


def test_what_nobody_has_checked_neither_loads_nor_is_evaluated(
    setting: Setting, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunekit.pruning.verify", ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        setting.run(out)
    assert not loads(out)
    with pytest.raises(InputError, match="interrupted after 4 shards: finish it with the same command and --resume"):
        prunekit.evaluate(out, text=str(setting.text), length=32)


def test_a_run_goes_on_with_the_threads_it_began_with(setting: Setting, out: Path) -> None:
    # sums taken in another order differ in their last bits
    interrupt(setting, out, 2)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        says = Says()
        setting.run(out, resume=True, progress=says)
        assert torch.get_num_threads() == threads
        assert any(f"computing with {threads} threads" in line for line in says.said)
    finally:
        torch.set_num_threads(threads)
    assert shards(out) == setting.whole


@pytest.mark.parametrize("call", range(SHARDS))
@pytest.mark.parametrize(
    ("method", "mode"),
    [
        ("wanda-sp", "sequential"),
        ("obs", "sequential"),
        ("obs", "dense"),
        ("flap", "sequential"),
        ("numerical", "sequential"),
        ("wanda-sp+least-squares", "sequential"),
        ("nirvana", "sequential"),
        ("wanda-sp+blockwise", "sequential"),
    ],
)
def test_methods_that_remove_structures_resume_to_the_same_bits(
    method: str, mode: str, call: int, setting: Setting, out: Path, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"method": method, "ratio": 0.3, "calibration": {"mode": mode}}
    asked |= {"parts": {"budget": {"align": 1, "shape": "free"}}} if method == "nirvana" else {}
    asked |= {"parts": {"compensate": {"target": "dense"}}} if method == "wanda-sp+least-squares" else {}
    asked |= {"parts": {"tune": {"target": "dense"}}} if method == "wanda-sp+blockwise" else {}
    setting.run(tmp_path / "whole", **asked)
    interrupt(setting, out, call, **asked)
    setting.run(out, resume=True, **asked)
    assert shards(out) == shards(tmp_path / "whole")
    for name in ("prune_plan.json", "config.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("call", [2, 3])
def test_a_model_without_some_sublayers_resumes_to_the_same_bits(
    call: int, setting: Setting, out: Path, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"method": "drop", "ratio": 0.27, "parts": {"depth": {"what": "attention"}}}
    setting.run(tmp_path / "whole", **asked)
    interrupt(setting, out, call, **asked)
    setting.run(out, resume=True, **asked)
    assert shards(out) == shards(tmp_path / "whole")
    for name in ("prune_plan.json", "config.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_model_of_fewer_blocks_resumes_to_the_same_bits(setting: Setting, out: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"method": "shortgpt", "ratio": 0.3}
    setting.run(tmp_path / "whole", **asked)
    assert len(shards(tmp_path / "whole")) == SHARDS - 1
    interrupt(setting, out, 2, **asked)
    setting.run(out, resume=True, **asked)
    assert shards(out) == shards(tmp_path / "whole")


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("owl", {}),
        ("wanda+least-squares+blockwise", {}),
        ("wanda+blockwise", {"tune": {"target": "dense"}}),
        ("sparsegpt+owl", {}),
    ],
)
def test_methods_that_measure_first_or_refit_resume_to_the_same_bits(
    method: str, parts: dict[str, Any], setting: Setting, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    setting.run(whole, method=method, parts=parts)
    with monkeypatch.context() as patch:
        walks: list[int] = []

        def count(self: Any, *arguments: Any) -> Any:
            walks.append(1)
            return profile(self, *arguments)

        profile = SparsifyWalk._profile
        patch.setattr(SparsifyWalk, "_profile", count)
        interrupt(setting, out, 2, method=method, parts=parts)
        setting.run(out, method=method, parts=parts, resume=True)
        assert len(walks) == ("owl" in method), "the journal knows what the first walk found"
    assert shards(out) == shards(whole)
