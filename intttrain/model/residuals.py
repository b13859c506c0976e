"""Splits what ``jax.vjp`` keeps of a layer into the layer's arguments and the rest, so that only the rest is stored.

``_, pull = jax.vjp(layer, *arguments)`` returns a function that holds every array its backward pass needs: activations,
but also the arguments themselves, weights among them. Stored for each of L layers, the weights would be copied L
times although the caller has them anyway.

JAX documents ``pull`` as a pytree whose leaves are the arrays it holds
(https://docs.jax.dev/en/latest/301/vjp-objects.html). That, and that an argument which it holds is the very object that
was passed in, is all this module relies on; it touches no field of the object. Held to it with jax 0.10.2 and 0.12.0.1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

Tree = Any
Residual = Any  # an array, traced or not; constants of a layer come as arrays of other types


@dataclasses.dataclass(frozen=True, eq=False)  # compared by identity: JAX compares these whenever it compares pytrees
class Pullback:
    """The gradient of a layer as a recipe without arrays, the same for all layers of one kind.

    Attributes:
      structure: of the function from ``jax.vjp``.
      argument_of: for each leaf, the number of the argument leaf that it is; ``None`` for a residual.
      residuals: shapes and dtypes of the residuals.
    """

    structure: jax.tree_util.PyTreeDef
    argument_of: tuple[int | None, ...]
    residuals: tuple[jax.ShapeDtypeStruct, ...]

    def check(self, residuals: list[Residual]) -> None:
        """Raises ``RuntimeError`` when another trace of the layer kept other arrays than this recipe expects.

        Values of one layer would otherwise be read as another array of the same shape: a wrong gradient, in silence.
        """
        found = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in residuals)
        if found != self.residuals:
            raise RuntimeError(
                f"jax {jax.__version__} keeps {_shown(found)} for the backward pass of a layer where it kept "
                f"{_shown(self.residuals)} of the same layer before; residuals.py needs both to be equal"
            )

    def __call__(self, arguments: Tree, residuals: list[Residual], cotangent: Tree) -> tuple[Tree, ...]:
        """Returns the gradients of the arguments, given these and the residuals of one layer."""
        given, rest = jax.tree.leaves(arguments), iter(residuals)
        leaves = [next(rest) if number is None else given[number] for number in self.argument_of]
        gradients: tuple[Tree, ...] = jax.tree.unflatten(self.structure, leaves)(cotangent)
        return gradients


def split_residuals(pull: Any, arguments: Tree) -> tuple[Pullback, list[Residual]]:
    """Returns the recipe of ``pull`` and the arrays that it holds beside the ``arguments`` it was made with."""
    leaves, structure = jax.tree.flatten(pull)
    number_of = {id(leaf): number for number, leaf in enumerate(jax.tree.leaves(arguments))}
    argument_of = tuple(number_of.get(id(leaf)) for leaf in leaves)
    residuals = [leaf for leaf, number in zip(leaves, argument_of, strict=True) if number is None]
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in residuals)
    return Pullback(structure, argument_of, shapes), residuals


def _shown(shapes: tuple[jax.ShapeDtypeStruct, ...]) -> str:
    return "(" + ", ".join(f"{x.dtype}{list(x.shape)}" for x in shapes) + ")"
