"""Pulling KV blocks out of another node's memory: one small interface, backends behind it."""
