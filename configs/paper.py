"""The models that the paper trains from scratch (arXiv 2604.06169): 500M and 1.5B at 32k, 1.7B and 4B at 8k.

    intttrain plan    --config=configs/paper.py:500m --topology=v5p:4x4x4
    intttrain prepare --config=configs/paper.py:500m --output=runs/paper/data
    intttrain train   --config=configs/paper.py:500m --workdir=runs/paper/500m
    intttrain train   --config=configs/paper.py:500m_dense --workdir=runs/paper/500m_dense

`500m` and `1.5b` attend within a sliding window (2048 and 4096 tokens), `_full` to the whole row; `1.7b` and `4b` have
the shapes of Qwen3 and full attention. `_dense` at the end is the twin without TTT: same data, same order, same initial
weights. The default is `500m`. The two pairs have vocabularies, and so stores, of their own: for 1.7b and 4b,
`intttrain prepare --config=configs/paper.py:4b --output=runs/qwen3/data` (the stores of configs/qwen3.py).

A batch of "2M" tokens is 2^21 here, "4M" 2^22 and "8M" 2^23: rows divide over devices, 20, 60 and 120 B tokens in all.
Not published, decided here: every query head has its own key/value head of 128 channels and the output head is not
the embedding (which gives 0.39 B and 1.44 B parameters, the nearest to the names); q/k norms, as in the 4B; 1.7b takes
the recipe of 4b; any tokenizer of 32,000 pieces will do, Llama 2's is one.

Predicted, "-" where there is no plan yet; "A / B" is with TTT / dense:

    | variant      | topology    | mesh                 | rows x tokens | peak GiB    | step s         |
    |--------------|-------------|----------------------|---------------|-------------|----------------|
    | 500m         | v5p:4x4x4   | fsdp 64              | 64 x 32768    | 5.2 / 5.1   | 0.47 / 0.43    |
    | 500m         | v5e:8x8     | fsdp 64              | 64 x 32768    | 4.8 / 4.7   | 1.10 / 1.02    |
    | 500m         | tpu7x:4x4x2 | fsdp 64              | 64 x 32768    | 5.0 / 4.8   | 0.37 / 0.35    |
    | 500m         | v6e:8x8     | fsdp 64              | 64 x 32768    | 5.2 / 5.1   | 0.62 / 0.59    |
    | 500m_full    | v5p:4x4x4   | fsdp 64              | 64 x 32768    | 5.6 / 5.5   | 0.89 / 0.85    |
    | 1.5b         | v5p:4x4x4   | fsdp 64              | 128 x 32768   | 19.0 / 17.9 | 2.70 / 2.53    |
    | 1.5b_full    | v5p:4x4x4   | fsdp 64              | 128 x 32768   | 22.0 / 21.2 | 4.12 / 3.95    |
    | 1.7b         | v5p:4x4x4   | fsdp 64              | 1024 x 8192   | 25.5 / 20.5 | 6.52 / 6.09    |
    | 4b           | v5p:4x4x4   | fsdp 64              | 1024 x 8192   | 43.9 / 42.4 | 15.03 / 14.28  |

Other topologies and lengths: `docs/configs.md`.
"""

import dataclasses

import ml_collections

from intttrain.config import default_config

V5P, V5E, V6E, V7X = "v5p:4x4x4", "v5e:8x8", "v6e:8x8", "tpu7x:4x4x2"

# Variant -> the topologies it is planned for. The keys are all variants there are.
TOPOLOGIES: dict[str, tuple[str, ...]] = {
    "500m": (V5P, V5E, V6E, V7X),
    "500m_full": (V5P,),
    "1.5b": (V5P,),
    "1.5b_full": (V5P,),
    "1.7b": (V5P,),
    "4b": (V5P,),
}
TOPOLOGIES |= {f"{variant}_dense": topologies for variant, topologies in TOPOLOGIES.items()}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Shape and training of one size."""

    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    qwen3: bool  # vocabulary, tokenizer and tied head of Qwen3
    window: int | None
    seq_len: int
    tokens_per_step: int
    tokens: float
    learning_rate: float
    microbatches: int = 1


RECIPES = {
    "500m": Recipe(1024, 3072, 24, 8, 8, False, 2048, 32768, 2**21, 20e9, 5e-4),
    "1.5b": Recipe(2048, 6144, 24, 16, 16, False, 4096, 32768, 2**22, 60e9, 3e-4),
    # The step is four times that of configs/qwen3.py; two microbatches halve its activations.
    "1.7b": Recipe(2048, 6144, 28, 16, 8, True, None, 8192, 2**23, 120e9, 3e-4, microbatches=2),
    "4b": Recipe(2560, 9728, 36, 32, 8, True, None, 8192, 2**23, 120e9, 3e-4, microbatches=2),
}


def get_config(variant: str = "500m") -> ml_collections.ConfigDict:
    if variant not in TOPOLOGIES:
        raise ValueError(f"configs/paper.py has the variants {', '.join(TOPOLOGIES)}, not {variant!r}")
    size, *options = variant.split("_")
    recipe = RECIPES[size]

    config = default_config()
    config.name = f"paper-{variant}"

    model = config.model
    model.family, model.tie_embeddings = "qwen3", recipe.qwen3
    model.vocab_size = 151936 if recipe.qwen3 else 32000
    model.d_model, model.d_ff, model.num_layers = recipe.d_model, recipe.d_ff, recipe.num_layers
    model.num_heads, model.num_kv_heads, model.head_dim = recipe.num_heads, recipe.num_kv_heads, 128
    model.rope.theta = 1e6
    if recipe.window is not None and "full" not in options:
        model.sliding_window = recipe.window
    model.remat = "attention"  # keeps the one thing that takes longer to recompute the longer the row is
    model.ttt.layers = tuple(range(0, recipe.num_layers, 6))
    model.ttt.target, model.ttt.chunk_tokens = "input_embed", 1024
    # Not published. 0.3 was best for a model of 0.9 M parameters on rows of 2048 tokens; there, ten times less lost a
    # fifth of the gain, ten times more half of it, and a hundred times more did not train. The state is a sum over the
    # row and rows are longer here, so this errs towards less. A starting point: try 0.03 and 0.3 before a long run.
    model.ttt.eta = 0.1
    if "dense" in options:
        model.ttt = None

    folder, end = ("qwen3", "<|endoftext|>") if recipe.qwen3 else ("paper", "</s>")
    config.prepare.source.paths = ("data/text",)
    config.prepare.tokenizer.kind = "huggingface"
    config.prepare.tokenizer.path = f"data/tokenizers/{folder}/tokenizer.json"
    config.prepare.tokenizer.end_of_document = end
    config.prepare.heldout_fraction = 0.01
    config.data.train = ({"path": f"runs/{folder}/data/train", "weight": 1.0},)
    config.data.heldout = f"runs/{folder}/data/heldout"
    config.data.seq_len = recipe.seq_len

    train = config.train
    train.batch_rows = recipe.tokens_per_step // recipe.seq_len
    train.num_steps = round(recipe.tokens / recipe.tokens_per_step)
    train.microbatches = recipe.microbatches
    train.schedule.peak_learning_rate, train.schedule.warmup_steps = recipe.learning_rate, 1024
    train.optimizer.weight_decay, train.optimizer.clip_norm = 0.1, 1.0
    train.checkpoint.every_steps = 500

    config.eval.seq_len = config.eval.min_document_tokens = recipe.seq_len
    config.eval.position_edges = tuple(recipe.seq_len >> halvings for halvings in (5, 4, 3, 2, 1, 0))
    config.eval.batch_rows = 1
    return config
