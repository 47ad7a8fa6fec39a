"""Ranks of one engine, on the GPUs of one host: who they are, whether they live, sums over them."""
