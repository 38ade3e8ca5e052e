"""Trust what is on disk, not what was meant: load the written folder again and compare its logits with the walk's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .checkpoint.reader import Reader
from .errors import VerificationError
from .model.resizing import SHAPES, resized
from .model.source import StreamedModel, build_skeleton
from .model.stream import Walk, Windows
from .progress import no_bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Same weights, same inputs, same batch: most machines give the same bits. What is left over is the order of sums in other kernels.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
_TOKENS = 128  # positions at the end of the last window whose logits are compared


@dataclass(frozen=True)
class Verification:
    """How the reload compared.

    `through` is `from_pretrained` or `streamed`; `difference` is ‖a−b‖/‖a‖ over the logits of `tokens` positions.
    """

    through: str
    tokens: int
    difference: float
    tolerance: float


def compared_tokens(windows: Windows) -> int:
    """How many positions at the end of the last window are compared."""
    return min(_TOKENS, windows.length)


@torch.inference_mode()
def verify(
    folder: Path,
    windows: Windows,
    expected: Tensor,
    *,
    dtype: torch.dtype,
    device: torch.device,
    whole: bool,
    trust_remote_code: bool = False,
) -> Verification:
    """Compare the folder's logits with `expected`.

    Args:
        folder: a finished model folder.
        windows: the batch the walk computed, as it was batched there.
        expected: [tokens, vocabulary] logits of the last positions of its last window.
        dtype, device: those of the walk.
        whole: load with `from_pretrained`, or else stream block by block.
        trust_remote_code: passed on to transformers.

    Raises:
        VerificationError: the logits differ by more than rounding.
    """
    if whole:
        found = _through_transformers(folder, windows, len(expected), dtype, device, trust_remote_code)
    else:
        found = _streamed(folder, windows, len(expected), dtype, device, trust_remote_code)
    difference = relative_difference(found, expected)
    result = Verification("from_pretrained" if whole else "streamed", len(expected), difference, TOLERANCE[dtype])
    if not difference <= result.tolerance:
        raise VerificationError(
            f"'{folder}' does not compute what was pruned: its logits differ by {difference:.2g} of their norm "
            f"(allowed: {result.tolerance:g}). Its index was removed so that nothing loads it; please report this"
        )
    return result


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖_F / ‖expected‖_F, a few rows at a time: in float32 a large vocabulary's logits are larger than a block."""
    squares = torch.zeros(2, dtype=torch.float64)
    for ours, theirs in zip(torch.split(expected, 16), torch.split(found, 16), strict=True):
        wanted = ours.double()
        squares += torch.stack([(theirs.double() - wanted).square().sum(), wanted.square().sum()]).cpu()
    gap, norm = squares.sqrt().tolist()
    return float(gap / norm) if norm > 0 else float(gap)


def _through_transformers(
    folder: Path, windows: Windows, tokens: int, dtype: torch.dtype, device: torch.device, trust_remote_code: bool
) -> Tensor:
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True}
    reader = Reader(folder)
    with no_bar():
        if (
            SHAPES in reader.config
        ):  # with our own copy of the code that the folder has for this: what lies there is not run
            skeleton = build_skeleton(reader, dtype, torch.device("cpu"))
            model = resized(type(skeleton)).from_pretrained(folder, config=skeleton.config, **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
    return tail_logits(model.to(device).eval(), windows, tokens)


@torch.inference_mode()
def tail_logits(model: PreTrainedModel, windows: Windows, tokens: int) -> Tensor:
    """A model's logits at the last `tokens` positions of the last window: [tokens, vocabulary]."""

    def cut(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # the head sees only the positions that are compared; logits of a whole batch may be larger than the model
        return (inputs[0][-1:, -tokens:],)

    handle = model.get_output_embeddings().register_forward_pre_hook(cut)
    mask = None if windows.keep is None else windows.keep.to(device=model.device, dtype=torch.long)
    output = model(input_ids=windows.ids.to(model.device), attention_mask=mask, use_cache=False)
    handle.remove()
    logits = output.logits[0]
    assert isinstance(logits, Tensor)
    return logits


def _streamed(
    folder: Path, windows: Windows, tokens: int, dtype: torch.dtype, device: torch.device, trust_remote_code: bool
) -> Tensor:
    source = StreamedModel(Reader(folder), dtype, device, trust_remote_code=trust_remote_code)
    walk = Walk(source, windows, batch=len(windows))
    walk.start()
    walk.run_all()
    ids = windows.ids[-1, -tokens:]
    source.load_outer(ids, "chunked")
    return walk.logits(walk.hidden[len(windows) - 1 : len(windows)][0, -tokens:], ids)
