"""The kernel that draws values of a TruncatedNormal, scores them and gives entropies."""

import triton
import triton.language as tl

from fastprob.kernels import _halves as halves
from fastprob.kernels import _math as m
from fastprob.kernels import _random as random
from fastprob.kernels import _tile as tile
from fastprob.kernels import _truncated_normal_parts as tn

# How a value is chosen.
RANDOM, MEDIAN, MEAN, MODE = range(4)
_RANDOM, _MEDIAN, _MEAN, _MODE = (tl.constexpr(kind) for kind in range(4))


@triton.jit
def _outer_drawn(
    a, w, step, COUNT: tl.constexpr, KIND: tl.constexpr, ENTROPY: tl.constexpr, FAST: tl.constexpr
):
    """The u of outer elements, their mass in units of the density at a, and E[u (u + 2 a)].

    One element of a thread after the other: these formulas take the most registers of all.
    """
    PART: tl.constexpr = COUNT // 4
    a0, a1, a2, a3 = halves.quarters(a, COUNT)
    w0, w1, w2, w3 = halves.quarters(w, COUNT)
    step0, step1, step2, step3 = halves.quarters(step, COUNT, KIND == _RANDOM)
    u0, u1, u2, u3 = a0, a1, a2, a3
    mass0, mass1, mass2, mass3 = a0, a1, a2, a3
    second0, second1, second2, second3 = a0, a1, a2, a3
    for _ in range(4):
        p, q = tn.probability(step0, PART, KIND == _RANDOM)
        k_a, h_a, k_b, r, rest = tn.outer(a0, w0, FAST)
        mean = k_a
        second = k_a
        if KIND == _MEAN or ENTROPY:
            mean, second = tn.outer_moments(a0, w0, k_a, k_b, r, rest, FAST)
        if KIND == _MODE:
            u = tl.maximum(-a0, 0.0)
        elif KIND == _MEAN:
            u = mean
        else:
            u = tn.outer_quantile(p, q, a0, w0, k_a, h_a, r, rest, FAST)
        mass = rest * m.reciprocal(h_a, FAST) * tn.OVER_ROOT_TWO_PI
        u0, u1, u2, u3 = u1, u2, u3, u
        mass0, mass1, mass2, mass3 = mass1, mass2, mass3, mass
        if ENTROPY:
            second0, second1, second2, second3 = second1, second2, second3, second
        a0, a1, a2, a3 = a1, a2, a3, a0
        w0, w1, w2, w3 = w1, w2, w3, w0
        if KIND == _RANDOM:
            step0, step1, step2, step3 = step1, step2, step3, step0
    all_u = halves.joined_quarters(u0, u1, u2, u3, COUNT)
    all_mass = halves.joined_quarters(mass0, mass1, mass2, mass3, COUNT)
    if ENTROPY:
        return all_u, all_mass, halves.joined_quarters(second0, second1, second2, second3, COUNT)
    else:
        return all_u, all_mass, all_mass


@triton.jit
def _drawn(
    mu, sigma, least, most, step,
    COUNT: tl.constexpr, KIND: tl.constexpr, SCORE: tl.constexpr, ENTROPY: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Values, the terms of minus their scores, and those of entropies, of COUNT elements."""
    a, b, flip, outer = tn.standardize(mu, sigma, least, most, FAST)
    step = tn.mirrored(step, flip, KIND == _RANDOM)
    p, q = tn.probability(step, COUNT, KIND == _RANDOM)
    density_a, density_b, below, above, mass = tn.masses(a, b, FAST)
    if KIND == _MODE:
        z = tl.maximum(a, 0.0)
    elif KIND == _MEAN:
        z = (density_a - density_b) * tn.over_mass(mass, FAST)
    else:
        z = tn.central_quantile(p, q, below, above, mass, FAST)
    x = mu + tl.where(flip, -z, z) * sigma
    energy = z * z * 0.5
    second = energy
    if ENTROPY:
        second = 1.0 + (a * density_a - b * density_b) * tn.over_mass(mass, FAST)
    if tl.max(outer.to(tl.int32), 0) > 0:
        a, w = tn.outer_interval(a, sigma, least, most, outer, FAST)
        u, outer_mass, outer_second = _outer_drawn(a, w, step, COUNT, KIND, ENTROPY, FAST)
        x = tl.where(outer, tl.where(flip, most - u * sigma, least + u * sigma), x)
        energy = tl.where(outer, u * (a + 0.5 * u), energy)
        mass = tl.where(outer, outer_mass, mass)
        if ENTROPY:
            second = tl.where(outer, outer_second, second)
    x = tile.clamp(x, least, most)
    terms = energy
    if SCORE or ENTROPY:
        log_size = m.log2(sigma * mass, FAST) * m.LN2 + m.HALF_LOG_2PI
        terms = log_size + 0.5 * second
        energy += log_size
    return x, energy, terms


@triton.jit
def _draw_tile(
    loc, scale, low, high, value, lo, hi, clamp_low, clamp_high, clamp_lo, clamp_hi,
    seed, call, start, read, kept, rows, loc_row, loc_column, scale_row, scale_column,
    low_row, low_column, high_row, high_column,
    A: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, LOC: tl.constexpr,
    SCALE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, KIND: tl.constexpr,
    SCORE: tl.constexpr, ENTROPY: tl.constexpr, CLAMP: tl.constexpr, FAST: tl.constexpr,
    CUT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Writes the values of one tile; gives minus their scores, and entropies.

    Of a tile that is not WHOLE the first `read` elements are drawn; `kept` are stored.
    """
    SIZE: tl.constexpr = COUNT // 2 if CUT else COUNT
    TURNS: tl.constexpr = 2 if CUT else 1
    UNIT: tl.constexpr = tile.vector(value.dtype.element_ty.primitive_bitwidth)
    i = tl.arange(0, COUNT)
    inside = i < read
    stored = i < kept
    mu = tn.raw(loc, start, i, inside, 0.0, rows, loc_row, loc_column, A, COUNT, LOC, WHOLE)
    sigma = tn.raw(
        scale, start, i, inside, 1.0, rows, scale_row, scale_column, A, COUNT, SCALE, WHOLE
    )
    least = tn.raw(low, start, i, inside, -1.0, rows, low_row, low_column, A, COUNT, LOW, WHOLE)
    most = tn.raw(high, start, i, inside, 1.0, rows, high_row, high_column, A, COUNT, HIGH, WHOLE)
    step0, step1 = 0, 0
    if KIND == _RANDOM:
        step0, step1 = tn.steps(seed, call, start, COUNT, CUT)
    mu0, mu1 = halves.cut(mu, COUNT, CUT)
    sigma0, sigma1 = halves.cut(sigma, COUNT, CUT)
    least0, least1 = halves.cut(least, COUNT, CUT, LOW >= 0)
    most0, most1 = halves.cut(most, COUNT, CUT, HIGH >= 0)
    x0, x1 = mu0, mu1
    energy0, energy1 = tl.zeros([SIZE], tl.float32), tl.zeros([SIZE], tl.float32)
    terms0, terms1 = tl.zeros([SIZE], tl.float32), tl.zeros([SIZE], tl.float32)
    for _ in range(TURNS):
        below, above = tn.interval(least0, most0, low, high, lo, hi, COUNT, LOW, CUT)
        x, energy, terms = _drawn(
            halves.widened(mu0, loc, COUNT, CUT), halves.widened(sigma0, scale, COUNT, CUT),
            below, above, step0, SIZE, KIND, SCORE, ENTROPY, FAST,
        )  # fmt: skip
        x0, x1 = x1, halves.packed(x, value, COUNT, CUT)
        energy0, energy1 = energy1, energy
        terms0, terms1 = terms1, terms
        mu0, sigma0, least0, most0, step0 = mu1, sigma1, least1, most1, step1
    drawn = halves.joined(x0, x1, value, COUNT, CUT)
    if CLAMP:
        # Behind the loop, which they need not wait through. Rounded before and after, a value is
        # what it would be rounded once: rounding keeps the order.
        bottom, top = tile.bounds(
            clamp_low, clamp_high, clamp_lo, clamp_hi, start, i, A, COUNT, CLAMP
        )
        drawn = tile.clamp(drawn.to(tl.float32), bottom, top)
    tile.store(value, start, drawn, i, stored, COUNT, TILE, WHOLE and TILE % UNIT == 0)
    energies = halves.joined_terms(energy0, energy1, COUNT, CUT)
    entropies = halves.joined_terms(terms0, terms1, COUNT, CUT)
    return energies, entropies


@triton.jit
def _draw_rows(
    loc, scale, low, high, value, score, entropy, lo, hi, clamp_low, clamp_high, clamp_lo, clamp_hi,
    seed, call, program, total_rows, rows, loc_row, loc_column, scale_row, scale_column,
    low_row, low_column, high_row, high_column,
    A: tl.constexpr, COUNT: tl.constexpr, OWN: tl.constexpr, LOC: tl.constexpr,
    SCALE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, KIND: tl.constexpr,
    SCORE: tl.constexpr, ENTROPY: tl.constexpr, CLAMP: tl.constexpr, FAST: tl.constexpr,
    CUT: tl.constexpr, UNIT: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """OWN wide rows chunk by chunk; UNIT and LAST as of `_tile.wide_rows`."""
    start, skip, last, read, kept = tile.wide_rows(program, total_rows, A, OWN, UNIT, LAST)
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
        energy, terms = _draw_tile(
            loc, scale, low, high, value, lo, hi, clamp_low, clamp_high, clamp_lo, clamp_hi,
            seed, call, start + chunk, read - chunk, kept - chunk, rows,
            loc_row, loc_column, scale_row, scale_column,
            low_row, low_column, high_row, high_column,
            A, COUNT, COUNT, LOC, SCALE, LOW, HIGH, KIND, SCORE, ENTROPY, CLAMP, FAST, CUT,
            A % COUNT == 0,
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


@triton.jit(do_not_specialize=["seed", "call", "total_rows", "rows"])
def draw_kernel(
    loc, scale, low, high, value, score, entropy, lo, hi,
    clamp_low, clamp_high, clamp_lo, clamp_hi, state, used, ticket, seed, call, total_rows, rows,
    loc_row, loc_column, scale_row, scale_column, low_row, low_column, high_row, high_column,
    A: tl.constexpr, COUNT: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    OWN: tl.constexpr, GATHER: tl.constexpr, WIDE: tl.constexpr, LOC: tl.constexpr,
    SCALE: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, KIND: tl.constexpr,
    SCORE: tl.constexpr, ENTROPY: tl.constexpr, CLAMP: tl.constexpr, HOST: tl.constexpr,
    ADVANCE: tl.constexpr, KEEP: tl.constexpr, FAST: tl.constexpr,
    CUT: tl.constexpr,
):  # fmt: skip
    """Values, scores and entropies of OWN rows; chunk by chunk where WIDE."""
    program = tl.program_id(0).to(tl.int64)
    if KIND == _RANDOM:
        seed, call = random.open_state(state, seed, call, HOST)
    UNIT: tl.constexpr = tile.vector(value.dtype.element_ty.primitive_bitwidth)
    if WIDE:
        if A % UNIT == 0 or (program + 1) * OWN < total_rows:
            _draw_rows(
                loc, scale, low, high, value, score, entropy, lo, hi,
                clamp_low, clamp_high, clamp_lo, clamp_hi, seed, call, program, total_rows, rows,
                loc_row, loc_column, scale_row, scale_column,
                low_row, low_column, high_row, high_column,
                A, COUNT, OWN, LOC, SCALE, LOW, HIGH, KIND, SCORE, ENTROPY, CLAMP, FAST, CUT,
                UNIT, False,
            )  # fmt: skip
        else:
            _draw_rows(
                loc, scale, low, high, value, score, entropy, lo, hi,
                clamp_low, clamp_high, clamp_lo, clamp_hi, seed, call, program, total_rows, rows,
                loc_row, loc_column, scale_row, scale_column,
                low_row, low_column, high_row, high_column,
                A, COUNT, OWN, LOC, SCALE, LOW, HIGH, KIND, SCORE, ENTROPY, CLAMP, FAST, CUT,
                UNIT, True,
            )  # fmt: skip
    else:
        start, lead = tile.begin(program, TILE, UNIT)
        end = total_rows.to(tl.int64) * A
        if start + COUNT <= end:
            energy, terms = _draw_tile(
                loc, scale, low, high, value, lo, hi, clamp_low, clamp_high, clamp_lo, clamp_hi,
                seed, call, start, COUNT, tile.kept(lead, TILE, COUNT, UNIT), rows,
                loc_row, loc_column, scale_row, scale_column,
                low_row, low_column, high_row, high_column,
                A, COUNT, TILE, LOC, SCALE, LOW, HIGH, KIND, SCORE, ENTROPY, CLAMP, FAST,
                CUT, True,
            )  # fmt: skip
            tn.store_sums(
                score, entropy, energy, terms, program * OWN, total_rows, rows, lead,
                A, COUNT, ROWS, OWN, GATHER, SCORE, ENTROPY, True,
            )  # fmt: skip
        else:
            left = tl.minimum(end - start, lead + TILE).to(tl.int32)
            energy, terms = _draw_tile(
                loc, scale, low, high, value, lo, hi, clamp_low, clamp_high, clamp_lo, clamp_hi,
                seed, call, start, left, left, rows,
                loc_row, loc_column, scale_row, scale_column,
                low_row, low_column, high_row, high_column,
                A, COUNT, TILE, LOC, SCALE, LOW, HIGH, KIND, SCORE, ENTROPY, CLAMP, FAST,
                CUT, False,
            )  # fmt: skip
            tn.store_sums(
                score, entropy, energy, terms, program * OWN, total_rows, rows, lead,
                A, COUNT, ROWS, OWN, GATHER, SCORE, ENTROPY, False,
            )  # fmt: skip
    if KIND == _RANDOM:
        random.close_state(state, used, ticket, seed, call, ADVANCE, KEEP)
