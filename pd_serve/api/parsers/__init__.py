"""What a model's output text says beside words: reasoning and tool calls, found as the text comes.

One small machine a format (:mod:`registry` has their names, and which one a chat template calls for), text in, pieces
out; :mod:`message` makes a chat's deltas of them. All give the same pieces however the text is split, never raise for
what a model writes, and give text that only looked like a call back as content. No I/O.
"""
