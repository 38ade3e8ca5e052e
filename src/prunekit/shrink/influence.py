"""How far blocks, and sublayers in them, turn the hidden states that pass through, measured on a walk through the dense model."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ..blockwalk import Seconds, dense_blocks
from ..distributed import Ranks
from ..errors import InputError
from ..model.stream import Walk
from .plan import Structures
from .sublayers import left_out

_NO_DIRECTION = 0.5  # the cosine of a token without a direction, as in the official code


@dataclass
class Influence:
    """Measures blocks of `walk`'s model; each measurement is a walk of its own. `step` is called behind every block."""

    walk: Walk
    ranks: Ranks
    seconds: Seconds
    step: Callable[[], None]

    def turned(self, without: Collection[int] = ()) -> dict[int, float]:
        """1 − mean cosine between what a block is fed and what it returns, over all tokens, of every block not in `without`."""
        found: dict[int, float] = {}

        def see(index: int, before: Tensor, after: Tensor, keep: Tensor | None) -> Tensor:
            return _sums(before, after, keep)

        for index, sums in self._through(without, see):
            found[index] = 1 - float(sums[0] / sums[1])
        return found

    @torch.inference_mode()
    def turned_by_sublayers(self, structures: Structures) -> dict[tuple[int, str], float]:
        """1 − mean cosine between the stream before a sublayer and behind it, over all tokens, by block and name.

        The stream is what the block returns without the sublayers that have not added to it yet.
        """
        walk = self.walk
        found: dict[tuple[int, str], float] = {}
        for block, module in dense_blocks(walk, self.ranks, self.seconds, self.step):
            sublayers = structures[block.index]
            sums = {each.name: torch.zeros(2, dtype=torch.float64) for each in sublayers}
            with self.seconds.timed("forward"), self.ranks.together():
                for position, batch in enumerate(walk.batches):
                    before = walk.hidden[batch]
                    after = walk.run_batch(block.index, module, position, before)
                    streams: dict[frozenset[str], Tensor] = {
                        frozenset(): before.to(after.device),
                        frozenset(each.name for each in sublayers): after,
                    }
                    for each in sublayers:
                        assert each.sublayer is not None
                        ends = [each.sublayer.reads, each.sublayer.reads | {each.name}]
                        for present in ends:
                            if present not in streams:
                                with left_out(module, [other for other in sublayers if other.name not in present]):
                                    streams[present] = walk.run_batch(block.index, module, position, before)
                        turned = _sums(streams[ends[0]], streams[ends[1]], walk.windows[batch].keep)
                        sums[each.name] += turned.cpu()
                    walk.hidden[batch] = after
            walk.hidden.turn()
            self.ranks.sum_up(list(sums.values()))
            found.update({(block.index, name): 1 - float(total[0] / total[1]) for name, total in sums.items()})
        return found

    def angles(self, count: int) -> list[float]:
        """For every stretch of `count` blocks, the mean angle, in π, between its first input and its last output at the last token."""
        blocks = len(self.walk.source.anatomy.blocks)
        inputs: list[list[Tensor]] = [[] for _ in range(blocks + 1)]

        def see(index: int, before: Tensor, after: Tensor, keep: Tensor | None) -> Tensor:
            if keep is not None:
                raise InputError("depth.choose=contiguous looks at last tokens: it cannot do with padded windows")
            inputs[index].append(before[:, -1].clone())  # they are about to be overwritten
            if index == blocks - 1:
                inputs[blocks].append(after[:, -1].clone())
            return torch.zeros(2, dtype=torch.float64)

        self._through((), see)
        last = [torch.cat(parts) for parts in inputs]
        found = []
        for first in range(blocks - count + 1):
            cosine = _cosines(last[first], last[first + count]).clamp(-1, 1)
            sums = torch.stack([(cosine.acos() / math.pi).sum(), torch.tensor(float(len(cosine)))]).double()
            self.ranks.sum_up([sums])
            found.append(float(sums[0] / sums[1]))
        return found

    @torch.inference_mode()
    def _through(
        self, without: Collection[int], see: Callable[[int, Tensor, Tensor, Tensor | None], Tensor]
    ) -> list[tuple[int, Tensor]]:
        """Walk through the blocks not in `without`, `see` what each is fed and returns, batch by batch, and add up what that gives."""
        walk, found = self.walk, []
        for block, module in dense_blocks(walk, self.ranks, self.seconds, self.step, without):
            sums = torch.zeros(2, dtype=torch.float64)
            with self.seconds.timed("forward"), self.ranks.together():
                for position, batch in enumerate(walk.batches):
                    before = walk.hidden[batch]
                    after = walk.run_batch(block.index, module, position, before)
                    sums += see(block.index, before.to(after.device), after, walk.windows[batch].keep).cpu()
                    walk.hidden[batch] = after
            walk.hidden.turn()
            self.ranks.sum_up([sums])
            found.append((block.index, sums))
        return found


def _sums(before: Tensor, after: Tensor, keep: Tensor | None) -> Tensor:
    """The sum of the cosines of all tokens that count, and how many those are. Shapes: [windows, length, hidden] twice -> [2]."""
    cosine = _cosines(before, after)
    cosine = cosine.flatten() if keep is None else cosine[keep.to(cosine.device)]
    return torch.stack([cosine.double().sum(), cosine.new_tensor(len(cosine), dtype=torch.float64)])


def _cosines(before: Tensor, after: Tensor) -> Tensor:
    """Cosine of every vector with its successor. Shapes: [..., hidden] twice -> [...] float64."""
    cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1, eps=0.0)
    return torch.where(torch.isfinite(cosine), cosine, _NO_DIRECTION)
