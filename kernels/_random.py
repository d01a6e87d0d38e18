"""Counter-based random numbers: Philox4x32-10, and what is made of its words.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". Key: the 64-bit seed.
Counter: (group, group >> 32, call, call >> 32). Element e of an output belongs to group e // 4; the
four words of a group make four normals (words 0 and 1 the first two, words 2 and 3 the other two)
or four uniforms. `fastprob.reference.philox` computes the same integers.

All four words and both outputs of Box-Muller are used: 80 issue slots an element become 35 at
A = 8. The product of two 32-bit words is one 64-bit multiplication, of which both halves are used.
"""

import triton
import triton.language as tl

from fastprob.kernels import _math as m


@triton.jit
def philox(seed, call, group):
    """The four words of each group.

    Args:
        seed: int64 scalar, the key.
        call: int64 scalar, the number of the draw.
        group: int64 tensor.

    Returns:
        four uint32 tensors of the shape of `group`.
    """
    k0 = seed.to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    c0 = group.to(tl.uint32)
    c1 = (group >> 32).to(tl.uint32)
    zero = c0 * 0
    c2 = zero + call.to(tl.uint32)
    c3 = zero + (call >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def box_muller(a, b, FAST: tl.constexpr):
    """Two standard normals of two words, up to 6.66 in size.

    The radius is of u = (a + 1) / 2^32 in (0, 1]; the angle is of the signed word, so that it lies
    in [-pi, pi), where the approximate sine is accurate. The absolute value is for a lg2 that
    rounds to just above 0 near u = 1, which would make a NaN.
    """
    # The product is exact, so that one instruction rounds as a sum and a product would.
    u = a.to(tl.float32) * 2.3283064365386963e-10 + 2.3283064365386963e-10
    radius = m.sqrt_of_size(m.log2(u, FAST) * -1.3862943611198906, FAST)
    angle = b.to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09
    return radius * m.cos(angle, FAST), radius * m.sin(angle, FAST)


@triton.jit
def unit(word):
    """Uniforms in (0, 1), the middles of 2^23 equal steps.

    23 bits: with the half that is added fp32 holds them exactly, so that 1 is never reached.
    """
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def spread(w0, w1, w2, w3, COUNT: tl.constexpr):
    """The values of `COUNT / 4` groups as `COUNT` elements in their order."""
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [COUNT])


@triton.jit
def normals(seed, call, first, COUNT: tl.constexpr, FAST: tl.constexpr):
    """Standard normals for the elements `first .. first + COUNT - 1`; `first` a multiple of 4."""
    group = first // 4 + tl.arange(0, COUNT // 4)
    a, b, c, d = philox(seed, call, group)
    z0, z1 = box_muller(a, b, FAST)
    z2, z3 = box_muller(c, d, FAST)
    return spread(z0, z1, z2, z3, COUNT)


@triton.jit
def steps(seed, call, first, COUNT: tl.constexpr):
    """The numbers of the steps that `uniforms` take the middles of, 0 to 2^23 - 1, in fp32."""
    group = first // 4 + tl.arange(0, COUNT // 4)
    a, b, c, d = philox(seed, call, group)
    step = spread(a >> 9, b >> 9, c >> 9, d >> 9, COUNT)
    return step.to(tl.int32, bitcast=True).to(tl.float32)


@triton.jit
def uniforms(seed, call, first, COUNT: tl.constexpr):
    """Uniforms in (0, 1) for the elements `first .. first + COUNT - 1`; `first` a multiple of 4."""
    group = first // 4 + tl.arange(0, COUNT // 4)
    a, b, c, d = philox(seed, call, group)
    return spread(unit(a), unit(b), unit(c), unit(d), COUNT)


@triton.jit
def open_state(state, seed, call, HOST: tl.constexpr):
    """Seed and number of the draw: from two scalars, or from an int64 pair on the device."""
    if HOST:
        return seed.to(tl.int64), call.to(tl.int64)
    else:
        return tl.load(state), tl.load(state + 1)


@triton.jit
def close_state(state, used, ticket, seed, call, ADVANCE: tl.constexpr, KEEP: tl.constexpr):
    """Ends a draw: keeps what it has used, and advances the state for the next one.

    The state is advanced by the last program to arrive, when all others have read it, which a
    ticket tells; it returns to 0. So a captured graph draws afresh at each replay with no work on
    the host.

    Args:
        state: int64 pair.
        used: int64 pair that gets what this draw has used, for the backward pass.
        ticket: int32, 0 between draws.
        seed: what `open_state` has given.
        call: likewise.
        ADVANCE: whether the state is advanced.
        KEEP: whether `used` is written.
    """
    # Two tests: the first is settled when the kernel is compiled.
    if KEEP:  # noqa: SIM102
        if tl.program_id(0) == 0:
            tl.store(used, seed)
            tl.store(used + 1, call)
    if ADVANCE:
        # Every warp of the program has read the state before one of them takes the ticket.
        tl.debug_barrier()
        last = tl.num_programs(0) - 1
        if tl.atomic_add(ticket, 1, sem="acq_rel") == last:
            tl.store(state + 1, call + 1)
            tl.store(ticket, 0)
