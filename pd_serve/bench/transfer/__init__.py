"""``pd-serve bench transfer``: how fast KV moves between two processes of this machine, beside the raw limit.

The command (``run``) starts one *reader* process for each transport, which starts the *source* processes that it
pulls from; both use transports as nodes do. A transport that crashes or hangs ends its own processes only.
``doctor`` measures lanes with the same two ends.
"""
