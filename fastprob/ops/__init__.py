"""Pure tensor functions, one file per family: schema, fake, autograd and dispatch.

An op is deterministic given its arguments: randomness comes in as a noise tensor or as a
(seed, offset) tensor. Ops call `fastprob.reference` on the CPU and `fastprob.kernels` on a GPU.
"""
