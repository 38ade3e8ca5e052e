"""What a recipe's method is, bound to a model: weights to zero, or structures to remove."""

from __future__ import annotations

from .blockwalk import Job
from .catalogue import find_method
from .model.source import Source, StreamedModel
from .recipe import Recipe


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
        assert isinstance(source, StreamedModel)  # what lies in memory keeps its shapes
        if find_method(recipe.method).width is not None:
            from .shrink.slicewalk import Slicing

            return Slicing.of(recipe, source)
        from .shrink.job import Shrinking

        return Shrinking.of(recipe, source)
    from .sparsify.walk import Sparsification

    return Sparsification.of(recipe, source.anatomy)
