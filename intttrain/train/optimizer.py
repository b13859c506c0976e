"""Learning-rate schedules and optimizers, each registered with its section: AdamW (arXiv 1711.05101).

Which parameter decays is decided in one table, ``DECAY_RULES``; a parameter that no rule or more than one rule matches
is an error, so a new parameter cannot slip in undecided.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from intttrain.config import Config
from intttrain.config.errors import UserError
from intttrain.config.registry import OPTIMIZERS, SCHEDULES
from intttrain.config.training import AdamWConfig, ScheduleConfig, TrainConfig

PyTree = Any
UpdateFn = Callable[..., tuple[PyTree, PyTree]]
Decay = Literal["decay", "no_decay"]
# What is registered. A schedule's shape: section, completed steps and the last step -> fraction of the peak after the
# warm-up, float32. An optimizer: section, schedule and abstract parameters -> a transformation.
Shape = Callable[[Any, jax.Array, int], jax.Array]
Build = Callable[[Any, optax.Schedule, PyTree], optax.GradientTransformation]

# Full-match patterns over the dotted path of a parameter.
#
# Matrices decay, gains do not: pulling a norm scale towards 0 shrinks the layer instead of its weights.
# ttt.target is a D x D matrix like any other. ttt.conv is not decayed: its taps are five gains per channel, they start
# at 0, and only the product conv x target moves the fast weight, so a decay on target alone already removes the
# freedom to trade one against the other; decaying both would pull that product to "update switched off" twice as fast
# as it pulls any other matrix.
DECAY_RULES: tuple[tuple[str, Decay], ...] = (
    (r"embed\.weight", "decay"),
    (r"head\.weight", "decay"),
    (r"layers\.attention\.(q|k|v|o)", "decay"),
    (r"layers\.mlp\.(gate|up|down)", "decay"),
    (r"ttt\.target", "decay"),
    (r"ttt\.conv", "no_decay"),
    (r"layers\.(attention_norm|mlp_norm)\.scale", "no_decay"),
    (r"layers\.attention\.(q_norm|k_norm)", "no_decay"),
    (r"final_norm\.scale", "no_decay"),
)


def make_schedule(config: TrainConfig) -> optax.Schedule:
    """Returns the learning rate (float32 scalar) as a function of the number of completed steps ``s``.

    Warm-up: ``peak * (s + 1) / (warmup_steps + 1)``, so the very first step already moves and ``s = warmup_steps``
    is the first at the peak. Then, with ``final = final_fraction * peak`` reached at ``s = num_steps`` and kept:

    * ``cosine``: ``final + (peak - final) * (1 + cos(pi * p)) / 2``, p going 0 to 1 from the end of the warm-up;
    * ``wsd`` (warm-up, stable, decay): the peak, then linear over the last ``decay_steps`` (0: no decay at all).

    The argument may be a Python int or an integer array, traced or not.
    """
    schedule, num_steps = config.schedule, config.num_steps
    peak, warmup_steps = schedule.peak_learning_rate, schedule.warmup_steps

    def learning_rate(step: jax.typing.ArrayLike) -> jax.Array:
        s = jnp.asarray(step).astype(jnp.float32)  # exact up to 2^24 steps
        warmup = (s + 1.0) / (warmup_steps + 1.0)
        return peak * jnp.where(s < warmup_steps, warmup, _after_warmup(schedule, s, num_steps))

    return learning_rate


def _after_warmup(schedule: ScheduleConfig, s: jax.Array, num_steps: int) -> jax.Array:
    """Returns the fraction of the peak after the warm-up, float32."""
    shape: Shape = SCHEDULES.choice(schedule)
    return shape(schedule, s, num_steps)


def _check_cosine(config: Config) -> None:
    if decay_steps := config.train.schedule.decay_steps:
        raise UserError(
            f'train.schedule.decay_steps={decay_steps} has no meaning with kind="cosine", which decays from '
            'the warm-up to the end; set it to 0 or use kind="wsd"'
        )


@SCHEDULES.register("cosine", ScheduleConfig, check=_check_cosine)
def cosine(schedule: ScheduleConfig, s: jax.Array, num_steps: int) -> jax.Array:
    """Returns half a cosine from the end of the warm-up to the last step."""
    return _decay(schedule, s, schedule.warmup_steps, num_steps, lambda p: 0.5 * (1.0 + jnp.cos(jnp.pi * p)))


@SCHEDULES.register("wsd", ScheduleConfig)
def wsd(schedule: ScheduleConfig, s: jax.Array, num_steps: int) -> jax.Array:
    """Returns 1, and a straight line over the last ``decay_steps``."""
    return _decay(schedule, s, num_steps - schedule.decay_steps, num_steps, lambda p: 1.0 - p)


def _decay(
    schedule: ScheduleConfig, s: jax.Array, start: int, num_steps: int, shape: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Returns 1 until ``start``, then ``shape`` of the part that is over, squeezed above ``final_fraction``."""
    if start == num_steps:  # nothing decays; a division by the empty span would give NaN
        return jnp.ones_like(s)
    p = jnp.clip((s - start) / (num_steps - start), 0.0, 1.0)
    final = schedule.final_fraction
    return final + (1.0 - final) * shape(p)


def make_optimizer(config: TrainConfig, abstract_params: PyTree) -> optax.GradientTransformation:
    """Returns the optimizer for parameters of this structure. The gradient is expected to be clipped already.

    Args:
      config: schedule and section of the optimizer; ``clip_norm`` is not used here, see ``clip_by_norm``.
      abstract_params: nested dict of arrays or ``jax.ShapeDtypeStruct``.

    Raises:
      ValueError: a parameter that not exactly one rule matches.
      TypeError: a parameter that is not float32 (its second moment would lose precision with it).
    """
    for name, leaf in _named_leaves(abstract_params):
        if leaf.dtype != np.float32:
            raise TypeError(f"parameter {name} is {leaf.dtype}; the optimizer keeps float32 parameters and moments")
    build: Build = OPTIMIZERS.choice(config.optimizer)
    made = build(config.optimizer, make_schedule(config), abstract_params)
    return optax.GradientTransformation(made.init, _with_standard_promotion(made.update))


def _check_adamw(config: Config) -> None:
    peak, adamw = config.train.schedule.peak_learning_rate, config.train.optimizer
    assert isinstance(adamw, AdamWConfig)
    if peak * adamw.weight_decay >= 1:
        raise UserError(
            f"train.schedule.peak_learning_rate={peak} times train.optimizer.weight_decay="
            f"{adamw.weight_decay} is 1 or more: every step would wipe out the weights; use a weight decay below "
            f"{1 / peak:.3g}, 0.1 is usual"
        )


@OPTIMIZERS.register("adamw", AdamWConfig, check=_check_adamw)
def adamw(section: AdamWConfig, schedule: optax.Schedule, abstract_params: PyTree) -> optax.GradientTransformation:
    """Returns AdamW, whose update is ``-lr(s) * (adam(g) + weight_decay * w)``.

    The second term only where ``DECAY_RULES`` says so. Both moments have the dtype and the sharding of their parameter,
    float32.
    """
    return optax.chain(
        optax.scale_by_adam(b1=section.b1, b2=section.b2, eps=section.eps, mu_dtype=jnp.float32),
        optax.add_decayed_weights(section.weight_decay, mask=decay_mask(abstract_params)),
        optax.scale_by_learning_rate(schedule),
    )


def _with_standard_promotion(update: UpdateFn) -> UpdateFn:
    """Optax raises a float to an int32 power in its bias correction, which strict dtype promotion refuses."""

    def relaxed(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        with jax.numpy_dtype_promotion("standard"):
            return update(updates, state, params)

    return relaxed


def decay_mask(abstract_params: PyTree) -> PyTree:
    """Returns the tree of bools "this parameter decays". Raises ``ValueError`` unless exactly one rule matches each."""
    names = [name for name, _ in _named_leaves(abstract_params)]
    return jax.tree.unflatten(jax.tree.structure(abstract_params), [_rule(name) == "decay" for name in names])


def _rule(name: str) -> Decay:
    matches = [(pattern, decay) for pattern, decay in DECAY_RULES if re.fullmatch(pattern, name)]
    if len(matches) != 1:
        patterns = ", ".join(pattern for pattern, _ in matches) or "no rule"
        raise ValueError(f"parameter {name} is matched by {patterns}; exactly one rule of DECAY_RULES must match it")
    return matches[0][1]


def _named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """Returns ("layers.attention.q", leaf) pairs in tree order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]


def clip_by_norm(grads: PyTree, norm: jax.Array, max_norm: float) -> PyTree:
    """Returns ``grads`` scaled so that their global norm is at most ``max_norm``.

    Args:
      grads: gradients of any floating dtype, which is kept.
      norm: float32 scalar, their global norm, computed once by the caller (it is also a metric).
      max_norm: the bound; gradients within it come back bit for bit.

    A norm that is NaN or infinite gives no usable gradient: the caller has to skip that update.
    """
    scale = jnp.where(norm > max_norm, max_norm / norm, jnp.ones_like(norm))
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
