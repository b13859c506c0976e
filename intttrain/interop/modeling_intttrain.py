"""In-Place Test-Time Training for Hugging Face transformers: decoders such as Qwen3 and Llama with fast weights.

This file stands alone beside the weights (torch and transformers 4.57 or newer) and is loaded by

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

In the layers ``config.ttt_layers`` the MLP's down projection is a fast weight. Tokens are cut into chunks of
``ttt_chunk``; a chunk is computed with the state left by the chunks before it, then committed:

    o_t = (W0 + S) z_t
    S  += bound(ttt_lr * sum_t v_t z_t^T)        v_t = u_t @ ttt_proj.weight; another rule: UpdateRule
    u_t = sum_k ttt_conv[k] * x_{t+k-2}          over tokens of the same chunk; x: embeddings or the MLP's input

An unfinished chunk never changes the state. Every row counts its chunks from its first real token, so padding and
the other rows of a batch change nothing. While decoding, the state lives in the cache: a new cache starts fresh.

Between two releases transformers renames what it hands to its layers. So the cache is found by its type, and every
call checks that the fast weights were reached and saw what the attention saw: wrong is an error, never silent.

Letters: B row, R some of the rows, T tokens of this call, C tokens per chunk, M chunks, G tokens of M chunks,
D model width, F feed-forward width, X any width.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import transformers
from torch import nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_sliding_window_causal_mask

if TYPE_CHECKING:
    _Stock = Any  # the mixins below stand in front of a class of transformers
else:
    _Stock = object

CONV_TAPS = 5
_KEYS = ("ttt_layers", "ttt_proj", "ttt_lr", "ttt_chunk", "ttt_target")
# What this file hands to the stock decoder and would lose in silence if it were renamed.
_ARGUMENTS = ("attention_mask", "position_ids", "inputs_embeds", "use_cache")


@dataclasses.dataclass(frozen=True)
class UpdateRule:
    """What a full chunk writes, what is left of what was written before, and how the state is read.

    This is the sum of outer products: nothing is forgotten. Another rule is a subclass that overrides ``retention``,
    ``write`` or ``bound``, and a line in ``UPDATE_RULES``. Its own fields are those of the key ``intttrain_update``;
    ``__post_init__`` checks them. The same rule stands in ``intttrain/ttt/rules.py``.

    Attributes:
      clip: largest Frobenius norm of one update.
      spectral: largest spectral norm of one update.
      preserve_row_norm: read ``W0 + S`` with its rows rescaled to the norms of W0's rows.
    """

    clip: float | None = None
    spectral: float | None = None
    preserve_row_norm: bool = False

    def __post_init__(self) -> None:
        for name in ("clip", "spectral"):
            value = getattr(self, name)
            fits = value is None or (_is_number(value) and value > 0)
            _require(fits, _key_of(name), value, "a finite number above 0, or absent")
        rows = self.preserve_row_norm
        _require(isinstance(rows, bool), _key_of("preserve_row_norm"), rows, "true or false")

    @property
    def retention(self) -> float:
        """r: how much of the state is left after a chunk; 1 keeps all of it."""
        return 1.0

    def write(self, v_BCD: torch.Tensor, z_BCF: torch.Tensor) -> torch.Tensor:
        """Returns ``sum_t v_t z_t^T`` (B D F) of values and activations in float32."""
        return torch.einsum("bcd,bcf->bdf", v_BCD, z_BCF)

    def bound(self, delta_BDF: torch.Tensor) -> torch.Tensor:
        """Returns the update scaled down to the bounds."""
        for bound, order in ((self.clip, "fro"), (self.spectral, 2)):
            if bound is not None:
                norm_B = torch.linalg.matrix_norm(delta_BDF, ord=order)
                delta_BDF = delta_BDF * (bound / norm_B.clamp(min=bound))[:, None, None]
        return delta_BDF

    def after_chunk(
        self, s_BDF: torch.Tensor | None, v_BCD: torch.Tensor, z_BCF: torch.Tensor, eta: float, full_B: torch.Tensor
    ) -> torch.Tensor:
        """Returns ``r S + bound(eta write(v, z))`` where the chunk is full, S in other rows; ``None`` is S = 0."""
        full_B11 = full_B[:, None, None]
        delta_BDF = torch.where(full_B11, self.bound(eta * self.write(v_BCD.float(), z_BCF.float())), 0.0)
        if s_BDF is None:
            return delta_BDF
        if self.retention != 1.0:
            s_BDF = torch.where(full_B11, self.retention * s_BDF, s_BDF)
        return s_BDF + delta_BDF

    def row_scale(self, s_BDF: torch.Tensor, w_down_DF: torch.Tensor) -> torch.Tensor | None:
        """Returns ``|W0[d]| / |W0[d] + S[d]|`` (B D), what rows are read multiplied with; ``None`` for nothing."""
        if not self.preserve_row_norm:
            return None
        base_DF = w_down_DF.detach().float()
        moved_BD = (base_DF + s_BDF.detach()).norm(dim=2)
        return base_DF.norm(dim=1) / moved_BD.clamp(min=1e-12)


@dataclasses.dataclass(frozen=True)
class Target:
    """What values are made of: embeddings or the MLP's input, mixed by ``ttt_conv`` or the next position alone."""

    from_embeddings: bool
    convolution: bool


# What this file implements, by the names in config.json. An export reads the keys and refuses what is not there.
UPDATE_RULES = {"sum": UpdateRule}
TARGETS = {
    "input_embed": Target(from_embeddings=True, convolution=True),
    "hidden_states": Target(from_embeddings=False, convolution=True),
    "next_hidden": Target(from_embeddings=False, convolution=False),
}
BOUNDS = {  # fields of every rule
    "clip": "intttrain_delta_clip",
    "spectral": "intttrain_delta_spectral",
    "preserve_row_norm": "intttrain_preserve_row_norm",
}
_UPDATE_KEY = "intttrain_update"


def _key_of(field: str) -> str:
    """Returns what a field of an update rule is called in ``config.json``."""
    return BOUNDS.get(field, f"{_UPDATE_KEY}.{field}")


@dataclasses.dataclass(frozen=True)
class FastWeightSettings:
    """The ``ttt_*`` and ``intttrain_*`` keys of ``config.json``."""

    layers: tuple[int, ...]
    eta: float
    chunk_tokens: int
    target: Target
    update: UpdateRule


def read_settings(config: Any) -> FastWeightSettings | None:
    """Returns the settings, ``None`` when ``ttt_mode`` is false. Raises ``ValueError`` for a key missing or wrong."""
    mode = getattr(config, "ttt_mode", None)
    if mode is None:
        raise ValueError(
            "config.json has no ttt_mode: the fast weights would be silently off. Restore the ttt_* keys, or load the "
            "folder without trust_remote_code to run the plain model on purpose."
        )
    _require(isinstance(mode, bool), "ttt_mode", mode, "true or false (no quotes)")
    if not mode:
        return None
    missing = [key for key in _KEYS if getattr(config, key, None) is None]
    if missing:
        raise ValueError(f"config.json has ttt_mode but no {', '.join(missing)}; a TTT model needs {', '.join(_KEYS)}")
    unknown = [
        key for key in vars(config) if key.startswith("intttrain_") and key not in (*BOUNDS.values(), _UPDATE_KEY)
    ]
    if unknown:
        raise ValueError(f"config.json has {unknown[0]}, which this modelling file does not know; use a newer one")
    layers, proj, eta, chunk, target = (getattr(config, key) for key in _KEYS)
    last = config.num_hidden_layers - 1
    whole = isinstance(layers, (list, tuple)) and all(type(i) is int and 0 <= i <= last for i in layers)
    fits = whole and len(layers) > 0 and list(layers) == sorted(set(layers))
    _require(fits, "ttt_layers", layers, f"increasing layer indices from 0 to {last}")
    _require(proj is True, "ttt_proj", proj, "true")
    _require(_is_number(eta) and eta >= 0, "ttt_lr", eta, "a finite number, at least 0")
    _require(type(chunk) is int and chunk >= 1, "ttt_chunk", chunk, "a whole number of tokens, at least 1")
    _require(isinstance(target, str) and target in TARGETS, "ttt_target", target, f"one of {', '.join(TARGETS)}")
    return FastWeightSettings(tuple(layers), float(eta), chunk, TARGETS[target], _read_update(config))


def _read_update(config: Any) -> UpdateRule:
    """Returns the update rule of ``config.json``, by default the plain sum, with its bounds."""
    section = getattr(config, _UPDATE_KEY, None)
    section = {"kind": "sum"} if section is None else section
    kind = section.get("kind") if isinstance(section, dict) else None
    known = ", ".join(UPDATE_RULES)
    _require(isinstance(kind, str) and kind in UPDATE_RULES, f"{_UPDATE_KEY}.kind", kind, f"one of {known}")
    rule = UPDATE_RULES[kind]
    wanted = {"kind", *(field.name for field in dataclasses.fields(rule) if field.name not in BOUNDS)}
    _require(section.keys() == wanted, _UPDATE_KEY, section, f"a section of {', '.join(sorted(wanted))}")
    bounds = {field: getattr(config, key, None) for field, key in BOUNDS.items()}
    given = {field: value for field, value in bounds.items() if value is not None}
    return rule(**given, **{field: value for field, value in section.items() if field != "kind"})


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require(fits: bool, key: str, value: Any, rule: str) -> None:
    if not fits:
        raise ValueError(f"config.json: {key}={value!r} must be {rule}")


def _unsupported(what: str) -> RuntimeError:
    return RuntimeError(
        f"{what}: transformers {transformers.__version__} calls this model in a way that modeling_intttrain.py does "
        "not know, and the fast weights would be wrong; use a release that intttrain was tested with, or export again "
        "with a newer intttrain"
    )


@dataclasses.dataclass
class FastWeightState:
    """One layer's state between two calls.

    Attributes:
      s_BDF: float32; ``None`` until the first chunk of any row is committed.
      z_BCF, x_BCD: the open chunk; from ``fill_B`` on without meaning, overwritten before it is committed.
      fill_B: real tokens in the open chunk.
      columns: batch columns seen so far, padding included; equals the cache's length.
      key_BX: the newest key of the layer's attention; tells whose row this is. ``None`` without a cache.
    """

    s_BDF: torch.Tensor | None
    z_BCF: torch.Tensor
    x_BCD: torch.Tensor
    fill_B: torch.Tensor
    columns: int
    key_BX: torch.Tensor | None = None

    def map_rows(self, change: Any) -> FastWeightState:
        """Returns the state with ``change`` applied to every tensor (they all have the row on axis 0)."""
        values = vars(self).items()
        return FastWeightState(**{name: change(x) if isinstance(x, torch.Tensor) else x for name, x in values})


class InPlaceTTTCache(DynamicCache):
    """A ``DynamicCache`` whose rows carry their fast weights along (beam search reorders both)."""

    fast_weights: dict[int, FastWeightState]

    @staticmethod
    def adopt(cache: Any, layers: Iterable[int]) -> None:
        """Turns an empty ``DynamicCache`` made by ``generate`` or by a caller into this class, in place.

        Raises:
          NotImplementedError: of another kind, or changed in a way that the fast weights of ``layers`` did not see.
          ValueError: filled without fast weights.
        """
        if not isinstance(cache, InPlaceTTTCache):
            if type(cache) is not DynamicCache:
                raise NotImplementedError(
                    f"{type(cache).__name__} is not supported: fast weights need a DynamicCache "
                    "(leave cache_implementation unset)"
                )
            if any(cache.get_seq_length(layer) for layer in layers):
                raise ValueError("the cache was filled without fast weights; start from an empty one")
            cache.__class__ = InPlaceTTTCache
            cache.fast_weights = {}
        for layer in layers:
            cache._check(layer)

    def _check(self, layer: int) -> None:
        past, state = self.get_seq_length(layer), self.fast_weights.get(layer)
        if past == 0:
            self.fast_weights.pop(layer, None)
            return
        seen = 0 if state is None else state.columns
        if past != seen:
            raise NotImplementedError(
                f"the cache holds {past} columns, but the fast weight of layer {layer} has seen {seen}; "
                "a cache cannot be cut or filled by another model"
            )
        key_BX = self.newest_key(layer)
        if not torch.equal(key_BX, state.key_BX.to(key_BX.device)):
            raise NotImplementedError(
                f"the cache of layer {layer} was changed and its fast weight was not: rows may be reordered, repeated "
                "and selected by reorder_cache, batch_repeat_interleave and batch_select_indices only"
            )

    def newest_key(self, layer: int) -> torch.Tensor:
        """Returns a copy of what the attention of ``layer`` has stored last, one row of numbers for each row."""
        return self.layers[layer].keys[:, :, -1].detach().flatten(1).clone()

    @property
    def is_croppable(self) -> bool:
        """Tells ``generate`` that assisted decoding is impossible."""
        return False

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refuses: an update that was added is not kept apart."""
        raise NotImplementedError("fast weights cannot be rolled back: assisted decoding and crop() are not supported")

    def reset(self) -> None:
        """Empties the cache and drops the fast weights."""
        super().reset()
        for layer in self.layers:
            layer.is_initialized = False  # before 5.x the stock reset keeps its columns, filled with zeros
        self.fast_weights = {}

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keeps and repeats rows as beam search chose."""
        super().reorder_cache(beam_idx)
        self._map_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row."""
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps only these rows."""
        super().batch_select_indices(indices)
        self._map_rows(lambda x: x[indices.to(x.device)])

    def _map_rows(self, change: Any) -> None:
        self.fast_weights = {layer: state.map_rows(change) for layer, state in self.fast_weights.items()}


@dataclasses.dataclass
class _Call:
    """What the fast weights need to know of one call of the decoder."""

    valid_BT: torch.Tensor  # bool, false at padding
    embeds_BTD: torch.Tensor
    reached: list[int] = dataclasses.field(default_factory=list)  # layers whose fast weight has run


class _TargetProjection(nn.Linear):
    """``ttt_proj``: the weight is D_in x D_out, used as ``u @ weight`` (a Linear would transpose it)."""

    def forward(self, u_BCD: torch.Tensor) -> torch.Tensor:
        return u_BCD @ self.weight


class _TargetConv(nn.Conv1d):
    """``ttt_conv``: depthwise, centred, zero beyond the chunk."""

    def forward(self, x_BCD: torch.Tensor) -> torch.Tensor:
        return super().forward(x_BCD.transpose(1, 2)).transpose(1, 2)


class InPlaceTTTMLP(nn.Module):
    """A SwiGLU MLP whose down projection is the initial fast weight. Takes over the stock MLP's submodules."""

    def __init__(self, config: Any, settings: FastWeightSettings, plain: nn.Module, layer_idx: int):
        super().__init__()
        width = config.hidden_size
        self.settings, self.layer_idx, self.d_ff = settings, layer_idx, config.intermediate_size
        self.gate_proj, self.up_proj, self.down_proj = plain.gate_proj, plain.up_proj, plain.down_proj
        self.act_fn = plain.act_fn
        self.ttt_proj = _TargetProjection(width, width, bias=False)
        if settings.target.convolution:
            self.ttt_conv = _TargetConv(width, width, CONV_TAPS, padding=CONV_TAPS // 2, groups=width, bias=False)
        self.call: _Call | None = None  # set by the decoder layer for the duration of one call
        self.cache: InPlaceTTTCache | None = None

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Returns ``(W0 + S) z`` and moves the state that the cache holds."""
        if self.call is None:
            raise _unsupported(f"the fast weight of layer {self.layer_idx} got nothing from InPlaceTTT*Model.forward")
        z_BTF = self.act_fn(self.gate_proj(x_BTD)) * self.up_proj(x_BTD)
        if z_BTF.shape[-1] != self.d_ff:
            raise NotImplementedError("tensor parallelism over the feed-forward axis is not supported")
        base_BTD = self.down_proj(z_BTF)
        source_BTD = self.call.embeds_BTD if self.settings.target.from_embeddings else x_BTD
        state = None if self.cache is None else self.cache.fast_weights.get(self.layer_idx)
        if state is None:
            state = self._fresh_state(z_BTF, source_BTD)
        advance = self._advance_one if z_BTF.shape[1] == 1 else self._advance_many
        new = (z_BTF, source_BTD.to(z_BTF.device), self.call.valid_BT.to(z_BTF.device))
        update_BTD, scale_BTD, state = advance(*new, state)
        if self.cache is not None:
            stored = self.cache.get_seq_length(self.layer_idx)
            if stored != state.columns:
                raise _unsupported(f"layer {self.layer_idx} has {stored} columns of keys for {state.columns} tokens")
            state.key_BX = self.cache.newest_key(self.layer_idx)
            self.cache.fast_weights[self.layer_idx] = state
        self.call.reached.append(self.layer_idx)
        if update_BTD is None:
            return base_BTD
        out_BTD = base_BTD.float() + update_BTD
        return (out_BTD if scale_BTD is None else out_BTD * scale_BTD).to(base_BTD.dtype)

    def _fresh_state(self, z_BTF: torch.Tensor, x_BTD: torch.Tensor) -> FastWeightState:
        rows, chunk = z_BTF.shape[0], self.settings.chunk_tokens
        z_BCF = z_BTF.new_zeros(rows, chunk, z_BTF.shape[2])
        x_BCD = x_BTD.new_zeros(rows, chunk, x_BTD.shape[2], device=z_BTF.device)
        return FastWeightState(None, z_BCF, x_BCD, torch.zeros(rows, dtype=torch.long, device=z_BTF.device), 0)

    def _advance_one(
        self, z_B1F: torch.Tensor, x_B1D: torch.Tensor, valid_B1: torch.Tensor, state: FastWeightState
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, FastWeightState]:
        """One token per row, the common case while decoding: reads at one position, writes into the open chunk."""
        update_B1D, scale_B1D = self._read(state.s_BDF, z_B1F)
        z_BCF, x_BCD = state.z_BCF, state.x_BCD
        if torch.is_grad_enabled():  # autograd may still need the old buffers
            z_BCF, x_BCD = z_BCF.clone(), x_BCD.clone()
        rows_R = valid_B1[:, 0].nonzero()[:, 0]
        z_BCF[rows_R, state.fill_B[rows_R]] = z_B1F[rows_R, 0]
        x_BCD[rows_R, state.fill_B[rows_R]] = x_B1D[rows_R, 0]
        fill_B = state.fill_B + valid_B1[:, 0]
        full_B = fill_B == self.settings.chunk_tokens
        s_BDF = state.s_BDF
        if full_B.any():
            s_BDF = self._commit(s_BDF, z_BCF, x_BCD, full_B)
            fill_B = fill_B.masked_fill(full_B, 0)
        return update_B1D, scale_B1D, FastWeightState(s_BDF, z_BCF, x_BCD, fill_B, state.columns + 1)

    def _advance_many(
        self, z_BTF: torch.Tensor, x_BTD: torch.Tensor, valid_BT: torch.Tensor, state: FastWeightState
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, FastWeightState]:
        """Any number of tokens: each row's real tokens are laid out on its own chunk grid, chunk after chunk."""
        chunk = self.settings.chunk_tokens
        total_B = state.fill_B + valid_BT.sum(1)
        chunks = int(total_B.max()) // chunk + 1  # the last one is open in every row
        spare = chunks * chunk  # one slot more, where padding is dropped
        slot_BT = (state.fill_B[:, None] + valid_BT.long().cumsum(1) - 1).masked_fill(~valid_BT, spare)
        z_BMCF = _lay_out(z_BTF, state.z_BCF, slot_BT, chunks)
        x_BMCD = _lay_out(x_BTD, state.x_BCD, slot_BT, chunks)
        s_BDF, updates, scales = state.s_BDF, [], []
        for i in range(chunks):
            update_BCD, scale_B1D = self._read(s_BDF, z_BMCF[:, i])
            updates.append(update_BCD)
            scales.append(scale_B1D)
            full_B = total_B >= (i + 1) * chunk
            if full_B.any():
                s_BDF = self._commit(s_BDF, z_BMCF[:, i], x_BMCD[:, i], full_B)
        last = (torch.arange(len(total_B), device=total_B.device), total_B // chunk)
        columns = state.columns + z_BTF.shape[1]
        state = FastWeightState(s_BDF, z_BMCF[last], x_BMCD[last], total_B % chunk, columns)
        return _pick(updates, slot_BT, 0.0), _pick(scales, slot_BT // chunk, 1.0), state

    def _read(self, s_BDF: torch.Tensor | None, z_BCF: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Returns ``S z`` in fp32 and, when row norms are preserved, ``|W0[d]| / |W0[d] + S[d]|``."""
        if s_BDF is None:
            return None, None
        with torch.autocast(z_BCF.device.type, enabled=False):
            update_BCD = torch.einsum("bdf,bcf->bcd", s_BDF, z_BCF.float())
            scale_BD = self.settings.update.row_scale(s_BDF, self.down_proj.weight)
            return update_BCD, None if scale_BD is None else scale_BD[:, None]

    def _commit(
        self, s_BDF: torch.Tensor | None, z_BCF: torch.Tensor, x_BCD: torch.Tensor, full_B: torch.Tensor
    ) -> torch.Tensor:
        """Returns the state after the chunk in the rows where the chunk is full."""
        mixes, update = self.settings.target.convolution, self.settings.update
        v_BCD = self.ttt_proj(self.ttt_conv(x_BCD) if mixes else nn.functional.pad(x_BCD[:, 1:], (0, 0, 0, 1)))
        with torch.autocast(z_BCF.device.type, enabled=False):
            return update.after_chunk(s_BDF, v_BCD, z_BCF, self.settings.eta, full_B)


def _lay_out(new_BTX: torch.Tensor, open_BCX: torch.Tensor, slot_BT: torch.Tensor, chunks: int) -> torch.Tensor:
    """Returns the open chunk followed by the new tokens at their slots, as B M C X; empty slots are zero."""
    rows, chunk, width = open_BCX.shape
    grid_BGX = torch.cat([open_BCX, open_BCX.new_zeros(rows, (chunks - 1) * chunk + 1, width)], dim=1)
    index_BTX = slot_BT[:, :, None].expand(-1, -1, width)
    return grid_BGX.scatter(1, index_BTX, new_BTX)[:, :-1].reshape(rows, chunks, chunk, width)


def _pick(parts: list[torch.Tensor | None], index_BT: torch.Tensor, default: float) -> torch.Tensor | None:
    """Returns each token's row of the parts (one per chunk, joined on axis 1); no part or padding gives ``default``."""
    some = next((part for part in parts if part is not None), None)
    if some is None:
        return None
    missing = torch.full_like(some, default)
    joined = torch.cat([missing if part is None else part for part in [*parts, None]], dim=1)
    return joined.gather(1, index_BT[:, :, None].expand(-1, -1, some.shape[2]))


def _find_cache(values: Iterable[Any]) -> Any:
    """Returns the cache among arguments or outputs, whatever its name; ``None`` if there is none."""
    found = [value for value in values if isinstance(value, Cache) or hasattr(value, "get_seq_length")]
    if any(cache is not found[0] for cache in found):
        raise _unsupported("one call has two caches")
    return found[0] if found else None


class _LayerMixin(_Stock):
    """A decoder layer that hands the call to its fast-weight MLP; the stock forward stays as it is."""

    mlp: Any

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, layer_idx)
        settings = read_settings(config)
        if settings is not None and layer_idx in settings.layers:
            self.mlp = InPlaceTTTMLP(config, settings, self.mlp, layer_idx)

    def forward(self, hidden_states: torch.Tensor, *args: Any, ttt_call: _Call | None = None, **kwargs: Any) -> Any:
        if not isinstance(self.mlp, InPlaceTTTMLP):
            return super().forward(hidden_states, *args, **kwargs)
        # The attention's own cache argument: gradient checkpointing sets it to None, then no state may be kept.
        cache = _find_cache((*args, *kwargs.values()))
        if cache is not None and not isinstance(cache, InPlaceTTTCache):  # the stock decoder has just made it
            InPlaceTTTCache.adopt(cache, [self.mlp.layer_idx])
        self.mlp.call, self.mlp.cache = ttt_call, cache
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            self.mlp.call = self.mlp.cache = None


class _LoadMixin(_Stock):
    """Initialisation of the extra weights, and a loud failure where stock loading only warns."""

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (_TargetProjection, _TargetConv)):
            if getattr(module.weight, "_is_hf_initialized", False):
                return
            with torch.no_grad():  # the method's own start: no update at first, yet a gradient
                module.weight.zero_()
                if isinstance(module, _TargetProjection) and TARGETS[self.config.ttt_target].convolution:
                    module.weight.diagonal().normal_(0.0, self.config.initializer_range)
            return
        super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if not model.config.ttt_mode:  # the plain model on purpose
            info["unexpected_keys"] = [key for key in info["unexpected_keys"] if ".mlp.ttt_" not in key]
        for problem, keys in (("are missing", info["missing_keys"]), ("have no layer", info["unexpected_keys"])):
            names = sorted(key for key in keys if ".mlp.ttt_" in key)
            if names:
                raise ValueError(f"weights and ttt_layers={model.config.ttt_layers} disagree: {names} {problem}")
        return (model, info) if wants_info else model


class _ModelMixin(_LoadMixin):
    """The stock decoder with fast weights in ``config.ttt_layers``."""

    layer_class: type
    knows_window: ClassVar[bool] = True  # whether the stock forward itself applies config.sliding_window
    _can_compile_fullgraph = False

    def __init__(self, config: Any):
        settings = read_settings(config)  # fails before anything is built
        super().__init__(config)
        unknown = set(_ARGUMENTS) - inspect.signature(super().forward).parameters.keys()
        if unknown:
            raise _unsupported(f"the stock decoder takes no {', '.join(sorted(unknown))}")
        self.ttt_settings = settings
        self.layers = nn.ModuleList([self.layer_class(config, i) for i in range(config.num_hidden_layers)])
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        *,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,  # the cache among them, whose name depends on the release
    ) -> Any:
        """As the stock forward. ``attention_mask`` is B x (cached + T), 0 at padding, on either side."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cache, call = _find_cache(kwargs.values()), None
        if self.ttt_settings is not None:
            if cache is not None:
                InPlaceTTTCache.adopt(cache, self.ttt_settings.layers)
            call = _Call(_valid_tokens(inputs_embeds, attention_mask, position_ids, cache, kwargs), inputs_embeds)
            kwargs["ttt_call"] = call
        window = None if self.knows_window else getattr(self.config, "sliding_window", None)
        if window is not None:
            kwargs["sliding_window"] = window  # flash attention cuts by this argument instead of a mask
            attention_mask = _window_mask(self.config, inputs_embeds, attention_mask, position_ids, cache)
        output = super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        if call is not None:
            made = _find_cache(output.to_tuple() if hasattr(output, "to_tuple") else output)
            wants_cache = self.config.use_cache if use_cache is None else use_cache
            recomputes = self.training and self.gradient_checkpointing  # then the stock decoder keeps no cache
            if wants_cache and cache is None and made is None and not recomputes:
                raise _unsupported("use_cache=True gave no cache")
            self._check_reached(call, [each for each in (cache, made) if each is not None])
        return output

    def _check_reached(self, call: _Call, caches: list[Any]) -> None:
        """Raises unless every fast weight has run once, and has seen as many columns as the attention beside it."""
        layers = self.ttt_settings.layers
        if sorted(call.reached) != list(layers):
            raise _unsupported(f"fast weights ran in layers {sorted(call.reached)} instead of {list(layers)}")
        for cache in caches:
            states = cache.fast_weights if isinstance(cache, InPlaceTTTCache) else {}
            for layer in layers:
                seen = states[layer].columns if layer in states else 0
                if cache.get_seq_length(layer) != seen:
                    raise _unsupported(f"the cache of layer {layer} did not reach its fast weight")


def _valid_tokens(
    embeds_BTD: torch.Tensor, attention_mask: Any, position_ids: Any, cache: Any, kwargs: dict[str, Any]
) -> torch.Tensor:
    """Returns which of this call's tokens are real, as bool B T."""
    rows, tokens = embeds_BTD.shape[:2]
    if kwargs.get("cu_seq_lens_q") is not None:
        raise NotImplementedError("packed rows (cu_seq_lens) are not supported; pass one document per row")
    if attention_mask is None:
        if position_ids is not None and tokens > 1 and bool((position_ids.diff(dim=-1) != 1).any()):
            raise NotImplementedError("packed rows (position_ids that restart) are not supported; one document per row")
        return torch.ones(rows, tokens, dtype=torch.bool, device=embeds_BTD.device)
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        raise NotImplementedError("fast weights need the 2D attention_mask (rows x columns), not a prepared one")
    past = 0 if cache is None else cache.get_seq_length()
    if attention_mask.shape[1] != past + tokens:
        raise ValueError(
            f"attention_mask has {attention_mask.shape[1]} columns for {past} in the cache and {tokens} in this call; "
            "it needs one for each, and all earlier calls need the same cache"
        )
    return attention_mask[:, -tokens:].to(embeds_BTD.device).bool()


def _window_mask(config: Any, embeds_BTD: torch.Tensor, attention_mask: Any, position_ids: Any, cache: Any) -> Any:
    """Returns the mask of a sliding window, in the form that the chosen attention implementation takes."""
    past = 0 if cache is None else cache.get_seq_length()
    choices = {
        "config": config,
        "inputs_embeds": embeds_BTD,
        "input_embeds": embeds_BTD,  # its name before 5.0
        "attention_mask": attention_mask,
        "cache_position": torch.arange(past, past + embeds_BTD.shape[1], device=embeds_BTD.device),  # before 5.0
        "past_key_values": cache,  # its name before 5.24
        "cache": cache,
        "position_ids": position_ids,
    }
    known = inspect.signature(create_sliding_window_causal_mask).parameters
    if not {"past_key_values", "cache"} & known.keys():
        raise _unsupported("the mask of a sliding window takes no cache")
    return create_sliding_window_causal_mask(**{key: value for key, value in choices.items() if key in known})


class _CausalLMMixin(_LoadMixin):
    model_class: type

    def __init__(self, config: Any):
        read_settings(config)  # fails before anything is built
        super().__init__(config)
        self.model = self.model_class(config)
        self.post_init()


def define_classes(stem: str, *, knows_window: bool) -> None:
    """Adds ``InPlaceTTT<stem>DecoderLayer``, ``...Model`` and ``...ForCausalLM`` to this file.

    Args:
      stem: of the stock classes, ``Qwen3``; their layers hold a gated MLP, ``mlp``, as those of Llama do.
      knows_window: whether the stock decoder applies ``config.sliding_window``; if not, it is applied here.
    """
    name = f"InPlaceTTT{stem}"
    head = getattr(transformers, f"{stem}ForCausalLM", None)
    if head is None:
        raise ImportError(
            f"transformers {transformers.__version__} has no {stem}ForCausalLM; use a release that has it"
        )
    stock = sys.modules[head.__module__]

    def define(suffix: str, mixin: type, **attributes: Any) -> type:
        described = {"__module__": __name__, "__doc__": f"{stem}{suffix} with fast weights."}
        made = type(name + suffix, (mixin, getattr(stock, stem + suffix)), described | attributes)
        globals()[name + suffix] = made
        return made

    layer = define("DecoderLayer", _LayerMixin)
    attributes = {"layer_class": layer, "knows_window": knows_window, "_no_split_modules": [layer.__name__]}
    model: Any = define("Model", _ModelMixin, **attributes)
    causal: Any = define("ForCausalLM", _CausalLMMixin, model_class=model)
    model.register_for_auto_class("AutoModel")  # so that save_pretrained copies this file; newer releases do it
    causal.register_for_auto_class("AutoModelForCausalLM")


define_classes("Qwen3", knows_window=True)
define_classes("Llama", knows_window=False)
