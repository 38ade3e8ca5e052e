"""What a recipe's method is, bound to a model: weights to zero, or structures to remove."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .blockwalk import Job
from .catalogue import find_method
from .errors import InputError
from .model.memory import MemoryModel
from .model.source import ResidentModel, Source, StreamedModel
from .recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_options(recipe: Recipe) -> None:
    """Raise `InputError` for options that the parts of the recipe's method do not have; no model is needed."""
    method = find_method(recipe.method)
    if method.width is not None:
        from .shrink.slicewalk import bound_width

        bound_width(method, recipe.parts)
        return
    if recipe.removes:
        from .shrink.shrinker import Shrinker

        Shrinker.of(method, recipe.parts)
        return
    from .sparsify.linear import Sparsifier

    Sparsifier.of(method, recipe.parts)


def job_of(recipe: Recipe, source: Source) -> Job:
    """The job a recipe asks for. Raises `InputError` for what the method cannot do with this model."""
    if recipe.removes:
        assert isinstance(source, StreamedModel)
        if find_method(recipe.method).width is not None:
            from .shrink.slicewalk import Slicing

            return Slicing.of(recipe, source)
        from .shrink.job import Shrinking

        return Shrinking.of(recipe, source)
    from .sparsify.walk import Sparsification

    return Sparsification.of(recipe, source.anatomy)


def source_of(model: PreTrainedModel, recipe: Recipe) -> Source:
    """A model in memory as the recipe's method works on it: in place, or on copies where shapes change.

    Raises `InputError` for methods that need a folder.
    """
    if not recipe.removes:
        return ResidentModel(model)
    method = find_method(recipe.method)
    reason = (
        "gives the residual stream another basis"
        if method.width is not None
        else "judges its candidates on texts of its own"
    )
    if method.width is not None or method.search is not None or "search" in recipe.parts:
        raise InputError(
            f"'{recipe.method}' {reason}, which needs a folder: save the model, and give prunekit.prune that"
        )
    return MemoryModel(model)
