"""Reads optimised XLA modules, and knows nothing of this product: instructions, loops, FLOPs, memory, kernels."""
