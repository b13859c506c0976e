"""A byte-level model of 0.8 M parameters on the source of Python's standard library: the run of `make demo`.

    intttrain prepare --config=configs/tiny.py --output=runs/tiny/data
    intttrain train   --config=configs/tiny.py --workdir=runs/tiny/ttt
    intttrain train   --config=configs/tiny.py:dense --workdir=runs/tiny/dense
    intttrain eval    --config=configs/tiny.py --workdir=runs/tiny/ttt --dense_workdir=runs/tiny/dense

Variants: `ttt` (default: layer 0 is a fast weight) and `dense`, its twin without TTT: same data, same order, same
initial weights. `staged` and `staged_dense` read rows of 512, then 1024, then 2048 bytes. Attention sees 128 bytes, so
anything further back has to pass through the fast weight.
Hardware: one CPU core per run. Time and result: `docs/benchmarks.md`.
"""

import sysconfig

import ml_collections

from intttrain.config import default_config

VARIANTS = ("ttt", "dense", "staged", "staged_dense")


def get_config(variant: str = "ttt") -> ml_collections.ConfigDict:
    config = default_config()
    config.name = f"tiny-{variant}"

    model = config.model
    model.vocab_size = 257  # 256 bytes and the end of a document
    model.d_model, model.d_ff, model.num_layers = 128, 384, 4
    model.num_heads, model.num_kv_heads, model.head_dim = 4, 2, 32
    model.initializer_range = 0.05  # about half of 1/sqrt(d_model); 0.02 learns much slower at this width (docs/log.md)
    model.sliding_window = 128
    model.compute_dtype = "float32"  # bfloat16 is emulated on CPUs
    model.remat = "none"
    model.ttt.layers, model.ttt.chunk_tokens, model.ttt.eta = (0,), 128, 0.3
    if variant not in VARIANTS:
        raise ValueError(f"configs/tiny.py has the variants {', '.join(VARIANTS)}, not {variant!r}")
    if variant.endswith("dense"):
        model.ttt = None

    config.prepare.source.paths = (sysconfig.get_paths()["stdlib"],)
    config.prepare.source.patterns = ("*.py",)
    config.prepare.source.exclude = ("site-packages/*", "dist-packages/*")
    config.data.train = ({"path": "runs/tiny/data/train", "weight": 1.0},)
    config.data.heldout = "runs/tiny/data/heldout"
    config.data.seq_len = 2048

    train = config.train
    train.num_steps, train.batch_rows = 600, 1
    train.schedule.peak_learning_rate, train.schedule.warmup_steps = 3e-3, 50
    train.checkpoint.every_steps, train.log_every_steps = 200, 25
    if variant.startswith("staged"):
        train.stages = (
            {"until_step": 300, "overrides": {"data.seq_len": 512, "train.batch_rows": 4}},
            {"until_step": 450, "overrides": {"data.seq_len": 1024, "train.batch_rows": 2}},
            {"until_step": 600, "overrides": {}},
        )

    config.eval.seq_len = config.eval.min_document_tokens = 2048
    config.eval.documents = 64
    config.eval.position_edges = (128, 256, 512, 1024, 1536, 2048)
    return config
