"""Computing on NVIDIA GPUs: an executor, its linears, the kernels between them, attention over the paged KV, sampling.

Modules here import triton or FlashInfer at their top, which a machine without a GPU has not: nothing outside of this
folder may import them before it knows that the device is a GPU. All of it runs on the current stream, never waits for
the device, and can be captured into a CUDA graph, unless a docstring says otherwise.
"""
