"""Benchmarks that ship with pd-serve.

Load generators know an endpoint only by its API; :mod:`pd_serve.bench.transfer` moves KV itself.
"""
