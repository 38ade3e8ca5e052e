"""`export --format gguf`: a model as the one file llama.cpp reads; dense in shape, every weight the bits it was stored as.

Only what can be written exactly is written: Llama (without biases) and Qwen2, without rope scaling, with a byte-level BPE tokenizer
whose way of splitting text llama.cpp knows by name. All else is refused, naming llama.cpp's own converter. The only room that knows
`gguf`, beside the one that makes the embedded model of such a file.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import machine
from .checkpoint.storage import replace_file
from .errors import InputError, VerificationError
from .exporting import Export
from .model.resizing import SHAPES
from .model.source import StreamedModel, refuse_left_out, refuse_sliced
from .progress import Progress, Silent

_ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2"}
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_BITS = {2: np.int16, 4: np.int32}

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# what llama.cpp calls the ways byte-level BPE tokenizers cut text before they merge, by the steps of tokenizer.json
_SPLITS: dict[tuple[str, ...], str] = {
    ("bytes, words",): "gpt-2",
    ("digits", "bytes, words"): "smollm",
    (_WORDS + r"\p{N}" + _REST, "bytes"): "qwen2",
    (_WORDS + r"\p{N}{1,3}" + _REST, "bytes"): "llama-bpe",
}


def export_gguf(folder: Path, out: Path, *, overwrite: bool = False, progress: Progress | None = None) -> Export:
    """Write a model folder, plain or packed, as a GGUF file; it is read again and every tensor's bits compared.

    Args:
        folder: a model folder.
        out: the file, `NAME.gguf`.
        overwrite: replace it where it is there.
        progress: told what is going on.

    Raises:
        InputError: the model is not one that can be written exactly, or there is no `gguf` package; nothing was written.
        StorageError: the disk refused.
        VerificationError: what was written does not hold the same bits; what stood in `out` still does.
    """
    begun = time.perf_counter()
    progress = progress or Silent()
    out = out.expanduser()
    _check_place(out, overwrite)
    source = StreamedModel.open(folder, dtype="float32", device="cpu")
    reader = source.reader
    metadata = _Metadata(folder, source)
    progress.start("writing", len(metadata.tensors))
    replace_file(out, partial(_fill, source=source, metadata=metadata, progress=progress))
    progress.stop()
    return Export(
        model=str(folder),
        out=out,
        format="gguf",
        tensors=len(metadata.tensors),
        packed=0,
        dense=sum(entry.bytes for entry in reader.entries.values()),
        before=sum((folder / file).stat().st_size for file in reader.files),
        after=out.stat().st_size,
        packed_before=0,
        packed_after=0,
        seconds=time.perf_counter() - begun,
        peak_rss_bytes=machine.peak_rss_bytes(),
    )


def _check_place(out: Path, overwrite: bool) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise InputError("writing GGUF needs one more package: pip install 'prunekit[embedded]'")
    if out.suffix != ".gguf":
        raise InputError(f"output '{out}' is the name of no GGUF file: --out NAME.gguf")
    if out.is_dir() or not out.parent.is_dir():
        raise InputError(f"output '{out}' cannot be written: it is a folder, or there is no folder '{out.parent}'")
    if out.exists() and not overwrite:
        raise InputError(f"output '{out}' is there already: --overwrite replaces it")


class _Metadata:
    """What a GGUF file says besides its weights, and what its weights are called. Raises `InputError` where that is not known."""

    def __init__(self, folder: Path, source: StreamedModel) -> None:
        import gguf

        self.folder = folder
        self.config: Any = source.module.config
        refuse_sliced(source, "a GGUF file has no place for them")
        refuse_left_out(source, "which a GGUF file has no place for")
        if SHAPES in source.reader.config:
            raise InputError(
                f"'{folder}' has blocks of different widths, which a GGUF file has no place for: give them one width first, with "
                f"prunekit export {folder} --pad --out PADDED"
            )
        kind = self.config.model_type
        rope = self.config.rope_parameters if kind in _ARCHITECTURES else {}
        unknown = (
            f"its architecture is {kind}"
            if kind not in _ARCHITECTURES
            else f"its rope is scaled ({rope['rope_type']})"
            if rope["rope_type"] != "default"
            else f"its activation is {self.config.hidden_act}"
            if self.config.hidden_act != "silu"
            else "its attention slides"
            if getattr(self.config, "use_sliding_window", kind == "mistral" and self.config.sliding_window)
            else "its linears have biases"
            if kind == "llama" and (self.config.attention_bias or self.config.mlp_bias)
            else None
        )
        if unknown:
            raise _refused(folder, unknown)
        self.rope_theta = float(rope["rope_theta"])
        self.architecture = getattr(gguf.MODEL_ARCH, _ARCHITECTURES[kind])
        self.tokenizer, self.split = _tokenizer(folder)
        names = gguf.get_tensor_name_map(self.architecture, self.config.num_hidden_layers)
        self.tensors: dict[str, str] = {}  # name in the file -> parameter
        for name, _ in source.module.named_parameters():
            theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
            dtype = source.reader.entries[source.key_of[name]].dtype
            if theirs is None or dtype not in _TYPES:
                raise _refused(folder, f"'{name}' ({dtype}) has no place in it")
            self.tensors[theirs] = name

    def say(self, writer: Any) -> None:
        """Add everything but the weights."""
        import gguf

        config = self.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_name(Path(str(config.name_or_path or self.folder)).name)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(head)
        writer.add_value_length(head)
        writer.add_rope_dimension_count(head)
        writer.add_rope_freq_base(self.rope_theta)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        tokens, kinds = _tokens(self.tokenizer, config.vocab_size)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.split)
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        gguf.SpecialVocab(self.folder, load_merges=True, n_vocab=config.vocab_size).add_to_gguf(writer, quiet=True)

    def arranged(self, source: StreamedModel) -> Iterator[tuple[str, Tensor]]:
        """Every tensor in the order of the file, as llama.cpp wants it: vectors in float32, rotated rows of Llama interleaved."""
        for theirs, name in self.tensors.items():
            key = source.key_of[name]
            tensor = source.reader.read([key])[key]
            halves = self.config.model_type != "qwen2"
            if halves and ".self_attn.q_proj." in name:
                tensor = _interleaved(tensor, self.config.num_attention_heads)
            elif halves and ".self_attn.k_proj." in name:
                tensor = _interleaved(tensor, self.config.num_key_value_heads)
            yield theirs, tensor if tensor.ndim > 1 else tensor.float()


def _refused(folder: Path, why: str) -> InputError:
    return InputError(
        f"'{folder}' cannot be written as GGUF exactly: {why}; use llama.cpp's converter on the plain folder: "
        f"python convert_hf_to_gguf.py {folder} --outfile NAME.gguf"
    )


def _interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Rows [heads · size, ...] with the two halves of every head, which rotate together, row by row in turn."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _tokenizer(folder: Path) -> tuple[dict[str, Any], str]:
    """`tokenizer.json`, and what llama.cpp calls its way of splitting text."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise _refused(folder, "it has no tokenizer.json")
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    split = tokenizer["pre_tokenizer"] or {}
    steps = split["pretokenizers"] if split.get("type") == "Sequence" else [split]
    name = _SPLITS.get(tuple(_step(step) for step in steps))
    model = tokenizer["model"]
    whole = bool(model.get("ignore_merges"))
    normaliser = (tokenizer["normalizer"] or {}).get("type")
    expected = (name == "llama-bpe", "NFC" if name == "qwen2" else None)
    if model.get("type") != "BPE" or name is None or (whole, normaliser) != expected:
        raise _refused(folder, "llama.cpp has no name that is known here for how its tokenizer splits text")
    return tokenizer, name


def _step(step: dict[str, Any]) -> str:
    """One step of a pre-tokenizer in a word, as `_SPLITS` has it."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return "bytes, words" if step["use_regex"] else "bytes"
    if kind == "Digits" and step["individual_digits"]:
        return "digits"
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex"))
    return f"unknown: {kind}"


def _tokens(tokenizer: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """The vocabulary in the order of its ids, and of what kind each token is; ids nobody uses are filled up."""
    import gguf

    kinds = gguf.TokenType
    tokens = [f"[PAD{number}]" for number in range(size)]
    found = [int(kinds.UNUSED)] * size
    for token, number in tokenizer["model"]["vocab"].items():
        tokens[number], found[number] = token, int(kinds.NORMAL)
    for added in tokenizer["added_tokens"]:
        kind = kinds.CONTROL if added["special"] else kinds.USER_DEFINED
        tokens[added["id"]], found[added["id"]] = added["content"], int(kind)
    return tokens, found


def _fill(path: Path, *, source: StreamedModel, metadata: _Metadata, progress: Progress) -> None:
    """Write and compare, before the file gets its name."""
    starts = _write(path, source=source, metadata=metadata, progress=progress)
    _compare(path, starts, source, metadata)


def _write(path: Path, *, source: StreamedModel, metadata: _Metadata, progress: Progress) -> dict[str, int]:
    """Write the file; returns where each tensor's bytes begin in it."""
    import gguf

    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[metadata.architecture])
    metadata.say(writer)
    for theirs, name in metadata.tensors.items():
        entry = source.reader.entries[source.key_of[name]]
        dtype = entry.dtype if len(entry.shape) > 1 else torch.float32
        kind = gguf.GGMLQuantizationType[_TYPES[dtype]]
        size = entry.count * dtype.itemsize
        writer.add_tensor_info(theirs, entry.shape, np.dtype(_BITS[dtype.itemsize]), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    (stream,) = writer.fout
    starts = {}
    for theirs, tensor in metadata.arranged(source):
        starts[theirs] = writer.ggml_pad(stream.tell(), writer.data_alignment)
        writer.write_tensor_data(_bits(tensor))
        progress.step(theirs)
    writer.close()
    return starts


def _bits(tensor: Tensor) -> Any:
    """A tensor's bits as whole numbers, which NumPy has for every width."""
    width = {2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize]
    return tensor.contiguous().view(width).numpy()


def _compare(path: Path, starts: dict[str, int], source: StreamedModel, metadata: _Metadata) -> None:
    with path.open("rb") as stream:  # the library's own reader takes seconds for the vocabulary alone
        for theirs, tensor in metadata.arranged(source):
            bits = _bits(tensor)
            stream.seek(starts[theirs])
            if stream.read(bits.nbytes) != bits.tobytes():
                raise VerificationError(
                    f"'{theirs}' in '{path}' is not what was to be written: nothing was kept; please report this"
                )
