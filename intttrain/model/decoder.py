"""The decoder: Qwen3 and Llama families, with a fast down projection in the chosen layers.

Letters: B row, T tokens, D model width, F feed-forward width, V vocabulary, L layers, n TTT layers, M chunks,
N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from intttrain import ttt
from intttrain.config import ModelConfig
from intttrain.layout.row_order import is_balanced
from intttrain.layout.sharding import constrain, pieces_of
from intttrain.model import context_attention
from intttrain.model.attention import Attention
from intttrain.model.layer_groups import plan_groups
from intttrain.model.layers import MLP, Embedding, RMSNorm, TTTParams
from intttrain.model.rope import RopeTables, rope_tables
from intttrain.model.train_layers import apply_layers, train_layers


class TTTStats(NamedTuple):
    """Size of the updates, relative to the Frobenius norm of W0, without gradient.

    Attributes:
      delta_norm_nBM: each chunk's update. (One layer alone has no axis n.)
      state_norm_nBM: the state after each chunk. Healthy up to about 4.
    """

    delta_norm_nBM: Float[Array, "*n B M"]
    state_norm_nBM: Float[Array, "*n B M"]


class DecoderOutput(NamedTuple):
    """Attributes:
    hidden_BTD: final, normalised hidden states in the compute dtype; ``token_nll`` turns them into losses.
    ttt: sizes of the updates; ``None`` for a dense model.
    """

    hidden_BTD: Float[Array, "B T D"]
    ttt: TTTStats | None


class DecoderLayer(nnx.Module):
    """Pre-norm attention and MLP of one layer, or of a stack of layers."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, stack: tuple[int, ...] = ()):
        self.attention_norm = RMSNorm(config, rngs, stack)
        self.attention = Attention(config, rngs, stack)
        self.mlp_norm = RMSNorm(config, rngs, stack)
        self.mlp = MLP(config, rngs, stack)


class Decoder(nnx.Module):
    """A causal language model; ``config.ttt = None`` is the plain family.

    Parameters are fp32 and stacked over layers (``layers``) and over TTT layers (``ttt``). The TTT parameters are
    drawn last, so a dense model with the same seed starts from the same weights.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding(config, rngs)
        self.layers = DecoderLayer(config, rngs, (config.num_layers,))
        self.final_norm = RMSNorm(config, rngs)
        if not config.tie_embeddings:
            self.head = Embedding(config, rngs)
        if config.ttt is not None:
            self.ttt = TTTParams(config, rngs, (len(config.ttt.layers),))

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of activations and matmul inputs."""
        return jnp.dtype(self.config.compute_dtype)

    def output_weight(self) -> Float[Array, "V D"]:
        """Returns the fp32 output head, the embedding itself when tied."""
        return (self.embed if self.config.tie_embeddings else self.head).weight[...]

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        *,
        eta: Float[Array, ""] | float | None = None,
        gates_BM: Float[Array, "B M"] | None = None,
    ) -> DecoderOutput:
        """Runs the model over packed rows (fields as in ``data.Batch``).

        Args:
          tokens_BT, segment_ids_BT, positions_BT: the rows; T is a multiple of the TTT chunk.
          eta: size of an update in place of the configured one; 0 switches test-time training off.
          gates_BM: multiplies every chunk's update, in all TTT layers; default 1. Chunks in the order in which the row
            stores them.
        """
        config = self.config
        x_BTD = self.embed(tokens_BT, self.dtype)
        rope = rope_tables(config.rope, config.head_dim, positions_BT)
        if eta is None:
            eta = config.ttt.eta if config.ttt is not None else 0.0
        eta = jnp.asarray(eta, jnp.float32)
        merge_layer, layer_params, merge_ttt, ttt_params = self.split_layers()
        shared = (x_BTD, rope, segment_ids_BT, eta, gates_BM)

        def block(x_BTD: jax.Array, shared: Any, layer_params: Any, ttt_params: Any | None) -> tuple[jax.Array, Any]:
            ttt_layer = None if ttt_params is None else merge_ttt(ttt_params)
            return _apply_to_rows(config, merge_layer(layer_params), ttt_layer, x_BTD, shared)

        groups = plan_groups(config.num_layers, config.ttt.layers if config.ttt else ())
        run = apply_layers if config.remat == "offload" else train_layers
        x_BTD, stats = run(groups, _remat(block, config.remat), x_BTD, shared, layer_params, ttt_params)
        return DecoderOutput(self.final_norm(x_BTD), stats)

    def split_layers(self) -> tuple[Callable[[Any], DecoderLayer], Any, Callable[[Any], TTTParams], Any]:
        """Returns, for the layers and for the TTT layers, what makes one layer of its parameters, and all of them.

        Without TTT the last is ``None``.
        """
        layer_graph, layer_params = nnx.split(self.layers)
        ttt_graph, ttt_params = (None, None) if self.config.ttt is None else nnx.split(self.ttt)
        return (
            functools.partial(nnx.merge, layer_graph),
            layer_params,
            functools.partial(nnx.merge, ttt_graph),
            ttt_params,
        )


# What whole rows and documents that grow do differently in a layer. Each returns its result, and beside it whatever its
# caller wants back: the rows report sizes of updates, a document that grows has new caches.
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]  # (q_BTNH, k_BTKH, v_BTKH) -> o_BTNH, ...
ProjectFast = Callable[[jax.Array, jax.Array], tuple[jax.Array, Any]]  # (z_BTF, target source x_BTD) -> o_BTD, ...


def apply_layer(
    config: ModelConfig,
    layer: DecoderLayer,
    x_BTD: Float[Array, "B T D"],
    x0_BTD: Float[Array, "B T D"],
    rope: RopeTables,
    attend: Attend,
    project_fast: ProjectFast | None,
) -> tuple[jax.Array, Any, Any]:
    """Applies one layer to the residual stream: the only text of a layer, for whole rows and for decoding.

    Args:
      config, layer: the model, and the parameters of the layer.
      x_BTD: the residual stream.
      x0_BTD: token embeddings, a source of targets.
      rope: of the positions.
      attend: how queries meet keys.
      project_fast: the down projection of a TTT layer, in the dtype of the stream; ``None`` in a dense layer.

    Returns:
      The residual stream after the layer, and what ``attend`` and ``project_fast`` returned beside their results.
    """
    x_BTD = checkpoint_name(constrain(x_BTD, "batch", "tokens", "width"), "layer_input")
    with jax.named_scope("attention"):
        q_BTNH, k_BTKH, v_BTKH = layer.attention.project(layer.attention_norm(x_BTD), rope)
        o_BTNH, attended = attend(q_BTNH, k_BTKH, v_BTKH)
        x_BTD = checkpoint_name(x_BTD + layer.attention.output(o_BTNH), "residual")
    with jax.named_scope("mlp"):
        h_BTD = layer.mlp_norm(x_BTD)
        z_BTF = layer.mlp.activate(h_BTD)
        if project_fast is None or config.ttt is None:
            return x_BTD + layer.mlp.project(z_BTF).astype(x_BTD.dtype), attended, None
        o_BTD, projected = project_fast(z_BTF, ttt.target_source(config.ttt.target, x0_BTD, h_BTD))
    return x_BTD + o_BTD, attended, projected


def _apply_to_rows(
    config: ModelConfig, layer: DecoderLayer, ttt_layer: TTTParams | None, x_BTD: jax.Array, shared: tuple[Any, ...]
) -> tuple[jax.Array, TTTStats | None]:
    """Applies one layer to whole rows: attention inside documents, and all chunks of a fast weight at once."""
    x0_BTD, rope, segment_ids_BT, eta, gates_BM = shared

    def attend_in_rows(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> tuple[jax.Array, None]:
        return context_attention.attend(config, q_BTNH, k_BTKH, v_BTKH, segment_ids_BT), None

    def project_fast(z_BTF: jax.Array, source_BTD: jax.Array) -> tuple[jax.Array, TTTStats]:
        assert ttt_layer is not None and config.ttt is not None
        fast = ttt.fast_weight_projection(
            z_BTF, ttt_layer.values(source_BTD, segment_ids_BT), layer.mlp.down[...], segment_ids_BT,
            chunk_tokens=config.ttt.chunk_tokens, eta=eta, gates_BM=gates_BM,
            gradient_dtype=config.weight_gradient_dtype, update=ttt.update_rule(config.ttt),
            balanced=is_balanced(config, z_BTF.shape[1], pieces_of(None, "tokens"), pieces_of(None, "heads")),
            implementation=config.ttt.implementation,
        )  # fmt: skip
        return fast.o_BTD, TTTStats(fast.delta_norm_BM, fast.state_norm_BM)

    fast = None if ttt_layer is None else project_fast
    x_BTD, _, stats = apply_layer(config, layer, x_BTD, x0_BTD, rope, attend_in_rows, fast)
    return x_BTD, stats


# What a layer keeps for the backward pass beside its input; the rest is computed again. Per token and layer, in the
# compute dtype: attention N * H (cheap to keep, expensive to recompute in long rows), qkv (N + 2 K) * H, residual D,
# mlp 2 F. "none" keeps everything, elementwise results too.
REMAT_KEEPS: dict[str, tuple[str, ...]] = {
    "full": (),
    "attention": ("attention",),
    "qkv": ("attention", "qkv", "residual"),
    "dots": ("attention", "qkv", "residual", "mlp"),
}
OFFLOADED = ("layer_input", "attention")  # by "offload", to the memory of the host
ALWAYS_KEPT = (ttt.STATE_NAME,)  # fp32 D x F of a TTT layer and row, only where a context axis cuts the rows


def _remat(block: Any, policy: str) -> Any:
    """Wraps a layer so that its activations are recomputed in the backward pass, except what ``policy`` keeps."""
    if policy == "none":
        return block
    if policy == "offload":
        keep = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=list(ALWAYS_KEPT), names_which_can_be_offloaded=list(OFFLOADED),
            offload_src="device", offload_dst="pinned_host",
        )  # fmt: skip
    else:
        keep = jax.checkpoint_policies.save_only_these_names(*REMAT_KEEPS[policy], *ALWAYS_KEPT)
    # prevent_cse is needed only outside scans; a layer outside one may at worst keep its activations.
    return jax.checkpoint(block, policy=keep, prevent_cse=False)
