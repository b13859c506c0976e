"""The table of mesh axes: which there are, and which dims of arrays are cut along which.

Meshes, shardings and the sums of gradients over devices (``layout/sharding.py::sum_gradient``) all follow it. A new
axis is its name in ``AXES``, its place in ``RULES``, and a field of ``config.MeshConfig`` for its size; with less,
``check_axes`` refuses to make a mesh.
"""

from __future__ import annotations

import types
from collections.abc import Collection, Mapping

# Outermost first: neighbouring devices lie along the last axis, which talks most, and so has the shortest way.
AXES = ("data", "fsdp", "context", "tensor")
# Slices of a multi-slice job lie along this one, so that only the sum of gradients crosses the data-center network.
SLICES_AXIS = "data"

# Logical name of a dim -> mesh axes that cut it, outermost first. A dim without an axis is replicated.
RULES: Mapping[str, tuple[str, ...]] = types.MappingProxyType(
    {
        # activations
        "batch": ("data", "fsdp"),
        "tokens": ("context",),
        "width": (),
        # parameters; heads, mlp and vocab name the same dims of activations
        "layers": (),
        "embed": ("fsdp", "context"),  # a context shard needs no copy of the optimizer state of its own
        "heads": ("tensor",),
        "kv_heads": ("tensor",),
        "spread_heads": ("tensor", "context"),  # while whole rows are attended to
        "head_dim": (),
        "mlp": ("tensor",),
        "vocab": ("tensor",),
        "target": ("tensor",),
        "norm": (),
        "taps": (),
    }
)
# The dims along which parameters are stored in pieces but used whole: gathered before a matmul.
GATHERED = ("embed",)

# The axes whose devices have different tokens: a gradient is summed over them, and parameters are copied along those
# of them that cut no dim of a parameter.
TOKEN_AXES = RULES["batch"] + RULES["tokens"]
COPY_AXES = tuple(
    axis for axis in TOKEN_AXES if not any(axis in RULES[name] for name in RULES if name not in ("batch", "tokens"))
)
# One axis, not several: the shards of a row stand in a line, and each hands its neighbour keys or states.
(ROW_AXIS,) = RULES["tokens"]


def check_axes(configured: Collection[str]) -> None:
    """Checks that the table is complete and that the configuration has the same axes.

    Args:
      configured: the axes whose size can be configured.

    Raises:
      ValueError: an axis stands in the table or in the configuration alone, or would be summed over wrongly.
    """
    ruled = {axis for axes in RULES.values() for axis in axes}
    for axis in sorted({*AXES, *ruled, *configured}):
        if axis not in configured:
            raise ValueError(f"the mesh axis {axis!r} has no size: config.MeshConfig has no field of that name")
        if axis not in AXES:
            raise ValueError(f"the mesh axis {axis!r} is not among layout.axes.AXES, {AXES}")
        if axis not in ruled:
            raise ValueError(f"the mesh axis {axis!r} cuts nothing: no name in layout.axes.RULES has it")
    for name in GATHERED:
        if alone := sorted(set(RULES[name]) - set(TOKEN_AXES)):
            raise ValueError(
                f"the mesh axes {alone} cut {name!r}, which is gathered, but neither 'batch' nor 'tokens': their "
                "devices would have the same tokens, and gradients would count them several times"
            )
