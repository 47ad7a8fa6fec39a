"""Scattered pieces of KV through staging memory: what the nixl and the ucx lane share. When, where to and by whom a
slot's worth is moved is the lane's own.

- ``pieces``: how the reader asks for pieces, and what the source makes of it.
- ``copies``: how pieces lie in a slot, and the copies between it and a pool.
"""
