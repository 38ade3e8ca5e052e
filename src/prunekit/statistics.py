"""Streaming sums over calibration tokens, per linear: the only thing a score may know of the data.

Sums are raw (no means, no norms), so that order and batch size do not matter beyond rounding: products are taken in float32,
summed over a few hundred tokens, and added up in float64. Linears that are fed the same tensor (query, key and value; gate and up)
share one measurement. Tokens that are padding are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType

import torch
from torch import Tensor, nn

from .bits import row_chunks
from .errors import PrunekitError
from .model.modules import answering
from .runtime.kernels import add_gram

INPUT_SUMS = frozenset({"input_sum", "input_square", "input_abs", "window_abs", "gram", "half_gram"})
OUTPUT_SUMS = frozenset({"output_square", "output_abs"})
# of what a linear gives in the dense model, with what it is fed behind pruned blocks
TARGET_SUMS = frozenset({"target", "half_target"})
# tokens whose products are summed in float32 before they join the float64 sums; few enough to stay in cache
_ROWS = 256
# of the gram matrix: tokens to a product, and columns to a panel; only what lies below the diagonal's panels is computed
_GRAM_ROWS, _GRAM_PANEL = 512, 512


class Statistics:
    """Sums over the calibration tokens that a linear has seen, and the norms of its weight's columns.

    Shapes: input_sum, input_square, input_abs, window_abs [in]; output_square, output_abs [out] (of the module's output, bias
    included); inverse_rms []; gram, half_gram [in, in]; target, half_target [out, in];
    count is the number of tokens. Sums are kept in float64 (the gram matrix in float32) and handed out in float64, or in what `to`
    was told; what is derived of them is computed before that cast. Reading a sum that was not measured raises `PrunekitError`.
    """

    def __init__(
        self,
        count: int,
        sums: Mapping[str, Tensor],
        *,
        weight: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.count = count
        self._sums = dict(sums)
        self._weight = weight
        self._dtype = dtype
        self._norms: dict[float, Tensor] = {}
        self._whole_output_square: Tensor | None = None  # where the output sums were cut

    def _get(self, name: str) -> Tensor:
        if name not in self._sums:
            raise PrunekitError(
                f"statistic '{name}' was not measured: the part that reads it must declare needs={{'{name}'}}"
            )
        return self._sums[name]

    def _out(self, value: Tensor) -> Tensor:
        return value if self._dtype is None else value.to(self._dtype)

    @property
    def input_sum(self) -> Tensor:
        """Σ x, [in]."""
        return self._out(self._get("input_sum"))

    @property
    def input_square(self) -> Tensor:
        """Σ x², [in]."""
        return self._out(self._get("input_square"))

    @property
    def input_abs(self) -> Tensor:
        """Σ |x|, [in]."""
        return self._out(self._get("input_abs"))

    @property
    def window_abs(self) -> Tensor:
        """Σ over windows of (mean over a window's tokens of |x|)², [in]."""
        return self._out(self._get("window_abs"))

    @property
    def output_square(self) -> Tensor:
        """Σ y², [out]."""
        return self._out(self._get("output_square"))

    @property
    def output_abs(self) -> Tensor:
        """Σ |y|, [out]."""
        return self._out(self._get("output_abs"))

    @property
    def inverse_rms(self) -> Tensor:
        """Σ 1 / √(mean of x² over all inputs), a scalar."""
        return self._out(self._get("inverse_rms"))

    @property
    def gram(self) -> Tensor:
        """Σ x xᵀ, [in, in]."""
        return self._out(self._get("gram"))

    @property
    def half_gram(self) -> Tensor:
        """The gram matrix of the first half of every window alone, [in, in]: what is fitted to it can be tried on the rest."""
        return self._out(self._get("half_gram"))

    @property
    def target(self) -> Tensor:
        """Σ y xᵀ, [out, in]: y is what the linear gives in the dense model, without its bias, where it is fed x in this one."""
        return self._out(self._get("target"))

    @property
    def half_target(self) -> Tensor:
        """The target sums of the first half of every window alone, [out, in]."""
        return self._out(self._get("half_target"))

    @property
    def input_norm(self) -> Tensor:
        """‖X_:j‖₂ of every input channel, [in]."""
        return self._out(self._get("input_square").sqrt())

    @property
    def output_norm(self) -> Tensor:
        """‖Y_k:‖₂ of every output channel, [out]."""
        return self._out(self._get("output_square").sqrt())

    @property
    def mean_output_norm(self) -> Tensor:
        """Mean of ‖Y_k:‖₂ over all output channels, though a part may be given some of its rows only; a scalar."""
        square = self._get("output_square") if self._whole_output_square is None else self._whole_output_square
        return self._out(square.sqrt().mean())

    @property
    def input_mean(self) -> Tensor:
        """Σ x / count, [in]."""
        return self._out(self._get("input_sum") / self.count)

    @property
    def input_variance(self) -> Tensor:
        """Variance of every input channel over all tokens (biased: divided by count), never below 0, [in]."""
        mean = self._get("input_sum") / self.count
        return self._out((self._get("input_square") / self.count - mean.square()).clamp_min(0))

    def weight_column_norm(self, p: float) -> Tensor:
        """ℓp norm of every column of the whole weight, [in], though a part may be given some of its rows only.

        `p` is a positive number or `inf`, or 0 for the number of entries that are not 0.
        """
        if self._weight is None:
            raise PrunekitError("these statistics know of no weight: make them with `Statistics(..., weight=weight)`")
        if p not in self._norms:
            self._norms[p] = column_norm(self._weight, p)
        return self._out(self._norms[p])

    @property
    def device(self) -> torch.device | None:
        """Where the sums lie; None where nothing was measured."""
        return next((value.device for value in self._sums.values()), None)

    def _like(self, sums: Mapping[str, Tensor], *, dtype: torch.dtype | None = None) -> Statistics:
        """Other sums of the same linear, which know what is known of its weight; `dtype` where it is another."""
        found = Statistics(self.count, sums, weight=self._weight, dtype=dtype or self._dtype)
        found._norms = self._norms  # known to one, known to all
        found._whole_output_square = self._whole_output_square
        return found

    def to(self, dtype: torch.dtype) -> Statistics:
        """The same sums, handed out in another dtype."""
        return self._like(self._sums, dtype=dtype)

    def of(self, weight: Tensor) -> Statistics:
        """The same sums, with the weight [out, in] they belong to."""
        found = self._like(self._sums)
        found._weight, found._norms = weight, {}
        return found

    def rows(self, part: slice) -> Statistics:
        """The sums that belong to some rows of the weight: outputs are cut; inputs, column norms and means stay whole."""
        found = self._like({name: value[part] if name in OUTPUT_SUMS else value for name, value in self._sums.items()})
        if found._whole_output_square is None:
            found._whole_output_square = self._sums.get("output_square")
        return found

    def permuted(self, order: Tensor) -> Statistics:
        """The sums over inputs in another order: channel `order[j]` becomes channel j."""
        moved = {name: value[order] if name in INPUT_SUMS else value for name, value in self._sums.items()}
        for name in moved.keys() & {"gram", "half_gram", *TARGET_SUMS}:
            moved[name] = moved[name][:, order]
        return Statistics(self.count, moved, dtype=self._dtype)

    def permuted_outputs(self, order: Tensor) -> Statistics:
        """The sums over outputs in another order: row `order[j]` of the weight becomes row j. Its column norms are the same."""
        return self._like({name: value[order] if name in OUTPUT_SUMS else value for name, value in self._sums.items()})


def column_norm(weight: Tensor, p: float) -> Tensor:
    """ℓp norm of every column of a matrix [out, in], summed in float64: [in]. For `p` see `Statistics.weight_column_norm`."""
    unit = torch.ones((), dtype=torch.float64, device=weight.device)
    if p not in (0, 1, 2, math.inf):
        # powers are taken of shares of the largest, lest high ones of small weights all be 0
        largest = column_norm(weight, math.inf)
        unit = largest.where(largest > 0, unit)
    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for rows in row_chunks(*weight.shape):
        part = weight[rows].to(torch.promote_types(weight.dtype, torch.float32)).abs()
        if p == math.inf:
            total = torch.maximum(total, part.amax(0).double())
        elif p == 0:
            total += (part != 0).sum(0)
        elif p == 1:
            total += part.sum(0, dtype=torch.float64)
        else:
            total += (part.double() / unit).pow(p).sum(0)
    return total if p in (0, 1, math.inf) else total.pow(1 / p) * unit


class Sums:
    """Accumulates sums over one stream of vectors: those named, by name in `sums` when it is finished."""

    def __init__(self, wanted: frozenset[str]) -> None:
        self.wanted = wanted
        self.count = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, values: Tensor, keep: Tensor | None, windows: int = 1, target: Tensor | None = None) -> None:
        """Add the vectors along the last axis of `values` [..., width], or those where `keep` [...] is True; they are of `windows`.

        `target` [..., out] is what belongs to each of them, where target sums are wanted.
        """
        count = len(keep) if keep is not None else len(values) if values.ndim == 3 else windows
        if "window_abs" in self.wanted:
            self._add_windows(values.reshape(count, -1, values.shape[-1]), keep)
        if "half_gram" in self.wanted:
            self._add_halves(values.reshape(count, -1, values.shape[-1]), keep)
        if target is not None:
            self._add_target(values, target, keep, count)
        rows = values.reshape(-1, values.shape[-1])
        if keep is not None:
            rows = rows[keep.reshape(-1).to(rows.device)]
        self.count += rows.shape[0]
        if "gram" in self.wanted and "half_gram" not in self.wanted:
            self._add_gram("gram", rows)
        if self.wanted <= {"gram", "half_gram", "window_abs", *TARGET_SUMS}:
            return
        for chunk in torch.split(rows, _ROWS):
            exact = chunk if chunk.dtype == torch.float64 else chunk.float()
            if "input_sum" in self.wanted:
                self._accumulate("input_sum", exact.sum(0))
            if "input_abs" in self.wanted:
                self._accumulate("input_abs", exact.abs().sum(0))
            if "output_abs" in self.wanted:
                self._accumulate("output_abs", exact.abs().sum(0))
            if "inverse_rms" in self.wanted:
                self._accumulate("inverse_rms", exact.square().mean(1).rsqrt().sum(0))
            for name in ("input_square", "output_square"):
                if name in self.wanted:  # last, because a copy of our own may be squared in place
                    square = exact.square() if exact.dtype == chunk.dtype else exact.mul_(exact)
                    self._accumulate(name, square.sum(0))

    def _accumulate(self, name: str, value: Tensor) -> None:
        if name not in self.sums:
            self.sums[name] = torch.zeros_like(value, dtype=torch.float64)
        self.sums[name] += value

    def _add_windows(self, values: Tensor, keep: Tensor | None) -> None:
        for number, window in enumerate(values):
            rows = window if keep is None else window[keep[number].to(window.device)]
            # a window of padding alone has a mean of 0
            mean = rows.abs().sum(0, dtype=torch.float64) / max(1, len(rows))
            self._accumulate("window_abs", mean.square())

    def _add_halves(self, values: Tensor, keep: Tensor | None) -> None:
        """The first half of every window into one matrix and, where all is wanted, the second into the other, for `finish` to join."""
        middle = values.shape[1] // 2
        halves = [("half_gram", slice(None, middle)), ("gram", slice(middle, None))]
        for name, part in halves:
            if name in self.wanted:
                rows = values[:, part]
                real = None if keep is None else keep[:, part].to(values.device)
                self._add_gram(name, rows.reshape(-1, rows.shape[-1]) if real is None else rows[real])

    def _add_target(self, values: Tensor, target: Tensor, keep: Tensor | None, count: int) -> None:
        """The first half of every window to one sum, the second to the other, for `finish` to join."""
        values = values.reshape(count, -1, values.shape[-1])
        target = target.reshape(count, -1, target.shape[-1])
        middle = values.shape[1] // 2 if "half_target" in self.wanted else 0
        for name, part in (("half_target", slice(None, middle)), ("target", slice(middle, None))):
            if name in self.wanted:
                real = slice(None) if keep is None else keep[:, part].flatten().to(values.device)
                rows = values[:, part].reshape(-1, values.shape[-1])[real]
                wanted = target[:, part].reshape(-1, target.shape[-1])[real]
                if name not in self.sums:
                    self.sums[name] = torch.zeros(wanted.shape[1], rows.shape[1], device=rows.device)
                for some, others in zip(torch.split(wanted, _GRAM_ROWS), torch.split(rows, _GRAM_ROWS), strict=True):
                    self.sums[name] += some.float().t() @ others.float()

    def _add_gram(self, name: str, rows: Tensor) -> None:
        width = rows.shape[1]
        if name not in self.sums:
            wide = rows.dtype if rows.dtype == torch.float64 else torch.float32
            self.sums[name] = rows.new_zeros(width, width, dtype=wide)
        if add_gram(self.sums[name], rows):
            return
        for chunk in torch.split(rows, _GRAM_ROWS):
            exact = chunk if chunk.dtype == torch.float64 else chunk.float()
            for start in range(0, width, _GRAM_PANEL):
                panel = slice(start, start + _GRAM_PANEL)
                # a product of its own, not `addmm_`: terms are then added up in two stages, and few of them to the long sum
                self.sums[name][start:, panel] += exact[:, start:].t() @ exact[:, panel]

    @torch.inference_mode()  # as the sums were made
    def finish(self) -> None:
        """Mirror gram matrices, of which only what lies below the diagonal was summed, and join the halves of windows."""
        if "half_target" in self.sums:
            self.sums["target"] += self.sums["half_target"]
        if "half_gram" in self.sums and "gram" in self.sums:
            self.sums["gram"] += self.sums["half_gram"]
        for gram in (self.sums[name] for name in ("gram", "half_gram") if name in self.sums):
            for start in range(0, len(gram), _GRAM_PANEL):
                end = start + _GRAM_PANEL
                gram[start:end, end:] = gram[end:, start:end].t()
                corner = gram[start:end, start:end]
                corner.copy_(corner.tril() + corner.tril(-1).t())


def _zeros(width: int, inputs: Tensor) -> Tensor:
    """What a linear returns whose product nobody looks at."""
    return inputs.new_zeros((*inputs.shape[:-1], width))


@dataclass(frozen=True)
class Watch:
    """A module of any kind, and the sums that are wanted over what it returns, or over what it is `fed`."""

    module: nn.Module
    sums: frozenset[str]
    fed: bool = False


class Collector:
    """Hooks on a block's linears that sum what passes through them while it is entered.

    Tell it the batch's number of `windows` and its token mask `keep` before each forward, and call `end_batch` after it. While
    `sample_tokens` is not 0, it also keeps that many inputs of each linear, the last ones of the batch's last window.

    Where nobody uses what the block returns (`result_used=False`), nothing behind the linear that is called last is seen by anyone:
    once the first batch has shown which one that is, its product is left out and zeros are returned in its place.

    `watched` are more modules, linears or not, with sums of their own.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Module],
        needs: Iterable[str],
        *,
        result_used: bool = True,
        watched: Mapping[str, Watch] | None = None,
    ) -> None:
        self.windows = 1
        self.keep: Tensor | None = None
        self.sample_tokens = 0
        self._samples: dict[str, Tensor] = {}
        self._linears = dict(linears)
        self._inputs_wanted = frozenset(needs) & (INPUT_SUMS | TARGET_SUMS)
        self._outputs_wanted = frozenset(needs) & OUTPUT_SUMS
        known = INPUT_SUMS | OUTPUT_SUMS | TARGET_SUMS
        if not frozenset(needs) <= known:
            raise PrunekitError(f"unknown statistics {sorted(frozenset(needs) - known)}: known are {sorted(known)}")
        self._input_sums: dict[str, Sums] = {}  # by the first linear that is fed the tensor
        self._output_sums: dict[str, Sums] = {}
        self._watched = dict(watched or {})
        self._watched_sums = {name: Sums(watch.sums) for name, watch in self._watched.items()}
        self._leader: dict[str, str] = {}  # linear -> the linear it shares its input with
        self._live: list[tuple[str, Tensor]] = []  # inputs of the batch under way, held so that identity means sameness
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._targets: dict[str, Tensor] = {}  # of the batch under way
        self._following = False
        self._skips_last = not result_used and not self._outputs_wanted
        self._last_called = ""
        self._skipped = ExitStack()
        self._skips = False

    def __enter__(self) -> Collector:
        for name, module in self._linears.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        for name, watch in self._watched.items():
            self._handles.append(watch.module.register_forward_hook(self._watch(name, watch.fed)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._live.clear()
        self._skipped.close()
        self._skips = False

    def end_batch(self) -> None:
        """Forget the batch's tensors. Which linears share an input, and which comes last, is known after the first one."""
        self._live.clear()
        self._targets = {}
        if self._skips_last and not self._skips and self._last_called:
            self._skips = True
            self._skipped.enter_context(answering(self._linears[self._last_called], partial(_zeros, self._last_width)))

    @contextmanager
    def following(self) -> Iterator[None]:
        """While it is entered the dense model's batch passes: what linears give is kept as the target for the next batch."""
        self._targets, self._following = {}, True
        try:
            yield
        finally:
            self._following = False

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if self._following:
                if self._inputs_wanted & TARGET_SUMS:
                    bias = module.bias
                    self._targets[name] = output - bias if isinstance(bias, Tensor) else output.clone()
                return
            self._see_input(name, inputs[0])
            self._last_called, self._last_width = name, output.shape[-1]
            if self._outputs_wanted:
                self._output_sums.setdefault(name, Sums(self._outputs_wanted)).add(output, self.keep)

        return hook

    def _watch(self, name: str, fed: bool) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not self._following:
                self._watched_sums[name].add(inputs[0] if fed else output, self.keep, self.windows)

        return hook

    def _see_input(self, name: str, value: Tensor) -> None:
        for leader, tensor in self._live:
            if tensor is value and leader != name:
                self._leader[name] = leader
                return
        self._live.append((name, value))
        self._leader[name] = name
        self._input_sums.setdefault(name, Sums(self._inputs_wanted)).add(
            value, self.keep, self.windows, self._targets.get(name)
        )
        if self.sample_tokens:
            self._samples[name] = self._last(value).clone()

    def _last(self, values: Tensor) -> Tensor:
        """The last `sample_tokens` vectors of the last window, padding left out; some blocks flatten windows and length to one axis."""
        last = values.reshape(self.windows, -1, values.shape[-1])[-1]
        if self.keep is not None:
            last = last[self.keep[-1].to(last.device)]
        return last[-self.sample_tokens :]

    def sample(self, name: str) -> Tensor:
        """The sampled inputs of a linear, [tokens, in], in the model's dtype."""
        return self._samples[self._leader[name]]

    def statistics(self, sum_up: Callable[[list[Tensor]], None] = lambda tensors: None) -> dict[str, Statistics]:
        """The sums by linear, and by what else is watched; `sum_up` adds other processes' sums to ours, in place.

        Raises `PrunekitError` for a linear that no token went through.
        """
        for sums in (*self._input_sums.values(), *self._output_sums.values(), *self._watched_sums.values()):
            count = torch.tensor([sums.count], dtype=torch.int64)
            sum_up([count, *(sums.sums[name] for name in sorted(sums.sums))])
            sums.count = int(count)
            sums.finish()
        found: dict[str, Statistics] = {}
        for name in self._linears:
            if name not in self._leader:
                raise PrunekitError(
                    f"linear '{name}' was never called: the block computes past it, so it cannot be measured"
                )
            source = self._input_sums[self._leader[name]]
            outputs = self._output_sums[name].sums if name in self._output_sums else {}
            found[name] = Statistics(source.count, {**source.sums, **outputs})
        for name, sums in self._watched_sums.items():
            if not sums.count:
                raise PrunekitError(f"'{name}' was never called: the block computes past it, so it cannot be measured")
            known = found[name]._sums if name in found else {}
            found[name] = Statistics(sums.count, {**known, **sums.sums})
        return found
