"""`generate`: text on stdout as it comes, figures on stderr, and the same from Python."""

from __future__ import annotations

import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunekit
from prunekit import cli, generating
from test_bad_input import assert_refused
from test_cli import Done, call

PROMPT = "once upon a time"


def generate(folder: Path, *words: object, prompt: str = PROMPT) -> Done:
    return call("generate", folder, "--prompt", prompt, "--dtype", "float32", "--device", "cpu", *words)


def expected(folder: Path, ids: list[int], tokens: int) -> str:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)
    text = AutoTokenizer.from_pretrained(folder).decode(found[0, len(ids) :], skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def test_text_goes_to_stdout_and_figures_to_stderr(talker: Path) -> None:
    done = generate(talker, "--max-tokens", 9)
    assert done.code == 0, done.err
    ids = AutoTokenizer.from_pretrained(talker)(PROMPT)["input_ids"]
    assert done.out == expected(talker, ids, 9) + "\n"
    first, second = done.err.splitlines()
    assert first.startswith("  prompt      16 tokens, ")
    assert second.startswith("  generated   9 tokens (length), the first after ")
    assert second.endswith(" tokens/s behind it")


def test_json_is_all_there_is_on_stdout(talker: Path) -> None:
    done = generate(talker, "--max-tokens", 9, "--json")
    assert done.json["text"] + "\n" == generate(talker, "--max-tokens", 9).out
    assert len(done.out.splitlines()) == 1
    assert done.json.keys() == {
        *("text", "finish", "prompt_tokens", "tokens", "prefill_tokens_per_second", "first_token_seconds"),
        "decode_tokens_per_second",
    }
    assert (done.json["finish"], done.json["prompt_tokens"], done.json["tokens"]) == ("length", 16, 9)


def test_pieces_are_written_as_they_come(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(cli.typer, "echo", lambda text="", **_: written.append(text))
    generate(talker, "--max-tokens", 9)
    assert len(written) == 9 + 2  # a token a piece, the line's end, the figures


def test_the_prompt_may_come_from_stdin(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given, code in ((f"{PROMPT}\n".encode(), 0), (PROMPT.encode(), 0), (b"\xff", 2)):
        monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(given)))
        done = generate(talker, "--max-tokens", 9, prompt="-")
        assert done.code == code
        assert done.out == (generate(talker, "--max-tokens", 9).out if code == 0 else "")
    assert "no UTF-8 at byte 0" in done.err


def test_chat_takes_the_template(talker: Path) -> None:
    ids = AutoTokenizer.from_pretrained(talker)(f"<bos>user\n{PROMPT}<eos>\n<bos>assistant\n")["input_ids"]
    assert generate(talker, "--chat", "--max-tokens", 9).out == expected(talker, ids, 9) + "\n"


def test_options_reach_the_sampling(talker: Path) -> None:
    words = ["--temperature", 1.5, "--max-tokens", 20]
    drawn = generate(talker, *words).out
    assert drawn == generate(talker, *words, "--seed", 0).out != generate(talker, *words, "--seed", 1).out
    assert generate(talker, *words, "--top-p", 1e-9).out == generate(talker, "--max-tokens", 20).out
    whole = generate(talker).out
    stop = whole[4:6]
    assert generate(talker, "--stop", "never there", "--stop", stop).out == whole[: whole.index(stop)] + "\n"
    assert len(whole) == 128 - 16 + 1  # what the positions leave of 256 tokens


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--max-tokens", 0], ["max_tokens", "0"]),
        (["--max-tokens", 113], ["16 tokens and 113 behind it", "128 positions"]),
        (["--temperature", "nan"], ["temperature", "NaN"]),
        (["--top-p", 0], ["top_p"]),
        (["--stop", ""], ["stop", '""']),
        (["--seed", 2**63], ["seed"]),
        (["--runtime", "spare"], ["'spare'"]),
        (["--dtype", "int8"], ["int8"]),
        (["--device", "nowhere"], ["nowhere"]),
        (["--prompt", ""], ["prompt is empty"]),
        (["--prompt", "a" * 128], ["128 tokens does not fit"]),
        (["--prompt", "a\udcff"], ["no valid Unicode"]),
    ],
)
def test_bad_options_are_one_sentence(words: list[object], named: list[str], talker: Path) -> None:
    assert_refused(generate(talker, *words), *named)


def test_folders_that_cannot_generate_are_one_sentence(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_refused(generate(tmp_path / "nowhere"), "nowhere", "does not exist")
    with monkeypatch.context() as patch:
        patch.setattr(generating, "load_model", None)  # chat without a template is refused before anything is loaded
        assert_refused(generate(llama_folder, "--chat"), "no chat template")
    (llama_folder / "tokenizer.json").unlink()
    assert_refused(generate(llama_folder), "no tokenizer")


def test_python_gives_the_same_piece_by_piece(talker: Path) -> None:
    made = prunekit.generate(talker, PROMPT, max_tokens=9, stop="never there", dtype="float32", device="cpu")
    assert made.tokens == 0
    assert "".join(made) + "\n" == generate(talker, "--max-tokens", 9).out
    assert made.finish == "length"
