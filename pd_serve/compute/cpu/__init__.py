"""Computing on CPUs: oneDNN for matrices, numba kernels for what lies between them."""
