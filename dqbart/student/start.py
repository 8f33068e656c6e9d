"""What a student is before it learns: layers of its teacher, a shape of its own, or another family."""

from typing import Any

from dqbart.recipe import SHAPE, Recipe
from dqbart.student.depth import make_student
from dqbart.student.maps import mapped_layers
from dqbart.student.shape import distilbert_student
from dqbart.student.sharing import albert_student


def new_student(teacher: Any, recipe: Recipe) -> Any:
    """A float student as a resolved recipe says, sharing nothing with the teacher; what is random follows torch's
    generator. Raises `ValueError` for a family, sizes or layers that don't fit the teacher.
    """
    assert recipe.layers is not None
    kind = teacher.config.model_type
    shape = {name: getattr(recipe, name) for name in SHAPE}
    if recipe.family == "albert" or kind == "albert":
        own = getattr(
            teacher.config, "dqbart_sharing", "all" if getattr(teacher.config, "num_hidden_groups", 1) == 1 else "none"
        )
        sharing = recipe.sharing if kind != "albert" else own
        layers = mapped_layers(recipe.layer_map, teacher.config.num_hidden_layers, recipe.layers.encoder)
        return albert_student(teacher, layers=layers, sharing=sharing, **shape)
    if shape.pop("embedding_size") is not None:
        raise ValueError(f"embedding_size {recipe.embedding_size}: only ALBERT has one; give family 'albert'")
    if recipe.family == "distilbert":
        if any(size is not None for size in shape.values()):
            raise ValueError("family 'distilbert': has its teacher's width; leave hidden_size, heads and the like out")
        layers = mapped_layers(recipe.layer_map, teacher.config.num_hidden_layers, recipe.layers.encoder)
        return distilbert_student(teacher, layers)
    return make_student(teacher, recipe.layers, recipe.layer_map, **shape)
