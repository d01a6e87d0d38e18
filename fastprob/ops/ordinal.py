"""Logits of Ordinal and OneHotOrdinal; the rest is `ops.categorical`."""

from __future__ import annotations

from fastprob.reference import ordinal as reference

logits = reference.logits
