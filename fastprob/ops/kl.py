"""Kullback-Leibler divergences; gradients are autograd's."""

from __future__ import annotations

from fastprob.reference import kl as reference

categorical = reference.categorical
truncated = reference.truncated
