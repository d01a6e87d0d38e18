"""The kernel of scores of given values of a TruncatedNormal, and of entropies."""

import triton
import triton.language as tl

from fastprob.kernels import _halves as halves
from fastprob.kernels import _math as m
from fastprob.kernels import _tile as tile
from fastprob.kernels import _truncated_normal_parts as tn


@triton.jit
def _scored(
    mu, sigma, x, least, most, SCORE: tl.constexpr, ENTROPY: tl.constexpr, FAST: tl.constexpr
):
    """The terms of minus the scores of x, and of entropies."""
    a, b, flip, outer = tn.standardize(mu, sigma, least, most, FAST)
    density_a, density_b, _, _, mass = tn.masses(a, b, FAST)
    energy = mass
    second = mass
    if SCORE:
        z = m.divide(x - mu, sigma, FAST)
        energy = z * z * 0.5
    if ENTROPY:
        second = 1.0 + (a * density_a - b * density_b) * tn.over_mass(mass, FAST)
    if tl.max(outer.to(tl.int32), 0) > 0:
        a, w = tn.outer_interval(a, sigma, least, most, outer, FAST)
        k_a, h_a, k_b, r, rest = tn.outer(a, w, FAST)
        outer_mass = rest * m.reciprocal(h_a, FAST) * tn.OVER_ROOT_TWO_PI
        mass = tl.where(outer, outer_mass, mass)
        if SCORE:
            u = m.divide(tl.where(flip, most - x, x - least), sigma, FAST)
            energy = tl.where(outer, u * (a + 0.5 * u), energy)
        if ENTROPY:
            _, outer_second = tn.outer_moments(a, w, k_a, k_b, r, rest, FAST)
            second = tl.where(outer, outer_second, second)
    log_size = m.log2(sigma * mass, FAST) * m.LN2 + m.HALF_LOG_2PI
    if SCORE:
        energy = tl.where((x < least) | (x > most), float("inf"), energy + log_size)
    return energy, log_size + 0.5 * second


@triton.jit
def _score_tile(
    loc, scale, low, high, value, lo, hi, start, left, rows,
    loc_row, loc_column, scale_row, scale_column, low_row, low_column, high_row, high_column,
    value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, LOC: tl.constexpr, SCALE: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, VALUE: tl.constexpr, SCORE: tl.constexpr,
    ENTROPY: tl.constexpr, FAST: tl.constexpr, CUT: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = COUNT // 2 if CUT else COUNT
    TURNS: tl.constexpr = 2 if CUT else 1
    i = tl.arange(0, COUNT)
    inside = i < left
    mu = tn.raw(loc, start, i, inside, 0.0, rows, loc_row, loc_column, A, COUNT, LOC, WHOLE)
    sigma = tn.raw(
        scale, start, i, inside, 1.0, rows, scale_row, scale_column, A, COUNT, SCALE, WHOLE
    )
    least = tn.raw(low, start, i, inside, -1.0, rows, low_row, low_column, A, COUNT, LOW, WHOLE)
    most = tn.raw(high, start, i, inside, 1.0, rows, high_row, high_column, A, COUNT, HIGH, WHOLE)
    x = 0.0
    if SCORE:
        x = tn.raw(
            value, start, i, inside, 0.0, rows, value_row, value_column, A, COUNT, VALUE, WHOLE
        )
    mu0, mu1 = halves.cut(mu, COUNT, CUT)
    sigma0, sigma1 = halves.cut(sigma, COUNT, CUT)
    least0, least1 = halves.cut(least, COUNT, CUT, LOW >= 0)
    most0, most1 = halves.cut(most, COUNT, CUT, HIGH >= 0)
    x0, x1 = halves.cut(x, COUNT, CUT, SCORE)
    energy0, energy1 = tl.zeros([SIZE], tl.float32), tl.zeros([SIZE], tl.float32)
    terms0, terms1 = tl.zeros([SIZE], tl.float32), tl.zeros([SIZE], tl.float32)
    for _ in range(TURNS):
        below, above = tn.interval(least0, most0, low, high, lo, hi, COUNT, LOW, CUT)
        energy, terms = _scored(
            halves.widened(mu0, loc, COUNT, CUT), halves.widened(sigma0, scale, COUNT, CUT),
            halves.widened(x0, value, COUNT, CUT, SCORE), below, above, SCORE, ENTROPY, FAST,
        )  # fmt: skip
        energy0, energy1 = energy1, energy
        terms0, terms1 = terms1, terms
        mu0, sigma0, least0, most0, x0 = mu1, sigma1, least1, most1, x1
    energies = halves.joined_terms(energy0, energy1, COUNT, CUT)
    entropies = halves.joined_terms(terms0, terms1, COUNT, CUT)
    return energies, entropies


@triton.jit
def _score_rows(
    loc, scale, low, high, value, score, entropy, lo, hi, program, total_rows, rows,
    loc_row, loc_column, scale_row, scale_column, low_row, low_column, high_row, high_column,
    value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, OWN: tl.constexpr, LOC: tl.constexpr,
    SCALE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, VALUE: tl.constexpr,
    SCORE: tl.constexpr, ENTROPY: tl.constexpr, FAST: tl.constexpr, CUT: tl.constexpr,
    UNIT: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """OWN wide rows chunk by chunk; UNIT and LAST as of `_tile.wide_rows`."""
    start, skip, last, read, _ = tile.wide_rows(program, total_rows, A, OWN, UNIT, LAST)
    # See `truncated_normal.forward_form`; on AMD the sums take an exchange.
    EACH: tl.constexpr = tn.each(loc.dtype.element_ty.primitive_bitwidth, LOW, ENTROPY)
    THREADS: tl.constexpr = COUNT // EACH
    VECTOR: tl.constexpr = min(UNIT, EACH)
    i = tl.arange(0, COUNT)
    energies = tl.zeros([THREADS], tl.float32)
    entropies = tl.zeros([THREADS], tl.float32)
    row = program * OWN
    end = skip + A
    for chunk in range(0, last, COUNT):
        energy, terms = _score_tile(
            loc, scale, low, high, value, lo, hi, start + chunk, read - chunk, rows,
            loc_row, loc_column, scale_row, scale_column,
            low_row, low_column, high_row, high_column, value_row, value_column,
            A, COUNT, LOC, SCALE, LOW, HIGH, VALUE, SCORE, ENTROPY, FAST, CUT, A % COUNT == 0,
        )  # fmt: skip
        if chunk < skip:
            energy = tl.where(i < skip, 0.0, energy)
            terms = tl.where(i < skip, 0.0, terms)
        while end <= tl.minimum(chunk + COUNT, last):
            energies, energy = tile.ended(energies, energy, i, end - chunk, COUNT, THREADS, VECTOR)
            entropies, terms = tile.ended(entropies, terms, i, end - chunk, COUNT, THREADS, VECTOR)
            tn.store_sums(
                score, entropy, energies, entropies, row, total_rows, rows, 0,
                A, THREADS, 1, 1, False, SCORE, ENTROPY, True,
            )  # fmt: skip
            energies = tl.zeros([THREADS], tl.float32)
            entropies = tl.zeros([THREADS], tl.float32)
            row += 1
            end += A
        energies += tile.of_threads(energy, COUNT, THREADS, VECTOR)
        entropies += tile.of_threads(terms, COUNT, THREADS, VECTOR)


@triton.jit(do_not_specialize=["total_rows", "rows"])
def score_kernel(
    loc, scale, low, high, value, score, entropy, lo, hi, total_rows, rows,
    loc_row, loc_column, scale_row, scale_column, low_row, low_column, high_row, high_column,
    value_row, value_column,
    A: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    OWN: tl.constexpr, GATHER: tl.constexpr, WIDE: tl.constexpr, LOC: tl.constexpr,
    SCALE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, VALUE: tl.constexpr,
    SCORE: tl.constexpr, ENTROPY: tl.constexpr, FAST: tl.constexpr,
    CUT: tl.constexpr,
):  # fmt: skip
    """Scores of given values, and entropies, of OWN rows; chunk by chunk where WIDE."""
    program = tl.program_id(0).to(tl.int64)
    UNIT: tl.constexpr = tile.vector(
        loc.dtype.element_ty.primitive_bitwidth, value.dtype.element_ty.primitive_bitwidth
    )
    if WIDE:
        if A % UNIT == 0 or (program + 1) * OWN < total_rows:
            _score_rows(
                loc, scale, low, high, value, score, entropy, lo, hi, program, total_rows, rows,
                loc_row, loc_column, scale_row, scale_column,
                low_row, low_column, high_row, high_column, value_row, value_column,
                A, COUNT, OWN, LOC, SCALE, LOW, HIGH, VALUE, SCORE, ENTROPY, FAST, CUT, UNIT, False,
            )  # fmt: skip
        else:
            _score_rows(
                loc, scale, low, high, value, score, entropy, lo, hi, program, total_rows, rows,
                loc_row, loc_column, scale_row, scale_column,
                low_row, low_column, high_row, high_column, value_row, value_column,
                A, COUNT, OWN, LOC, SCALE, LOW, HIGH, VALUE, SCORE, ENTROPY, FAST, CUT, UNIT, True,
            )  # fmt: skip
    else:
        start, lead = tile.begin(program, TILE, UNIT)
        end = total_rows.to(tl.int64) * A
        if start + COUNT <= end:
            energy, terms = _score_tile(
                loc, scale, low, high, value, lo, hi, start, COUNT, rows,
                loc_row, loc_column, scale_row, scale_column,
                low_row, low_column, high_row, high_column, value_row, value_column,
                A, COUNT, LOC, SCALE, LOW, HIGH, VALUE, SCORE, ENTROPY, FAST, CUT, True,
            )  # fmt: skip
            tn.store_sums(
                score, entropy, energy, terms, program * OWN, total_rows, rows, lead,
                A, COUNT, ROWS, OWN, GATHER, SCORE, ENTROPY, True,
            )  # fmt: skip
        else:
            energy, terms = _score_tile(
                loc, scale, low, high, value, lo, hi, start,
                tl.minimum(end - start, lead + TILE).to(tl.int32), rows,
                loc_row, loc_column, scale_row, scale_column,
                low_row, low_column, high_row, high_column, value_row, value_column,
                A, COUNT, LOC, SCALE, LOW, HIGH, VALUE, SCORE, ENTROPY, FAST, CUT, False,
            )  # fmt: skip
            tn.store_sums(
                score, entropy, energy, terms, program * OWN, total_rows, rows, lead,
                A, COUNT, ROWS, OWN, GATHER, SCORE, ENTROPY, False,
            )  # fmt: skip
