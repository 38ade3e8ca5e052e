"""The C library by itself: under sanitizers, valgrind and an emulator; how it is built; what happens without it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import prunekit
import tiny
from prunekit.runtime import kernels
from prunekit.runtime.build import FLAGS, SOURCES, compile_library, find_compiler

HARNESS = Path(__file__).with_name("harness.c")
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"


def harness(out: Path, compiler: list[str], *options: str) -> Path:
    """The kernels and `harness.c` as one program."""
    files = [*sorted(SOURCES.glob("*.c")), HARNESS]
    command = [*compiler, *FLAGS, "-O1", "-Werror", *options, f"-I{SOURCES}", "-o", out, *files, "-pthread", "-lm"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if "cannot find -l" in done.stderr:
        pytest.skip(f"the compiler has no library for {' '.join(options)}")
    assert done.returncode == 0, done.stderr
    return out


def levels_tried(command: list[str | Path]) -> set[str]:
    """Runs the program; returns the names of the kernels it tried."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    tried = re.findall(r"^(\d): (\d+)$", done.stdout, re.MULTILINE)
    assert all(int(products) > 20 for _, products in tried)
    return {kernels.LEVELS[int(number)] for number, _ in tried}


@pytest.fixture(scope="module")
def compiler() -> list[str]:
    found = find_compiler()
    if found is None:
        pytest.skip("there is no C compiler")
    return found


def test_no_kernel_reads_or_writes_outside_its_buffers(compiler: list[str], tmp_path: Path) -> None:
    program = harness(tmp_path / "harness", compiler, "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    assert levels_tried([program]) == set(kernels.available()) - {kernels.FALLBACK}


def test_valgrind_finds_nothing(compiler: list[str], tmp_path: Path) -> None:
    if shutil.which("valgrind") is None:
        pytest.skip("there is no valgrind")
    program = harness(tmp_path / "harness", compiler, "-g")
    assert "portable" in levels_tried(["valgrind", "--quiet", "--error-exitcode=9", program, "6"])


def test_arm_kernels_under_an_emulator(tmp_path: Path) -> None:
    for needed in (ARM_COMPILER, ARM_EMULATOR):
        if shutil.which(needed) is None:
            pytest.skip(f"there is no {needed}")
    program = harness(tmp_path / "harness", [ARM_COMPILER], "-static")
    assert levels_tried([ARM_EMULATOR, program, "20"]) == {"portable", "neon"}


def test_the_library_is_there_as_a_whole_or_not_at_all(compiler: list[str], tmp_path: Path) -> None:
    compile_library(tmp_path / "good.so", compiler)
    with pytest.raises(subprocess.CalledProcessError):
        compile_library(tmp_path / "bad.so", [*compiler, "--no-such-option"])
    with pytest.raises(FileNotFoundError):
        compile_library(tmp_path / "bad.so", [str(tmp_path / "nowhere")])
    assert [path.name for path in tmp_path.iterdir()] == ["good.so"]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_threads_are_torchs_and_a_fork_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels.available()[0] == kernels.FALLBACK:
        pytest.skip("the library is not built")
    code = """
import os, threading, torch
from prunekit.runtime.kernels import chosen, linear
from prunekit.runtime.packed import Packed
threads = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(1)
weight = torch.randn(2000, 640) * (torch.rand(2000, 640) < 0.5)
packed, x = Packed.of(weight), torch.randn(1, 640)
expected = x.double() @ weight.double().T
before = threads()
one = linear(packed, x, None)
assert threads() == before
torch.set_num_threads(3)
three = linear(packed, x, None)
assert threads() == before + 2
assert torch.equal(one, three)
child = os.fork()
if not child:
    os._exit(0 if torch.equal(linear(packed, x, None), one) else 1)
assert os.waitpid(child, 0)[1] == 0
print(float((one - expected).abs().max()) < 1e-3)
"""
    done = python(code, OMP_NUM_THREADS="3")
    assert done.stdout == "True\n", done.stderr


# without it


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As if the package had been built where there is no compiler."""
    monkeypatch.setattr(kernels, "LIBRARY", tmp_path / "libprunekit.so")
    forget()


@pytest.fixture(autouse=True)
def forgetting() -> object:
    """What is decided once for a process is decided anew behind a test."""
    yield
    forget()


def forget() -> None:
    for remembered in (kernels.chosen, kernels._library, kernels.warn_without_library):
        remembered.cache_clear()


@pytest.mark.usefixtures("without_library")
def test_without_the_library_everything_works_and_says_so_once(tmp_path: Path) -> None:
    tiny.save_sparse(tmp_path / "sparse", "llama")
    ids = torch.arange(20)[None]
    dense = prunekit.load(tmp_path / "sparse", dtype="float32", device="cpu")
    with pytest.warns(prunekit.errors.PrunekitWarning, match=r"slower than dense ones: .* prunekit\.runtime\.build"):
        model = prunekit.load(tmp_path / "sparse", dtype="float32", runtime="sparse")
    again = prunekit.load(tmp_path / "sparse", dtype="float32", runtime="sparse")  # warnings are errors
    assert kernels.chosen().name == kernels.FALLBACK
    with torch.inference_mode():
        expected = dense(ids).logits
        for one in (model, again):
            torch.testing.assert_close(one(ids).logits, expected)


def test_a_library_of_another_version_is_not_used(
    compiler: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old.c").write_text("int prunekit_interface(void) { return 0; }\n")
    command = [*compiler, "-shared", "-fPIC", "-o", str(tmp_path / "old.so"), str(tmp_path / "old.c")]
    subprocess.run(command, check=True)
    monkeypatch.setattr(kernels, "LIBRARY", tmp_path / "old.so")
    forget()
    assert kernels.available() == [kernels.FALLBACK]


@pytest.mark.parametrize("name", kernels.available())
def test_kernels_are_chosen_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, name)
    forget()
    assert kernels.chosen().name == name


def test_kernels_that_are_not_here_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "amx")
    forget()
    with pytest.raises(prunekit.InputError, match=r"PRUNEKIT_KERNEL=amx cannot be used here: .*Known: .*torch"):
        kernels.chosen()
