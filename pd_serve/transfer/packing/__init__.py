"""Scattered pieces of KV through staging memory: what the nixl and the ucx lane share. How much travels at a time, in
which slot and when it is free again is the lane's own.

- ``pieces``: how the reader asks for pieces, and what the source makes of it.
- ``copies``: from a pool into a slot, and from a slot into a pool.
"""
