"""Generation in a running batch that documents join and leave.

The host hands out rows: it feeds prompts in pieces, lets the device draw a few tokens at a time and gives a row away
when its document has ended. Two compiled programs do the work, whatever the lengths.

Letters: B row, P tokens of a piece, J tokens drawn between two looks of the host.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from intttrain import ttt
from intttrain.config import ModelConfig
from intttrain.config.errors import UserError
from intttrain.layout.mesh import whole_rows_mesh
from intttrain.layout.sharding import constrain, pieces_of, using_mesh
from intttrain.model.decode import (
    DecodeState,
    Reading,
    init_decode_state,
    next_logits,
    piece_counts,
    piece_tokens,
    read_tokens,
    restart_rows,
)
from intttrain.model.functional import Params, bind
from intttrain.model.sampling import Sampling, sample_tokens

CACHE_MULTIPLE = 256  # of which caches are made, so that prompts of all lengths share few compiled programs


class Request(NamedTuple):
    """A document to continue.

    Attributes:
      sequence: its number: what is drawn depends on it, not on its neighbours.
      prompt: token ids, at least one.
      max_new_tokens: bound on the continuation.
      goes_on: the prompt follows what the only row of the batch has read and drawn so far.
    """

    sequence: int
    prompt: np.ndarray
    max_new_tokens: int
    goes_on: bool = False


class Piece(NamedTuple):
    """New tokens of a document.

    Attributes:
      sequence: number of the document.
      tokens: ids, a stop token included.
      finished: whether the continuation ends with them.
    """

    sequence: int
    tokens: np.ndarray
    finished: bool


@dataclasses.dataclass
class _Row:
    """A document in the batch: what is left of its prompt, and what may still be drawn."""

    request: Request
    prompt_left: np.ndarray
    new_left: int


class Generator:
    """Continues documents with a trained model.

    Args:
      config, params: the model; parameters lie on ``mesh`` if there is one.
      rows: documents in the batch at the same time.
      max_tokens: the longest prompt with its continuation.
      eta: size of an update in place of the configured one; 0 switches test-time training off.
      gate, settings: which chunks are written.
      mesh: rows lie over ``data``, ``fsdp`` and ``context``; none is cut.
      draws: J.

    Raises:
      UserError: rows that the mesh cannot cut evenly.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        rows: int,
        max_tokens: int,
        eta: float | None = None,
        gate: ttt.GateRule = ttt.GateRule(),
        settings: ttt.GateSettings = ttt.GateSettings(),
        mesh: jax.sharding.Mesh | None = None,
        draws: int = 16,
    ):
        mesh = None if mesh is None else whole_rows_mesh(mesh)
        self.config, self.params, self.mesh, self.draws = config, params, mesh, draws
        self.max_tokens = max_tokens
        self.reading = Reading(piece_tokens(config), -(-max_tokens // CACHE_MULTIPLE) * CACHE_MULTIPLE, gate)
        if eta is None:
            eta = config.ttt.eta if config.ttt is not None else 0.0
        self.eta, self.settings = jnp.float32(eta), settings
        if mesh is not None and rows % (pieces := pieces_of(mesh, "batch")):
            raise UserError(f"{rows} rows cannot be cut over {pieces} devices; use a multiple of {pieces}")
        self.rows: list[_Row | None] = [None] * rows
        self.state = _start(config, self.reading, mesh, rows)

    def check(self, request: Request) -> None:
        """Raises ``UserError`` if a document cannot be continued."""
        tokens, most = len(request.prompt), self.max_tokens
        if request.goes_on:
            if len(self.rows) != 1:
                raise ValueError(f"a document can go on in a batch of 1 row, not {len(self.rows)}")
            most -= int(self.state.length_B[0])
        if tokens == 0:
            raise UserError(f"prompt {request.sequence} has no token to start from; give some text")
        if tokens + request.max_new_tokens > most:
            raise UserError(
                f"prompt {request.sequence} has {tokens} tokens and may get {request.max_new_tokens} more, but the "
                f"cache has room for {max(0, most)}; use a shorter prompt, at most {max(0, most - tokens)} new ones or "
                "a longer cache"
            )
        if (largest := int(np.max(request.prompt))) >= self.config.vocab_size:
            raise UserError(
                f"prompt {request.sequence} has the token id {largest} but model.vocab_size={self.config.vocab_size}; "
                "use the tokenizer of the model"
            )

    def run(
        self,
        requests: Iterable[Request],
        sampling: Sampling,
        *,
        stop_tokens: tuple[int, ...] = (),
        is_finished: Callable[[int, np.ndarray], bool] | None = None,
    ) -> Iterator[Piece]:
        """Yields new tokens of all documents as they come.

        Args:
          requests: taken one by one, when a row is free.
          sampling: see there.
          stop_tokens: each ends a continuation.
          is_finished: asked about every piece (sequence number, its tokens), may end the continuation.
        """
        waiting = iter(requests)
        stops = jnp.asarray(stop_tokens or (-1,), jnp.int32)
        self.rows = [None] * len(self.rows)
        while self._admit(waiting):
            if any(row is not None and len(row.prompt_left) for row in self.rows):
                self._read_prompts()
            if any(row is not None and not len(row.prompt_left) for row in self.rows):
                yield from self._draw(sampling, stops, set(stop_tokens), is_finished)

    def _admit(self, waiting: Iterator[Request]) -> bool:
        """Gives free rows to waiting documents; returns whether any row is at work."""
        restart_B, sequence_B = np.zeros(len(self.rows), bool), np.zeros(len(self.rows), np.int32)
        for at, row in enumerate(self.rows):
            if row is None and (request := next(waiting, None)) is not None:
                self.check(request)
                self.rows[at] = _Row(request, np.asarray(request.prompt, np.int32), request.max_new_tokens)
                restart_B[at], sequence_B[at] = not request.goes_on, request.sequence
        if restart_B.any():
            self.state = _restart(self.mesh, self.state, restart_B, sequence_B)
        return any(row is not None for row in self.rows)

    def _read_prompts(self) -> None:
        """Reads the next piece of every prompt; rows that draw wait."""
        tokens_BP = np.zeros((len(self.rows), self.reading.piece_tokens), np.int32)
        left_B = np.zeros(len(self.rows), np.int32)
        for at, row in enumerate(self.rows):
            if row is not None:
                piece = row.prompt_left[: self.reading.piece_tokens]
                tokens_BP[at, : len(piece)], left_B[at] = piece, len(row.prompt_left)
        count_B, self.state = _prefill(
            self.config, self.reading, self.mesh, self.params, self.state, tokens_BP, left_B, self.eta, self.settings
        )
        for row, count in zip(self.rows, np.asarray(count_B), strict=True):
            if row is not None:
                row.prompt_left = row.prompt_left[count:]

    def _draw(self, sampling: Sampling, stops: jax.Array, stop_set: set[int], is_finished: Any) -> Iterator[Piece]:
        """Draws up to J tokens in every row whose prompt is read."""
        left_B = np.array([0 if row is None or len(row.prompt_left) else row.new_left for row in self.rows], np.int32)
        tokens_BJ, self.state = _generate(
            self.config, self.reading, self.mesh, self.draws, self.params, self.state, left_B, stops, sampling,
            self.eta, self.settings,
        )  # fmt: skip
        for at, (row, tokens_J) in enumerate(zip(self.rows, np.asarray(tokens_BJ), strict=True)):
            if row is None or len(row.prompt_left):
                continue
            tokens = tokens_J[: left_B[at]]
            ends = np.flatnonzero(np.isin(tokens, list(stop_set)))
            tokens = tokens[: ends[0] + 1] if len(ends) else tokens
            row.new_left -= len(tokens)
            sequence = row.request.sequence
            wanted_no_more = is_finished is not None and is_finished(sequence, tokens)
            finished = wanted_no_more or bool(len(ends)) or row.new_left <= 0
            if finished:
                self.rows[at] = None
            yield Piece(sequence, tokens, finished)


def _pinned(state: DecodeState) -> DecodeState:
    """Pins every part of the state to its rows, heads and feed-forward columns."""
    keys = jax.tree.map(lambda x: constrain(x, "layers", "batch", None, "kv_heads", "head_dim"), state.keys)
    fast = state.ttt
    if fast is not None:
        by_row = lambda x: constrain(x, "layers", "batch")  # noqa: E731
        fast = fast._replace(
            s_nBDF=constrain(fast.s_nBDF, "layers", "batch", "width", "mlp"),
            z_nBCF=constrain(fast.z_nBCF, "layers", "batch", None, "mlp"),
            x_nBCD=constrain(fast.x_nBCD, "layers", "batch", None, "width"),
            o_nBCD=constrain(fast.o_nBCD, "layers", "batch", None, "width"),
            written_nB=by_row(fast.written_nB),
            gate=jax.tree.map(by_row, fast.gate),
        )
    rest = {name: constrain(getattr(state, name), "batch") for name in ("length_B", "sequence_B", "surprise_B")}
    return DecodeState(keys=keys, ttt=fast, hidden_BD=constrain(state.hidden_BD, "batch", "width"), **rest)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _start(config: ModelConfig, reading: Reading, mesh: jax.sharding.Mesh | None, rows: int) -> DecodeState:
    with using_mesh(mesh):
        return _pinned(init_decode_state(config, reading, jnp.arange(rows)))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _restart(
    mesh: jax.sharding.Mesh | None, state: DecodeState, restart_B: jax.Array, sequence_B: jax.Array
) -> DecodeState:
    with using_mesh(mesh):
        return _pinned(restart_rows(state, restart_B, sequence_B))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _prefill(
    config: ModelConfig, reading: Reading, mesh: jax.sharding.Mesh | None, params: Params, state: DecodeState,
    tokens_BP: jax.Array, left_B: jax.Array, eta: jax.Array, settings: ttt.GateSettings,
) -> tuple[jax.Array, DecodeState]:  # fmt: skip
    """Reads what the next piece of every prompt takes; returns how much that is."""
    with using_mesh(mesh):
        count_B = piece_counts(config, reading, state.length_B, left_B)
        decoder = bind(config, params)
        state = read_tokens(
            decoder, reading, constrain(tokens_BP, "batch", None), count_B, state, eta=eta, gate=settings
        )[1]
        return constrain(count_B, None), _pinned(state)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=5)
def _generate(
    config: ModelConfig, reading: Reading, mesh: jax.sharding.Mesh | None, draws: int, params: Params,
    state: DecodeState, left_B: jax.Array, stops: jax.Array, sampling: Sampling, eta: jax.Array,
    settings: ttt.GateSettings,
) -> tuple[jax.Array, DecodeState]:  # fmt: skip
    """Draws ``draws`` tokens in every row that has so many left and meets no stop; returns them (B J)."""
    decoder = bind(config, params)
    stops = stops.astype(jnp.int32)

    def step(carry: tuple[DecodeState, jax.Array], _: None) -> tuple[Any, jax.Array]:
        state, left_B = carry
        token_B = sample_tokens(next_logits(decoder, state), sampling, state.sequence_B, state.length_B)
        count_B = (left_B > 0).astype(jnp.int32)
        state = read_tokens(decoder, reading, token_B[:, None], count_B, state, eta=eta, gate=settings)[1]
        stopped_B = jnp.any(token_B[:, None] == stops[None], axis=1)
        return (_pinned(state), jnp.where(stopped_B, 0, left_B - 1)), token_B

    with using_mesh(mesh):
        (state, _), tokens_JB = jax.lax.scan(step, (state, left_B), None, length=draws)
        return constrain(tokens_JB.T, None, None), state
