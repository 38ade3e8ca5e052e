"""The text that every Python carries: two parts that share nothing, enough of it, the same order every time."""

from __future__ import annotations

from pathlib import Path

import pytest

from prunekit.calibration.builtin import builtin_documents, is_held_out, module_prose
from prunekit.calibration.text import documents


@pytest.fixture(scope="module")
def parts() -> dict[str, dict[str, str]]:
    """Both parts as name -> text; parsing the standard library takes seconds, so it is done once."""
    return {
        source: {document.name: document.read() for document in documents(source, "calibration")}
        for source in ("builtin", "builtin:eval")
    }


def test_both_parts_are_big_enough(parts: dict[str, dict[str, str]]) -> None:
    sizes = {source: sum(map(len, texts.values())) for source, texts in parts.items()}
    assert sizes["builtin"] > 1_000_000
    assert sizes["builtin:eval"] > 100_000


def test_no_name_and_no_text_is_in_both_parts(parts: dict[str, dict[str, str]]) -> None:
    ours, held_out = parts["builtin"], parts["builtin:eval"]
    assert not ours.keys() & held_out.keys()
    shared = {text for text in ours.values() if text} & {text for text in held_out.values() if text}
    assert not shared


def test_the_purpose_does_not_change_the_part() -> None:
    # `builtin` is always the calibration part, so that no command can score on what it calibrates on by accident
    for source in ("builtin", "builtin:eval"):
        names = [
            [document.name for document in documents(source, purpose)] for purpose in ("calibration", "evaluation")
        ]
        assert names[0] == names[1]


def test_the_order_is_by_name(parts: dict[str, dict[str, str]]) -> None:
    for evaluation, source in ((False, "builtin"), (True, "builtin:eval")):
        names = [document.name for document in builtin_documents(evaluation=evaluation)]
        assert names == sorted(names) == list(parts[source])
        assert len(names) == len(set(names))


def test_the_name_alone_decides_what_is_held_out(parts: dict[str, dict[str, str]]) -> None:
    assert not any(is_held_out(name) for name in parts["builtin"])
    assert all(is_held_out(name) for name in parts["builtin:eval"])
    names = [f"topic {number}" for number in range(4000)]
    assert 400 < sum(map(is_held_out, names)) < 600  # about one in eight
    # fixed by the hash: these must stay where they are, or figures of different releases no longer compare
    assert [name for name in names[:20] if is_held_out(name)] == ["topic 8"]


def test_topics_and_modules_are_both_there(parts: dict[str, dict[str, str]]) -> None:
    for texts in parts.values():
        assert any(name.startswith("topic ") for name in texts)
        assert any(name.startswith("module ") for name in texts)
    names = {**parts["builtin"], **parts["builtin:eval"]}
    assert "Iterator" in names["module collections/__init__.py"]
    assert not any("/test/" in name or "site-packages" in name for name in names)


def test_prose_is_the_long_docstrings_in_order(tmp_path: Path) -> None:
    long = {
        name: f"{name} says " + "something worth reading, " * 8 + "end."
        for name in ("module", "Class", "method", "function")
    }
    path = tmp_path / "module.py"
    path.write_text(
        f'"""{long["module"]}"""\n'
        f'class Class:\n    """{long["Class"]}"""\n    def method(self):\n        """{long["method"]}"""\n'
        f'def short():\n    """Too short."""\n'
        f'async def function():\n    """{long["function"]}"""\n'
        "raise SystemExit('modules are parsed, never run')\n"
    )
    assert module_prose(path) == "\n\n".join(long.values())


def test_a_module_that_does_not_parse_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    for content in (b"def broken(:", b"\x00", b"# coding: nonsense\n'x'"):
        path.write_bytes(content)
        assert module_prose(path) == ""
    assert module_prose(tmp_path / "gone.py") == ""
