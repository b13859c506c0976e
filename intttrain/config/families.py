"""Families of decoders: what each does differently, and what Hugging Face calls it.

    FAMILIES.add("mistral", Family("Mistral", qk_norm=False, window="number"))

The name is the ``model_type`` of ``config.json``. Everything that differs between families is a field of ``Family``:
``model/`` builds and ``interop/`` names what the fields say, and neither asks for a name. A family with a part that no
field describes yet gets a field here, whose default is what all others do.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from intttrain.config.registry import FAMILIES, Named

FamilyName = Annotated[str, Named(FAMILIES)]


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of decoders, otherwise as Llama: pre-norm, rotary embedding, grouped queries, SwiGLU, no biases.

    Attributes:
      class_stem: ``<stem>ForCausalLM`` is the stock class of transformers.
      qk_norm: whether every head has an RMSNorm on its queries and keys, before they are rotated.
      default_head_dim: used when a ``config.json`` has no ``head_dim``; ``None`` means width / heads.
      window: how ``config.json`` speaks of a sliding window. ``"switch"``: ``use_sliding_window`` and a kind for each
        layer; ``"number"``: ``sliding_window`` alone; ``"none"``: the stock class attends to everything, and only our
        modelling file reads ``sliding_window``.
      square_heads: whether the stock configuration insists that the heads divide the width.
    """

    class_stem: str
    qk_norm: bool = False
    default_head_dim: int | None = None
    window: Literal["switch", "number", "none"] = "none"
    square_heads: bool = False


FAMILIES.add("qwen3", Family("Qwen3", qk_norm=True, default_head_dim=128, window="switch"))
FAMILIES.add("llama", Family("Llama", square_heads=True))
