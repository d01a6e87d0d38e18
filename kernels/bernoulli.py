"""Bernoulli with independent elements: sample, score and entropy in one pass, and backward.

With the log-odds s = log(p / (1 - p)), e = exp(-|s|) in (0, 1] and the less likely of the two
values called the miss, summed over a row of A elements:

    log P(x) = -log(1 + e) - |s| where x is the miss
    H        =  log(1 + e) + |s| e / (1 + e)

A draw is 1 where u <= p, u uniform in (0, 1] in steps of 2^-32: certain at p = 1 and impossible at
p = 0, and a p down to 2^-32 is met, where the steps of 2^-23 of `_random.unit` would never give a 1
below 2^-24. With gl the gradient of the score and gh that of the entropy, in logits and in probs:

    ds = gl (x - p) - gh s p (1 - p)              dp = gl (x - p) / (p (1 - p)) - gh s

Probabilities are scored at a distance eps of their dtype from 0 and 1, as torch does, with no
gradient beyond.

Source: the mass function and entropy of the Bernoulli distribution.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprob.kernels import _math as m
from fastprob.kernels import _random as random
from fastprob.kernels import _tile as tile
from fastprob.kernels._launch import (
    LARGER,
    NO_STATE,
    Grid,
    State,
    event_numel,
    fast,
    flat_grid,
    fold,
    forward_grid,
    gradients,
    launching,
    limited,
    parameter,
    tail,
    vector_of,
)


@triton.jit
def log1p_of_unit(e, EPS: tl.constexpr):
    """`log(1 + e)` for e in [0, 1], as exact as a dtype with this eps can use.

    Polynomials, since lg2(1 + e) loses a small e, which is the score of every draw that was nearly
    certain. Degree 9 is the smallest whose own error (5e-9 of the value) is below the rounding of
    fp32 (1.3e-7 in all); degree 4 is off by 5.7e-5, an eighth of a rounding to fp16.
    """
    if EPS > 1e-6:
        y = e * 0.04134730249643326 - 0.15742720663547516
        y = y * e + 0.30630093812942505
        y = y * e - 0.4969778060913086
        y = y * e + 0.9999432563781738
    else:
        y = e * -0.003244011662900448 + 0.019851399585604668
        y = y * e - 0.05695941299200058
        y = y * e + 0.10603641718626022
        y = y * e - 0.1530558466911316
        y = y * e + 0.19675935804843903
        y = y * e - 0.24954132735729218
        y = y * e + 0.3332996368408203
        y = y * e - 0.4999990165233612
        y = y * e + 1.0
    return y * e


@triton.jit
def cost_of_rest(q, EPS: tl.constexpr):
    """`-log(1 - q)` for q in [0, 1/2], likewise: off by 1.2e-7 of its value in all, or 4.4e-5."""
    if EPS > 1e-6:
        y = q * 0.7451945543289185 - 0.05782042816281319
        y = y * q + 0.3958025872707367
        y = y * q + 0.49578148126602173
        y = y * q + 1.000044345855713
    else:
        y = q * 1.7756396532058716 - 2.5526299476623535
        y = y * q + 2.0467522144317627
        y = y * q - 0.6334851384162903
        y = y * q + 0.3533581495285034
        y = y * q + 0.17329226434230804
        y = y * q + 0.2521618604660034
        y = y * q + 0.3332453966140747
        y = y * q + 0.5000013709068298
        y = y * q + 1.0
    return y * q


@triton.jit
def away_from_ends(p, EPS: tl.constexpr):
    """Probabilities at least EPS from 0 and 1; a NaN stays."""
    return tile.clamp(p, EPS, 1.0 - EPS)


@triton.jit
def decay(given, FROM_PROBS: tl.constexpr, FAST: tl.constexpr):
    """`exp(-|s|)` of logits, of which all else is made; of probabilities nothing is needed."""
    if FROM_PROBS:
        return given
    else:
        return m.exp(-tl.abs(given), FAST)


@triton.jit
def costs_of_values(given, e, FROM_PROBS: tl.constexpr, EPS: tl.constexpr, FAST: tl.constexpr):
    """The negative scores of both values.

    Args:
        given: logits, or probabilities where FROM_PROBS.
        e: their `decay`.
        FROM_PROBS: which of the two.
        EPS: distance that probabilities keep from 0 and 1.
        FAST: as in `_math`.

    Returns:
        whether 1 is the likely value, the cost of the likely value, that of the miss, the second
        less the first, and the probability of the miss.
    """
    if FROM_PROBS:
        p = away_from_ends(given, EPS)
        likely = p > 0.5
        q = tl.where(likely, 1.0 - p, p)
        hit = cost_of_rest(q, EPS)
        miss = -m.log(q, FAST)
        return likely, hit, miss, miss - hit, q
    else:
        size = tl.abs(given)
        hit = log1p_of_unit(e, EPS)
        return given > 0.0, hit, hit + size, size, e * m.reciprocal(1.0 + e, FAST)


@triton.jit
def uniforms_to_one(seed, call, first, COUNT: tl.constexpr):
    """Uniforms in (0, 1], one for each element: (word + 1) / 2^32, rounded to fp32."""
    group = first // 4 + tl.arange(0, COUNT // 4)
    a, b, c, d = random.philox(seed, call, group)
    return random.spread(up_to_one(a), up_to_one(b), up_to_one(c), up_to_one(d), COUNT)


@triton.jit
def up_to_one(word):
    """A word as a uniform in (0, 1]."""
    return (word.to(tl.float32) + 1.0) * 2.3283064365386963e-10


@triton.jit
def drawn(given, e, u, FROM_PROBS: tl.constexpr):
    """Which elements are 1, from uniforms in (0, 1]."""
    if FROM_PROBS:
        return u <= given
    else:
        # u <= p with both sides times 1 + e, which spares the division: p is 1 / (1 + e) where 1
        # is the likely value, e / (1 + e) elsewhere.
        return u * e + u <= tl.where(given > 0.0, 1.0, e)


@triton.jit
def mode(given, FROM_PROBS: tl.constexpr):
    """Which elements are more likely 1 than 0."""
    return given > (0.5 if FROM_PROBS else 0.0)


@triton.jit
def _draw_tile(
    given, value, seed, call, start, read, kept, rows, given_row, given_column,
    A: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, GIVEN: tl.constexpr,
    FROM_PROBS: tl.constexpr, EPS: tl.constexpr, RANDOM: tl.constexpr, SCORE: tl.constexpr,
    ENTROPY: tl.constexpr, FAST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Writes the values of one tile; gives their negative scores and entropies.

    Of a tile that is not WHOLE the first `read` elements are drawn; `kept` are stored.
    """
    UNIT: tl.constexpr = tile.vector(value.dtype.element_ty.primitive_bitwidth)
    i = tl.arange(0, COUNT)
    inside = i < read
    stored = i < kept
    par = tile.load(
        given, start, i, inside, 0.5, rows, given_row, given_column, A, COUNT, GIVEN, WHOLE
    )
    e = decay(par, FROM_PROBS, FAST)
    one = mode(par, FROM_PROBS)
    if RANDOM:
        one = drawn(par, e, uniforms_to_one(seed, call, start, COUNT), FROM_PROBS)
    ones = tl.where(one, 1.0, 0.0)
    tile.store(value, start, ones, i, stored, COUNT, TILE, WHOLE and TILE % UNIT == 0)
    cost = tl.zeros([COUNT], tl.float32)
    entropy = cost
    if SCORE or ENTROPY:
        likely, hit, miss, gap, q = costs_of_values(par, e, FROM_PROBS, EPS, FAST)
        if SCORE:
            cost = hit
            if RANDOM:
                cost = tl.where(one == likely, hit, miss)
        if ENTROPY:
            entropy = hit + gap * q
    return cost, entropy


@triton.jit
def _store_sums(
    score, entropy, cost, terms, first, total_rows, rows, lead,
    A: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr, OWN: tl.constexpr,
    GATHER: tl.constexpr, SCORE: tl.constexpr, ENTROPY: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The scores and entropies of a tile's rows, from its terms."""
    if SCORE:
        sums = tile.sum_rows(cost, A, COUNT, ROWS, OWN, GATHER, lead)
        tile.store_rows(score, first, -sums, total_rows, ROWS, OWN, WHOLE)
    if ENTROPY:
        sums = tile.sum_rows(terms, A, COUNT, ROWS, OWN, GATHER, lead)
        # An entropy has no sample dimensions: the rows of the first sample write it.
        tile.store_rows(entropy, first, sums, rows, ROWS, OWN, False)


@triton.jit
def _draw_rows(
    given, value, score, entropy, seed, call, program, total_rows, rows, given_row, given_column,
    A: tl.constexpr, COUNT: tl.constexpr, OWN: tl.constexpr, GIVEN: tl.constexpr,
    FROM_PROBS: tl.constexpr, EPS: tl.constexpr, RANDOM: tl.constexpr, SCORE: tl.constexpr,
    ENTROPY: tl.constexpr, FAST: tl.constexpr, UNIT: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """OWN wide rows chunk by chunk; UNIT and LAST as of `_tile.wide_rows`."""
    THREADS: tl.constexpr = COUNT // 16
    start, skip, last, read, kept = tile.wide_rows(program, total_rows, A, OWN, UNIT, LAST)
    i = tl.arange(0, COUNT)
    costs = tl.zeros([THREADS], tl.float32)
    terms = tl.zeros([THREADS], tl.float32)
    row = program * OWN
    end = skip + A
    for chunk in range(0, last, COUNT):
        cost, term = _draw_tile(
            given, value, seed, call, start + chunk, read - chunk, kept - chunk, rows,
            given_row, given_column,
            A, COUNT, COUNT, GIVEN, FROM_PROBS, EPS, RANDOM, SCORE, ENTROPY, FAST,
            A % COUNT == 0,
        )  # fmt: skip
        if chunk < skip:
            cost = tl.where(i < skip, 0.0, cost)
            term = tl.where(i < skip, 0.0, term)
        while end <= tl.minimum(chunk + COUNT, last):
            costs, cost = tile.ended(costs, cost, i, end - chunk, COUNT, THREADS, UNIT)
            terms, term = tile.ended(terms, term, i, end - chunk, COUNT, THREADS, UNIT)
            _store_sums(
                score, entropy, costs, terms, row, total_rows, rows, 0,
                A, THREADS, 1, 1, False, SCORE, ENTROPY, True,
            )  # fmt: skip
            costs = tl.zeros([THREADS], tl.float32)
            terms = tl.zeros([THREADS], tl.float32)
            row += 1
            end += A
        costs += tile.of_threads(cost, COUNT, THREADS, UNIT)
        terms += tile.of_threads(term, COUNT, THREADS, UNIT)


@triton.jit(do_not_specialize=["seed", "call", "total_rows", "rows"])
def draw_kernel(
    given, value, score, entropy, state, used, ticket, seed, call, total_rows, rows,
    given_row, given_column,
    A: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    OWN: tl.constexpr, GATHER: tl.constexpr, WIDE: tl.constexpr, GIVEN: tl.constexpr,
    FROM_PROBS: tl.constexpr, EPS: tl.constexpr, RANDOM: tl.constexpr, SCORE: tl.constexpr,
    ENTROPY: tl.constexpr, HOST: tl.constexpr, ADVANCE: tl.constexpr, KEEP: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Values, scores and entropies of OWN rows; chunk by chunk where WIDE."""
    program = tl.program_id(0).to(tl.int64)
    if RANDOM:
        seed, call = random.open_state(state, seed, call, HOST)
    UNIT: tl.constexpr = tile.vector(value.dtype.element_ty.primitive_bitwidth)
    if WIDE:
        if A % UNIT == 0 or (program + 1) * OWN < total_rows:
            _draw_rows(
                given, value, score, entropy, seed, call, program, total_rows, rows,
                given_row, given_column,
                A, COUNT, OWN, GIVEN, FROM_PROBS, EPS, RANDOM, SCORE, ENTROPY, FAST, UNIT, False,
            )  # fmt: skip
        else:
            _draw_rows(
                given, value, score, entropy, seed, call, program, total_rows, rows,
                given_row, given_column,
                A, COUNT, OWN, GIVEN, FROM_PROBS, EPS, RANDOM, SCORE, ENTROPY, FAST, UNIT, True,
            )  # fmt: skip
    else:
        first = program * OWN
        start, lead = tile.begin(program, TILE, UNIT)
        end = total_rows.to(tl.int64) * A
        if start + COUNT <= end:
            cost, term = _draw_tile(
                given, value, seed, call, start, COUNT, tile.kept(lead, TILE, COUNT, UNIT), rows,
                given_row, given_column,
                A, COUNT, TILE, GIVEN, FROM_PROBS, EPS, RANDOM, SCORE, ENTROPY, FAST, True,
            )  # fmt: skip
            _store_sums(
                score, entropy, cost, term, first, total_rows, rows, lead,
                A, COUNT, ROWS, OWN, GATHER, SCORE, ENTROPY, True,
            )  # fmt: skip
        else:
            left = tl.minimum(end - start, lead + TILE).to(tl.int32)
            cost, term = _draw_tile(
                given, value, seed, call, start, left, left, rows, given_row, given_column,
                A, COUNT, TILE, GIVEN, FROM_PROBS, EPS, RANDOM, SCORE, ENTROPY, FAST, False,
            )  # fmt: skip
            _store_sums(
                score, entropy, cost, term, first, total_rows, rows, lead,
                A, COUNT, ROWS, OWN, GATHER, SCORE, ENTROPY, False,
            )  # fmt: skip
    if RANDOM:
        random.close_state(state, used, ticket, seed, call, ADVANCE, KEEP)


@triton.jit
def _score_tile(
    given, value, start, read, rows, given_row, given_column, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, GIVEN: tl.constexpr, VALUE: tl.constexpr,
    FROM_PROBS: tl.constexpr, EPS: tl.constexpr, SCORE: tl.constexpr, ENTROPY: tl.constexpr,
    FAST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, COUNT)
    inside = i < read
    par = tile.load(
        given, start, i, inside, 0.5, rows, given_row, given_column, A, COUNT, GIVEN, WHOLE
    )
    e = decay(par, FROM_PROBS, FAST)
    likely, hit, _, gap, q = costs_of_values(par, e, FROM_PROBS, EPS, FAST)
    cost = hit
    if SCORE:
        x = tile.load(
            value, start, i, inside, 0.0, rows, value_row, value_column, A, COUNT, VALUE, WHOLE
        )
        # A value between 0 and 1 misses in part, as in torch's formula, which is linear in it.
        cost = hit + gap * tl.where(likely, 1.0 - x, x)
    entropy = hit
    if ENTROPY:
        entropy = hit + gap * q
    return cost, entropy


@triton.jit
def _score_rows(
    given, value, score, entropy, program, total_rows, rows,
    given_row, given_column, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, OWN: tl.constexpr, GIVEN: tl.constexpr,
    VALUE: tl.constexpr, FROM_PROBS: tl.constexpr, EPS: tl.constexpr, SCORE: tl.constexpr,
    ENTROPY: tl.constexpr, FAST: tl.constexpr, UNIT: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """The scores and entropies of wide rows, as in `_draw_rows`."""
    THREADS: tl.constexpr = COUNT // 16
    start, skip, last, read, _ = tile.wide_rows(program, total_rows, A, OWN, UNIT, LAST)
    i = tl.arange(0, COUNT)
    costs = tl.zeros([THREADS], tl.float32)
    terms = tl.zeros([THREADS], tl.float32)
    row = program * OWN
    end = skip + A
    for chunk in range(0, last, COUNT):
        cost, term = _score_tile(
            given, value, start + chunk, read - chunk, rows,
            given_row, given_column, value_row, value_column,
            A, COUNT, GIVEN, VALUE, FROM_PROBS, EPS, SCORE, ENTROPY, FAST, A % COUNT == 0,
        )  # fmt: skip
        if chunk < skip:
            cost = tl.where(i < skip, 0.0, cost)
            term = tl.where(i < skip, 0.0, term)
        while end <= tl.minimum(chunk + COUNT, last):
            costs, cost = tile.ended(costs, cost, i, end - chunk, COUNT, THREADS, UNIT)
            terms, term = tile.ended(terms, term, i, end - chunk, COUNT, THREADS, UNIT)
            _store_sums(
                score, entropy, costs, terms, row, total_rows, rows, 0,
                A, THREADS, 1, 1, False, SCORE, ENTROPY, True,
            )  # fmt: skip
            costs = tl.zeros([THREADS], tl.float32)
            terms = tl.zeros([THREADS], tl.float32)
            row += 1
            end += A
        costs += tile.of_threads(cost, COUNT, THREADS, UNIT)
        terms += tile.of_threads(term, COUNT, THREADS, UNIT)


@triton.jit(do_not_specialize=["total_rows", "rows"])
def score_kernel(
    given, value, score, entropy, total_rows, rows,
    given_row, given_column, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    OWN: tl.constexpr, GATHER: tl.constexpr, WIDE: tl.constexpr, GIVEN: tl.constexpr,
    VALUE: tl.constexpr, FROM_PROBS: tl.constexpr, EPS: tl.constexpr, SCORE: tl.constexpr,
    ENTROPY: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Scores of given values, and entropies, of OWN rows; chunk by chunk where WIDE."""
    program = tl.program_id(0).to(tl.int64)
    UNIT: tl.constexpr = tile.vector(
        given.dtype.element_ty.primitive_bitwidth, value.dtype.element_ty.primitive_bitwidth
    )
    if WIDE:
        if A % UNIT == 0 or (program + 1) * OWN < total_rows:
            _score_rows(
                given, value, score, entropy, program, total_rows, rows,
                given_row, given_column, value_row, value_column,
                A, COUNT, OWN, GIVEN, VALUE, FROM_PROBS, EPS, SCORE, ENTROPY, FAST, UNIT, False,
            )  # fmt: skip
        else:
            _score_rows(
                given, value, score, entropy, program, total_rows, rows,
                given_row, given_column, value_row, value_column,
                A, COUNT, OWN, GIVEN, VALUE, FROM_PROBS, EPS, SCORE, ENTROPY, FAST, UNIT, True,
            )  # fmt: skip
    else:
        start, lead = tile.begin(program, TILE, UNIT)
        end = total_rows.to(tl.int64) * A
        if start + COUNT <= end:
            cost, term = _score_tile(
                given, value, start, COUNT, rows,
                given_row, given_column, value_row, value_column,
                A, COUNT, GIVEN, VALUE, FROM_PROBS, EPS, SCORE, ENTROPY, FAST, True,
            )  # fmt: skip
            _store_sums(
                score, entropy, cost, term, program * OWN, total_rows, rows, lead,
                A, COUNT, ROWS, OWN, GATHER, SCORE, ENTROPY, True,
            )  # fmt: skip
        else:
            cost, term = _score_tile(
                given, value, start, tl.minimum(end - start, lead + TILE).to(tl.int32), rows,
                given_row, given_column, value_row, value_column,
                A, COUNT, GIVEN, VALUE, FROM_PROBS, EPS, SCORE, ENTROPY, FAST, False,
            )  # fmt: skip
            _store_sums(
                score, entropy, cost, term, program * OWN, total_rows, rows, lead,
                A, COUNT, ROWS, OWN, GATHER, SCORE, ENTROPY, False,
            )  # fmt: skip


@triton.jit
def _backward_tile(
    grad_score, grad_entropy, given, value, grad_given, grad_scored,
    used, start, left, rows, given_row, given_column, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, GIVEN: tl.constexpr, VALUE: tl.constexpr,
    FROM_PROBS: tl.constexpr, EPS: tl.constexpr, RANDOM: tl.constexpr, STORED: tl.constexpr,
    BY_SCORE: tl.constexpr, BY_ENTROPY: tl.constexpr, TO_VALUE: tl.constexpr,
    FAST: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, COUNT)
    inside = i < left
    par = tile.load(
        given, start, i, inside, 0.5, rows, given_row, given_column, A, COUNT, GIVEN, WHOLE
    )
    e = decay(par, FROM_PROBS, FAST)
    one = mode(par, FROM_PROBS)
    if RANDOM:
        u = uniforms_to_one(tl.load(used), tl.load(used + 1), start, COUNT)
        one = drawn(par, e, u, FROM_PROBS)
    # The probabilities of the likely value and of the other: 1 - p would lose the smaller one.
    large = e
    small = e
    if not FROM_PROBS:
        large = m.reciprocal(1.0 + e, FAST)
        small = e * large
    likely = mode(par, FROM_PROBS)
    grad = tl.zeros([COUNT], tl.float32)
    if BY_SCORE:
        by_row = tile.of_rows(grad_score, start, i, inside, A, COUNT, WHOLE)
        if STORED:
            x = tile.load(
                value, start, i, inside, 0.0, rows, value_row, value_column, A, COUNT, VALUE, WHOLE
            )
            if FROM_PROBS:
                grad = by_row * m.divide(x - par, par * (1.0 - par), FAST)
            else:
                grad = by_row * (x - tl.where(likely, large, small))
        elif FROM_PROBS:
            # (x - p) / (p (1 - p)) of a zero or a one.
            grad = by_row * m.reciprocal(tl.where(one, par, par - 1.0), FAST)
        else:
            # x - p is the probability of the value that was not drawn, with a sign.
            other = tl.where(one == likely, small, large)
            grad = by_row * tl.where(one, other, -other)
    if BY_ENTROPY or TO_VALUE:
        s = par
        if FROM_PROBS:
            p = away_from_ends(par, EPS)
            s = m.log(p, FAST) - m.log(1.0 - p, FAST)
        if BY_ENTROPY:
            # The entropy has no sample dimensions: its gradient goes to the first sample alone.
            per_row = tile.of_first_rows(grad_entropy, start, i, inside, rows, A, COUNT, WHOLE)
            if FROM_PROBS:
                grad -= per_row * s
            else:
                grad -= per_row * (s * large * small)
        if TO_VALUE:
            tile.store(grad_scored, start, by_row * s, i, inside, COUNT, COUNT, WHOLE)
    if FROM_PROBS and (BY_SCORE or BY_ENTROPY):
        # No gradient where p was moved away from an end.
        grad = tl.where((par >= EPS) & (par <= 1.0 - EPS), grad, 0.0)
    tile.store(grad_given, start, grad, i, inside, COUNT, COUNT, WHOLE)


@triton.jit(do_not_specialize=["total", "rows"])
def backward_kernel(
    grad_score, grad_entropy, given, value, grad_given, grad_scored, used,
    total, rows, given_row, given_column, value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, GIVEN: tl.constexpr, VALUE: tl.constexpr,
    FROM_PROBS: tl.constexpr, EPS: tl.constexpr, RANDOM: tl.constexpr, STORED: tl.constexpr,
    BY_SCORE: tl.constexpr, BY_ENTROPY: tl.constexpr, TO_VALUE: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Gradients of COUNT elements; a value is loaded (STORED), drawn anew (RANDOM) or the mode."""
    start = tl.program_id(0).to(tl.int64) * COUNT
    if start + COUNT <= total:
        _backward_tile(
            grad_score, grad_entropy, given, value, grad_given, grad_scored,
            used, start, COUNT, rows,
            given_row, given_column, value_row, value_column,
            A, COUNT, GIVEN, VALUE, FROM_PROBS, EPS, RANDOM, STORED,
            BY_SCORE, BY_ENTROPY, TO_VALUE, FAST, True,
        )  # fmt: skip
    else:
        _backward_tile(
            grad_score, grad_entropy, given, value, grad_given, grad_scored,
            used, start, (total - start).to(tl.int32), rows,
            given_row, given_column, value_row, value_column,
            A, COUNT, GIVEN, VALUE, FROM_PROBS, EPS, RANDOM, STORED,
            BY_SCORE, BY_ENTROPY, TO_VALUE, FAST, False,
        )  # fmt: skip


def most_registers(grid: Grid, entropy: bool, keep: bool) -> int | None:
    """The most registers of a draw on NVIDIA's GPUs, None for the assembler's own choice.

    That is 80 on sm_100 for logits in bf16 at A = 8 with the entropy and what a gradient needs, and
    8 bytes of stack; told 128 it takes 96, and none. And 64 on sm_80 for draws without a score in
    programs of 8 warps, at A = 257 in fp32, with as many.
    """
    if grid.wide:
        return None
    if entropy and keep:
        return 128
    return 96 if grid.warps == LARGER[1] else None


def draw(
    given: Tensor,  # [*batch, *event]
    from_probs: bool,
    shape: torch.Size,
    ndims: int,
    *,
    state: State | None,
    score: bool = True,
    entropy: bool = False,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """A value, its score, the entropy and the state that was used, in one launch.

    Args:
        given: logits or probabilities.
        from_probs: whether they are probabilities.
        shape: sample dimensions in front of the value.
        ndims: number of event dimensions, summed over.
        state: where the noise comes from; None for the mode.
        score: whether the log-probability is wanted.
        entropy: whether the entropy is wanted.
        keep: whether the backward pass needs the state.

    Returns:
        value `[*sample, *batch, *event]`, log-probability `[*sample, *batch]`, entropy `[*batch]`,
        and an int64 pair; None for what was not wanted.
    """
    full = shape + given.shape
    batch = given.shape[: given.dim() - ndims]
    a = event_numel(given.shape, ndims)
    value = torch.empty(full, dtype=given.dtype, device=given.device)
    scores = torch.empty(shape + batch, dtype=given.dtype, device=given.device) if score else None
    entropies = torch.empty(batch, dtype=given.dtype, device=given.device) if entropy else None
    used = torch.empty(2, dtype=torch.int64, device=given.device) if keep and state else None
    total = value.numel()
    if total == 0:
        for sums in (scores, entropies):
            if sums is not None:
                sums.zero_()
        return value, scores, entropies, used if used is None else used.zero_()
    par = parameter(given, ndims, bool(shape))
    source = state or NO_STATE
    grid = forward_grid(total // a, a, vector_of(given.dtype))
    registers = most_registers(grid, entropy, keep)
    with launching(given):
        draw_kernel[(grid.programs,)](
            par.tensor, value, scores, entropies,
            source.pair, used, source.ticket, source.seed, source.call,
            total // a, given.numel() // a, par.row, par.column,
            A=a, COUNT=grid.count, TILE=grid.tile, ROWS=grid.rows, OWN=grid.own,
            GATHER=grid.gather, WIDE=grid.wide, GIVEN=par.layout, FROM_PROBS=from_probs,
            EPS=torch.finfo(given.dtype).eps, RANDOM=state is not None, SCORE=score,
            ENTROPY=entropy, HOST=source.pair is None, ADVANCE=source.ticket is not None,
            KEEP=used is not None, FAST=fast(given), num_warps=grid.warps,
            **limited(given, registers),
        )  # fmt: skip
    return value, scores, entropies, used


def score(
    given: Tensor,  # [*batch, *event]
    from_probs: bool,
    value: Tensor | None,  # [*sample, *batch, *event], of any dtype
    ndims: int,
    *,
    entropy: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """The log-probability of a given value and the entropy, in one launch.

    Args:
        given: logits or probabilities.
        from_probs: whether they are probabilities.
        value: zeros and ones to score; None for the entropy alone.
        ndims: number of event dimensions, summed over.
        entropy: whether the entropy is wanted.

    Returns:
        log-probability `[*sample, *batch]` and entropy `[*batch]`, in the dtype of `given`.
    """
    shape = torch.Size() if value is None else value.shape[: value.dim() - given.dim()]
    batch = given.shape[: given.dim() - ndims]
    a = event_numel(given.shape, ndims)
    made = [
        torch.empty(size, dtype=given.dtype, device=given.device) if wanted else None
        for size, wanted in ((shape + batch, value is not None), (batch, entropy))
    ]
    scores, entropies = made
    rows = given.numel() // a if a else 0
    total_rows = rows * shape.numel()
    if total_rows == 0:
        for sums in made:
            if sums is not None:
                sums.zero_()
        return scores, entropies
    par = parameter(given, ndims, bool(shape))
    scored = par if value is None else parameter(value, ndims, False)
    grid = forward_grid(total_rows, a, vector_of(given.dtype, scored.tensor.dtype))
    with launching(given):
        score_kernel[(grid.programs,)](
            par.tensor, scored.tensor, scores, entropies, total_rows, rows,
            par.row, par.column, scored.row, scored.column,
            A=a, COUNT=grid.count, TILE=grid.tile, ROWS=grid.rows, OWN=grid.own,
            GATHER=grid.gather, WIDE=grid.wide, GIVEN=par.layout, VALUE=scored.layout,
            FROM_PROBS=from_probs, EPS=torch.finfo(given.dtype).eps, SCORE=value is not None,
            ENTROPY=entropy, FAST=fast(given), num_warps=grid.warps,
        )  # fmt: skip
    return scores, entropies


def draw_backward(
    grad_score: Tensor | None,  # [*sample, *batch]
    grad_entropy: Tensor | None,  # [*batch]
    given: Tensor,  # [*batch, *event]
    from_probs: bool,
    used: Tensor | None,
    shape: torch.Size,
    ndims: int,
) -> Tensor:
    """The gradient of `draw` by `given`, `[*batch, *event]`.

    Args:
        grad_score: gradient of the log-probability, None for none.
        grad_entropy: gradient of the entropy, None for none.
        given: as in `draw`.
        from_probs: as in `draw`.
        used: what `draw` has kept, from which the values are drawn anew; None for the mode.
        shape: as in `draw`.
        ndims: as in `draw`.
    """
    return _backward(grad_score, grad_entropy, given, from_probs, None, used, shape, ndims, False)[
        0
    ]


def score_backward(
    grad_score: Tensor | None,  # [*sample, *batch]
    grad_entropy: Tensor | None,  # [*batch]
    given: Tensor,  # [*batch, *event]
    from_probs: bool,
    value: Tensor | None,  # [*sample, *batch, *event]
    ndims: int,
    *,
    to_value: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of `score` by `given` and the value, of the shapes of these.

    Args:
        grad_score: gradient of the log-probability, None for none.
        grad_entropy: gradient of the entropy, None for none.
        given: as in `score`.
        from_probs: as in `score`.
        value: as in `score`.
        ndims: as in `score`.
        to_value: whether the gradient of the value is wanted; needs that of the score.
    """
    full = given.shape if value is None else value.shape
    shape = full[: len(full) - given.dim()]
    return _backward(
        grad_score, grad_entropy, given, from_probs, value, None, shape, ndims, to_value
    )


def _backward(
    grad_score, grad_entropy, given, from_probs, value, used, shape, ndims, to_value
):  # fmt: skip
    full = shape + given.shape
    a = event_numel(given.shape, ndims)
    grad_given = gradients(shape, given)
    grad_scored = None
    if to_value:
        # The entropy does not depend on the value.
        make = torch.zeros if grad_score is None else torch.empty
        grad_scored = make(full, dtype=value.dtype, device=given.device)
        to_value = grad_score is not None
    total = grad_given.numel()
    if total == 0:
        return torch.zeros_like(given), grad_scored
    par = parameter(given, ndims, bool(shape))
    scored = par if value is None else parameter(value, ndims, False)
    programs, count, warps = flat_grid(total)
    with launching(given):
        backward_kernel[(programs,)](
            tail(grad_score), tail(grad_entropy), par.tensor, scored.tensor,
            grad_given, grad_scored, used, total, given.numel() // a,
            par.row, par.column, scored.row, scored.column,
            A=a, COUNT=count, GIVEN=par.layout, VALUE=scored.layout,
            FROM_PROBS=from_probs, EPS=torch.finfo(given.dtype).eps, RANDOM=used is not None,
            STORED=value is not None, BY_SCORE=grad_score is not None,
            BY_ENTROPY=grad_entropy is not None, TO_VALUE=to_value, FAST=fast(given),
            num_warps=warps,
        )  # fmt: skip
    return fold(grad_given, given), grad_scored
