"""The OpenAI-compatible surface: schemas, chat templates, tokenisation, streaming text, errors. No torch, no I/O.

Used by the router only. Imports nothing of the other rooms but the wire's structs.
"""
