"""Continual training of Qwen3-4B, 8B and 14B with In-Place TTT, by the paper's recipe (arXiv 2604.06169).

    intttrain plan    --config=configs/qwen3.py:4b_8k --topology=v5p:4x4x4
    intttrain prepare --config=configs/qwen3.py:4b_32k --output=runs/qwen3/data
    intttrain train   --config=configs/qwen3.py:4b_32k --workdir=runs/qwen3/4b_32k

Runs start from fresh weights until imported ones can be loaded: good for speed and memory, not yet for the recipe.

A variant is a size and a length; `_dense` at the end is the twin without TTT: same data, same order, same initial
weights. The default is `4b_8k`, the shape of the speed and memory comparisons. 2.1 M (2^21) tokens a step everywhere;
20 B tokens at 32k, then 15 B at 128k, where every row lies on a sixteenth of the devices.

`4b_staged` is one run over 8k, 32k and 128k (10 B, 10 B and 15 B tokens), the schedule and the optimizer state going
through. The stages are the variants 4b_8k, 4b_32k and 4b_128k, and so are their plans; the short rows at the beginning
are ours. `4b_staged_dense` is its twin.

    intttrain plan  --config=configs/qwen3.py:4b_staged --topology=v5p:4x4x4 --stage=1
    intttrain train --config=configs/qwen3.py:4b_staged --workdir=runs/qwen3/4b_staged

Predicted, "-" where there is no plan yet; "A / B" is with TTT / dense:

    | variant     | topology    | mesh                 | rows x tokens | peak GiB    | step s         |
    |-------------|-------------|----------------------|---------------|-------------|----------------|
    | 4b_8k       | v5p:4x4x4   | fsdp 64              | 256 x 8192    | 42.1 / 41.4 | 3.74 / 3.62    |
    | 4b_32k      | v5p:4x4x4   | fsdp 64              | 64 x 32768    | 24.7 / 24.1 | 6.27 / 6.11    |
    | 8b_32k      | v5p:4x4x4   | fsdp 64              | 64 x 32768    | 36.4 / -    | 9.29 * / -     |
    | 14b_32k     | v5p:4x4x4   | fsdp 64              | 64 x 32768    | 54.0 / -    | 15.16 * / -    |
    | 4b_128k     | v5p:4x4x4   | fsdp 16 x context 4  | 16 x 131072   | 31.4 / 30.1 | 15.54 / 15.32  |
    | 8b_128k     | v5p:4x4x4   | fsdp 16 x context 4  | 16 x 131072   | 34.5 / -    | 20.58 * / -    |
    | 14b_128k    | v5p:4x4x4   | fsdp 16 x context 4  | 16 x 131072   | 54.4 / -    | 31.12 * / -    |
    | 4b_128k     | v5e:16x16   | fsdp 16 x context 16 | 16 x 131072   | 8.8 / 8.0   | 9.94 / 9.65    |
    | 4b_128k     | v6e:16x16   | fsdp 16 x context 16 | 16 x 131072   | 10.2 / 8.8  | 5.27 / 5.13    |
    | 4b_128k     | tpu7x:4x4x4 | fsdp 16 x context 8  | 16 x 131072   | 15.2 / 14.5 | 6.80 / 6.71    |

Other topologies and lengths: `docs/configs.md`.
"""

from typing import Any

import ml_collections

from intttrain.config import default_config

V5P, V5E, V6E, TPU7X = "v5p:4x4x4", "v5e:16x16", "v6e:16x16", "tpu7x:4x4x4"

# Variant -> the topologies it is planned for; `intttrain plan --compare` plans any twin. With STAGED the keys are all
# variants.
TOPOLOGIES: dict[str, tuple[str, ...]] = {
    "4b_8k": (V5P,),
    "4b_32k": (V5P,),
    "8b_32k": (V5P,),
    "14b_32k": (V5P,),
    "4b_128k": (V5P, V5E, V6E, TPU7X),
    "8b_128k": (V5P,),
    "14b_128k": (V5P,),
    "4b_8k_dense": (V5P,),
    "4b_32k_dense": (V5P,),
    "8b_32k_dense": (),
    "14b_32k_dense": (),
    "4b_128k_dense": (V5P, V5E, V6E, TPU7X),
    "8b_128k_dense": (),
    "14b_128k_dense": (),
}

STAGED = ("4b_staged", "4b_staged_dense")

SIZES = {  # d_model, d_ff, layers, query heads, whether the output head is the embedding
    "4b": (2560, 9728, 36, 32, True),
    "8b": (4096, 12288, 36, 32, False),
    "14b": (5120, 17408, 40, 40, False),
}
LENGTHS = {  # tokens a row, tokens in all; 8k is no stage of the recipe, it takes the schedule of 32k
    "8k": (8192, 20e9),
    "32k": (32768, 20e9),
    "128k": (131072, 15e9),
}
STAGES = {"8k": 10e9, "32k": 10e9, "128k": 15e9}  # tokens of each stage of a staged run, the last is the longest
TOKENS_PER_STEP = 2**21  # not published


def get_config(variant: str = "4b_8k") -> ml_collections.ConfigDict:
    variants = (*TOPOLOGIES, *STAGED)
    if variant not in variants:
        raise ValueError(f"configs/qwen3.py has the variants {', '.join(variants)}, not {variant!r}")
    size, length, *options = variant.split("_")
    if staged := length == "staged":
        length = "128k"
    seq_len, tokens = LENGTHS[length]

    config = default_config()
    config.name = f"qwen3-{variant}"

    model = config.model
    model.family, model.vocab_size = "qwen3", 151936
    model.d_model, model.d_ff, model.num_layers, model.num_heads, model.tie_embeddings = SIZES[size]
    model.num_kv_heads, model.head_dim = 8, 128
    model.rope.theta = 1e6
    if length == "128k":
        model.rope.scaling = {"kind": "yarn", "factor": 4.0, "original_max_position": 32768}
    model.remat = _remat(length)
    model.ttt.layers = tuple(range(0, model.num_layers, 6))
    model.ttt.target, model.ttt.chunk_tokens = "hidden_states", 1024
    # eta and the chunk are coupled: nothing divides by C. The authors' code has 3 with chunks of 4096. The state at
    # the end of a row is eta times a sum over its tokens, whatever the chunk, so 3 keeps that and makes one update a
    # quarter as large. A starting point: lower it if training warns about the size of the state, above all with a
    # larger learning rate than the one below or from fresh weights.
    model.ttt.eta = 3.0
    if "dense" in options:
        model.ttt = None

    config.prepare.source.paths = ("data/text",)
    config.prepare.tokenizer.kind = "huggingface"
    config.prepare.tokenizer.path = "data/tokenizers/qwen3/tokenizer.json"
    config.prepare.tokenizer.end_of_document = "<|endoftext|>"  # not the end of a chat turn
    config.prepare.heldout_fraction = 0.01
    config.data.train = ({"path": "runs/qwen3/data/train", "weight": 1.0},)
    config.data.heldout = "runs/qwen3/data/heldout"
    config.data.seq_len = seq_len

    train = config.train
    train.batch_rows = TOKENS_PER_STEP // seq_len
    train.num_steps = round(tokens / TOKENS_PER_STEP)
    train.schedule.peak_learning_rate = 5e-6
    train.schedule.warmup_steps = 100  # not published
    train.optimizer.weight_decay = 0.1
    train.checkpoint.every_steps = 250
    if length == "128k":
        config.mesh.fsdp, config.mesh.context = train.batch_rows, None  # a row over as many devices as there are

    config.eval.seq_len = config.eval.min_document_tokens = seq_len
    config.eval.position_edges = tuple(seq_len >> halvings for halvings in (5, 4, 3, 2, 1, 0))
    config.eval.batch_rows = 1

    if staged:
        _add_stages(config)
    return config


def _add_stages(config: ml_collections.ConfigDict) -> None:
    """Puts the stages with shorter rows before the last one, which is the configuration as it is."""
    train, last = config.train, list(STAGES)[-1]
    train.num_steps, train.stages = 0, ()
    for length, tokens in STAGES.items():
        train.num_steps += round(tokens / TOKENS_PER_STEP)
        overrides = {} if length == last else _shorter_rows(length)
        train.stages += ({"until_step": train.num_steps, "overrides": overrides},)


def _shorter_rows(length: str) -> dict[str, Any]:
    """Returns what sets the variant of this length apart from that of 128k."""
    seq_len, _ = LENGTHS[length]
    return {
        "data.seq_len": seq_len,
        "train.batch_rows": TOKENS_PER_STEP // seq_len,
        "mesh.fsdp": None,
        "mesh.context": 1,
        "model.rope.scaling": None,
        "model.remat": _remat(length),
    }


def _remat(length: str) -> str:
    # Attention takes longer to recompute the longer the row is; at 8k there is room to keep its inputs as well.
    return "qkv" if length == "8k" else "attention"
