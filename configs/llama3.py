"""Continual training of Llama-3.1-8B with In-Place TTT, by the paper's recipe (arXiv 2604.06169).

    intttrain plan    --config=configs/llama3.py:8b_32k --topology=v5p:4x4x4
    intttrain prepare --config=configs/llama3.py:8b_32k --output=runs/llama3/data
    intttrain train   --config=configs/llama3.py:8b_32k --workdir=runs/llama3/8b_32k

Runs start from fresh weights until imported ones can be loaded: good for speed and memory, not yet for the recipe.

A variant is a size and a length; `_dense` at the end is the twin without TTT: same data, same order, same initial
weights. The default is `8b_32k`. 2.1 M (2^21) tokens a step; 20 B tokens at 32k, then 15 B at 128k, where every row
lies on a sixteenth of the devices. The model reaches 128k with its own RoPE scaling: nothing changes there.

Predicted, "-" where there is no plan yet; "A / B" is with TTT / dense:

    | variant      | topology    | mesh                 | rows x tokens | peak GiB    | step s         |
    |--------------|-------------|----------------------|---------------|-------------|----------------|
    | 8b_32k       | v5p:4x4x4   | fsdp 64              | 64 x 32768    | 35.3 / -    | 7.91 / -       |
    | 8b_128k      | v5p:4x4x4   | fsdp 16 x context 4  | 16 x 131072   | 42.6 / -    | 16.27 / -      |

Other topologies and lengths: `docs/configs.md`.
"""

import ml_collections

from intttrain.config import default_config

# Variant -> the topologies it is planned for. The keys are all variants there are.
TOPOLOGIES: dict[str, tuple[str, ...]] = {
    "8b_32k": ("v5p:4x4x4",),
    "8b_128k": ("v5p:4x4x4",),
}
TOPOLOGIES |= {f"{variant}_dense": () for variant in TOPOLOGIES}  # planned by `intttrain plan --compare`

LENGTHS = {"32k": (32768, 20e9), "128k": (131072, 15e9)}  # tokens a row, tokens in all
TOKENS_PER_STEP = 2**21  # not published


def get_config(variant: str = "8b_32k") -> ml_collections.ConfigDict:
    if variant not in TOPOLOGIES:
        raise ValueError(f"configs/llama3.py has the variants {', '.join(TOPOLOGIES)}, not {variant!r}")
    _, length, *options = variant.split("_")
    seq_len, tokens = LENGTHS[length]

    config = default_config()
    config.name = f"llama3-{variant}"

    model = config.model
    model.family, model.vocab_size, model.tie_embeddings = "llama", 128256, False
    model.d_model, model.d_ff, model.num_layers = 4096, 14336, 32
    model.num_heads, model.num_kv_heads, model.head_dim = 32, 8, 128
    model.norm_eps = 1e-5
    model.rope.theta = 5e5
    model.rope.scaling = {
        "kind": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position": 8192
    }  # fmt: skip
    model.remat = "attention"  # keeps the one thing that takes longer to recompute the longer the row is
    model.ttt.layers = tuple(range(0, model.num_layers, 6))
    model.ttt.target, model.ttt.chunk_tokens = "hidden_states", 1024
    model.ttt.eta = 3.0  # not published for this model: as in configs/qwen3.py, where the reason stands
    if "dense" in options:
        model.ttt = None

    config.prepare.source.paths = ("data/text",)
    config.prepare.tokenizer.kind = "huggingface"
    config.prepare.tokenizer.path = "data/tokenizers/llama3.1/tokenizer.json"
    config.prepare.tokenizer.end_of_document = "<|end_of_text|>"  # not the end of a chat turn
    config.prepare.heldout_fraction = 0.01
    config.data.train = ({"path": "runs/llama3/data/train", "weight": 1.0},)
    config.data.heldout = "runs/llama3/data/heldout"
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
    return config
