"""Paged KV memory: the layout of a block, the pool of blocks, the prefix cache."""
