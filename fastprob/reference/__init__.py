"""Plain PyTorch, one file per family: the CPU path, and the oracle of every test.

Right in float64. Imports neither `fastprob.kernels` nor triton.
"""
