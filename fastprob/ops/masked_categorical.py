"""Masks of the masked categorical distributions; the rest is `ops.categorical`."""

from __future__ import annotations

from fastprob.reference import masked_categorical as reference

gather = reference.gather
mask_logits = reference.mask_logits
probs_to_logits = reference.probs_to_logits
score_action = reference.score_action
score_position = reference.score_position
spread = reference.spread
to_action = reference.to_action
