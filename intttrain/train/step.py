"""The training step: one pure function, made here and used by the loop, by tests and by anything that plans a run.

Letters: B row, T tokens, n TTT layers, M chunks. Losses travel as (sum, weight) until the last division.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, NotRequired, TypedDict, cast

import jax
import jax.numpy as jnp
import optax

from intttrain.config import Config
from intttrain.data import Batch
from intttrain.layout.row_order import is_balanced, stored_units
from intttrain.layout.sharding import pieces_of
from intttrain.model import Params, TTTStats, abstract_params, bind, init_params, token_nll
from intttrain.train.optimizer import clip_by_norm, make_optimizer, make_schedule

# A device array, its copy on the host or an abstract shape: trees of metrics are rebuilt with each of them.
Value = Any


SPIKE_WINDOW = 50  # steps that the running mean and deviation of the loss look back, and that come before any limit


class LossStatistics(NamedTuple):
    """Running mean and variance of the loss, and how many losses they come from; fp32 scalars."""

    mean: jax.Array
    variance: jax.Array
    seen: jax.Array


class TrainState(TypedDict):
    """Everything that changes during training, as one tree of arrays.

    ``step`` counts applied updates. ``healthy`` turns false at the first step whose loss, gradient or new state is not
    finite or whose loss is a spike; from then on nothing changes any more, so the state is the one before that step.
    """

    params: Params
    opt_state: optax.OptState
    step: jax.Array
    healthy: jax.Array
    rng: jax.Array  # uint32 key data, the root of anything random inside a step
    losses: NotRequired[LossStatistics]  # with train.skip.spike_deviations


class Finite(NamedTuple):
    """Whether every number is finite, of each part of what a step would make; scalars.

    ``loss_statistics`` is ``None`` without ``train.skip.spike_deviations``.
    """

    update: Value
    parameters: Value
    optimizer_state: Value
    loss_statistics: Value | None

    @property
    def broken(self) -> tuple[str, ...]:
        """Names of the parts that are not; on the host."""
        return tuple(
            name.replace("_", " ") for name, finite in self._asdict().items() if finite is not None and not finite
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """What a step reports; device arrays, to be read one step later.

    Attributes:
      loss: mean next-token loss in nats over the labelled tokens of the batch.
      row_loss_B: the same per row (0 for a row without labels), to name the rows of a non-finite step.
      tokens: labelled tokens.
      grad_norm: global norm before clipping.
      learning_rate, eta: what this step used; ``eta`` is 0 without TTT.
      finite: what of the outcome, applied or not, is finite.
      healthy: whether the update was applied.
      loss_limit: above which a loss is a spike; ``None`` without ``train.skip.spike_deviations``.
      ttt: per TTT layer, mean size of an update and largest state, relative to W0; ``None`` without TTT.
    """

    loss: Value
    row_loss_B: Value
    tokens: Value
    grad_norm: Value
    learning_rate: Value
    eta: Value
    finite: Finite
    healthy: Value
    loss_limit: Value | None
    ttt: dict[str, Value] | None


StepFunction = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


def init_state(config: Config) -> TrainState:
    """Returns the state before the first step; pure, so it can be jitted and evaluated abstractly."""
    params_key, step_key = jax.random.split(jax.random.key(config.train.seed))
    params = init_params(config.model, params_key)
    optimizer = make_optimizer(config.train, abstract_params(config.model))
    state = TrainState(
        params=params,
        opt_state=optimizer.init(params),
        step=jnp.zeros((), jnp.int32),
        healthy=jnp.ones((), jnp.bool_),
        rng=jax.random.key_data(step_key),
    )
    if config.train.skip.spike_deviations is not None:
        state["losses"] = LossStatistics(*(jnp.zeros((), jnp.float32) for _ in LossStatistics._fields))
    return state


def abstract_state(config: Config) -> TrainState:
    """Returns the shapes and dtypes of ``init_state(config)``."""
    return jax.eval_shape(lambda: init_state(config))


def make_train_step(config: Config) -> StepFunction:
    """Returns the step: state and a batch of ``train.batch_rows`` rows in, new state and metrics out.

    It is not jitted; callers add ``jax.jit(..., donate_argnums=0)`` and shardings.
    """
    optimizer = make_optimizer(config.train, abstract_params(config.model))
    schedule = make_schedule(config.train)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        eta = _eta(config, state["step"])
        gates_BM = _draw_gates(config, state)
        sums, grads = _accumulate(config, state["params"], (batch, gates_BM), eta)
        weight = jnp.maximum(jnp.sum(sums.weight_B), 1.0)
        grads = jax.tree.map(lambda g: g / weight, grads)
        loss, grad_norm = jnp.sum(sums.nll_B) / weight, optax.tree.norm(grads)
        healthy = state["healthy"] & jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        limit = None
        if config.train.skip.spike_deviations is not None:
            limit = _loss_limit(state["losses"], config.train.skip.spike_deviations)
            healthy &= loss <= limit

        clipped = clip_by_norm(grads, grad_norm, config.train.optimizer.clip_norm)
        # Made once more only to be judged, which reads the state twice. Were both one to the compiler, it would keep
        # the whole outcome until the last number of it is judged.
        finite = _judge(*_propose(optimizer, jax.lax.optimization_barrier(state), clipped, loss))
        healthy &= functools.reduce(jnp.logical_and, jax.tree.leaves(finite))
        _, proposed = _propose(optimizer, state, clipped, loss)
        after = jax.tree.map(lambda new, old: new if new is old else jnp.where(healthy, new, old), proposed, state)
        metrics = StepMetrics(
            loss=loss,
            row_loss_B=sums.nll_B / jnp.maximum(sums.weight_B, 1.0),
            tokens=jnp.sum(sums.weight_B),
            grad_norm=grad_norm,
            learning_rate=schedule(state["step"]),
            eta=eta,
            finite=finite,
            healthy=healthy,
            loss_limit=limit,
            ttt=sums.ttt,
        )
        return cast(TrainState, {**after, "healthy": healthy}), metrics

    return train_step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Sums:
    """Loss sums per row and TTT sizes of a batch or microbatch."""

    nll_B: jax.Array
    weight_B: jax.Array
    ttt: dict[str, jax.Array] | None


def _propose(
    optimizer: optax.GradientTransformation, state: TrainState, clipped: Params, loss: jax.Array
) -> tuple[Params, TrainState]:
    """Returns the update, and the state that a healthy step leaves."""
    updates, opt_state = optimizer.update(clipped, state["opt_state"], state["params"])
    proposed: TrainState = {
        **state, "params": optax.apply_updates(state["params"], updates), "opt_state": opt_state,
        "step": state["step"] + 1,
    }  # fmt: skip
    if "losses" in state:
        proposed["losses"] = _with_loss(state["losses"], loss)
    return updates, proposed


def _judge(updates: Params, proposed: TrainState) -> Finite:
    losses = proposed.get("losses")
    return Finite(
        _is_finite(updates),
        _is_finite(proposed["params"]),
        _is_finite(proposed["opt_state"]),
        None if losses is None else _is_finite(losses),
    )


def _is_finite(tree: Any) -> jax.Array:
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return functools.reduce(jnp.logical_and, leaves)


def _loss_limit(losses: LossStatistics, deviations: float) -> jax.Array:
    """Returns the largest loss that is no spike; infinite until there are ``SPIKE_WINDOW`` losses to compare with."""
    limit = losses.mean + deviations * jnp.sqrt(losses.variance)
    return jnp.where(losses.seen < SPIKE_WINDOW, jnp.inf, limit)


def _with_loss(losses: LossStatistics, loss: jax.Array) -> LossStatistics:
    """Returns the statistics with one more loss: plain ones at first, then exponential ones."""
    share = jnp.maximum(1.0 / SPIKE_WINDOW, 1.0 / (losses.seen + 1.0))
    away = loss - losses.mean
    variance = (1.0 - share) * (losses.variance + share * jnp.square(away))
    return LossStatistics(losses.mean + share * away, variance, losses.seen + 1.0)


def _eta(config: Config, step: jax.Array) -> jax.Array:
    """Returns the update size at ``step`` with its linear warm-up; 0 without TTT."""
    if config.model.ttt is None:
        return jnp.zeros((), jnp.float32)
    warmup = config.model.ttt.eta_warmup_steps
    share = jnp.minimum((step.astype(jnp.float32) + 1.0) / max(warmup, 1), 1.0)
    return config.model.ttt.eta * share


def _draw_gates(config: Config, state: TrainState) -> jax.Array | None:
    """Returns which chunks are written in this step (B M, as rows store them); ``None`` for all.

    A model that has met skipped chunks in training can be gated later without leaving what it knows.
    """
    if config.model.ttt is None or config.train.gate_rate == 1.0:
        return None
    seq_len, context = config.data.seq_len, pieces_of(None, "tokens")
    balanced = is_balanced(config.model, seq_len, context, pieces_of(None, "heads"))
    stored_M = stored_units(seq_len, context, config.model.ttt.chunk_tokens, balanced=balanced)
    key = jax.random.fold_in(jax.random.wrap_key_data(state["rng"]), state["step"])
    written_BM = jax.random.bernoulli(key, config.train.gate_rate, (config.train.batch_rows, len(stored_M)))
    return written_BM[:, stored_M].astype(jnp.float32)


# a batch with the gates of its chunks
_Gated = tuple[Batch, jax.Array | None]


def _accumulate(config: Config, params: Params, batch: _Gated, eta: jax.Array) -> tuple[_Sums, Params]:
    """Returns loss sums and the gradient of the summed loss, over all microbatches."""
    gradient = jax.value_and_grad(lambda p, b: _loss_sums(config, p, b, eta), has_aux=True)
    pieces = config.train.microbatches
    if pieces == 1:
        (_, sums), grads = gradient(params, batch)
        return sums, grads

    def add(total: Params, piece: _Gated) -> tuple[Params, _Sums]:
        (_, sums), grads = gradient(params, piece)
        return jax.tree.map(jnp.add, total, grads), sums

    # Every piece takes its rows from all devices (row r belongs to piece r % pieces), so that none has to move.
    split = jax.tree.map(lambda x: x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]).swapaxes(0, 1), batch)
    grads, stacked = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), split)
    ttt = None
    if stacked.ttt is not None:
        ttt = {"delta": jnp.mean(stacked.ttt["delta"], axis=0), "state": jnp.max(stacked.ttt["state"], axis=0)}
    return _Sums(stacked.nll_B.T.reshape(-1), stacked.weight_B.T.reshape(-1), ttt), grads


def _loss_sums(config: Config, params: Params, gated: _Gated, eta: jax.Array) -> tuple[jax.Array, _Sums]:
    batch, gates_BM = gated
    decoder = bind(config.model, params)
    output = decoder(batch.tokens_BT, batch.segment_ids_BT, batch.positions_BT, eta=eta, gates_BM=gates_BM)
    nll_BT = token_nll(
        output.hidden_BTD, decoder.output_weight(), batch.labels_BT, config.model.loss_chunk_tokens,
        config.model.weight_gradient_dtype,
    )  # fmt: skip
    nll_B = jnp.sum(nll_BT * batch.loss_weights_BT, axis=1)
    sums = _Sums(nll_B, jnp.sum(batch.loss_weights_BT, axis=1), _ttt_sizes(output.ttt))
    return jnp.sum(nll_B), sums


def _ttt_sizes(stats: TTTStats | None) -> dict[str, jax.Array] | None:
    """Returns per TTT layer the mean size of an update and the largest state."""
    if stats is None:
        return None
    return {"delta": jnp.mean(stats.delta_norm_nBM, axis=(1, 2)), "state": jnp.max(stats.state_norm_nBM, axis=(1, 2))}


def scalars(config: Config, metrics: StepMetrics) -> dict[str, Any]:
    """Returns the host numbers of a step under the names that the writers use. Waits for the device."""
    host = jax.device_get(metrics)
    result = {
        "loss": float(host.loss),
        "grad_norm": float(host.grad_norm),
        "learning_rate": float(host.learning_rate),
        "tokens": float(host.tokens),
    }
    if host.ttt is not None and config.model.ttt is not None:
        result["ttt/eta"] = float(host.eta)
        for name, values_n in host.ttt.items():
            result |= {
                f"ttt/{name}_{layer}": float(v) for layer, v in zip(config.model.ttt.layers, values_n, strict=True)
            }
    return result
