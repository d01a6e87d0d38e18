"""The projections against TorchRL's ``project``, and what TorchRL's cannot do."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torchrl.data as rl

from fastprob import specs
from fastprob.ops import projection as ops
from fastprob.reference.projection import nearest_table
from fastprob.specs import projection_for

INF, NAN = float("inf"), float("nan")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LOW, HIGH = torch.tensor([-1.0, -2.0, 0.0]), torch.tensor([1.0, 0.5, 3.0])
MASK4 = torch.tensor([True, False, True, False])
MASK_ROWS = torch.tensor([[True, False, True, False], [False, False, False, True]])
MASK32 = torch.tensor([True, False, True, False, True])

# name: (spec's class, arguments, shape of one value)
CASES = {
    "bounded": ("Bounded", {"low": -1.0, "high": 1.0, "shape": (3,)}),
    "bounded_each": ("Bounded", {"low": LOW, "high": HIGH}),
    "bounded_rows": ("Bounded", {"low": LOW.expand(2, 3), "high": HIGH.expand(2, 3) + 1}),
    "bounded_scalar": ("Bounded", {"low": 0.1, "high": 0.7, "shape": ()}),
    "bounded_equal": ("Bounded", {"low": 0.5, "high": 0.5, "shape": (3,)}),
    "bounded_half_open": ("Bounded", {"low": -INF, "high": 1.0, "shape": (3,)}),
    "bounded_int": ("Bounded", {"low": -2, "high": 5, "shape": (3,), "dtype": torch.int64}),
    "unbounded": ("Unbounded", {"shape": (3,)}),
    "categorical": ("Categorical", {"n": 4}),
    "categorical_shape": ("Categorical", {"n": 4, "shape": (2,)}),
    "categorical_mask": ("Categorical", {"n": 4, "mask": MASK4}),
    "categorical_rows": ("Categorical", {"n": 4, "shape": (2,), "mask": MASK_ROWS}),
    "binary": ("Binary", {"n": 3}),
    "multi_categorical": ("MultiCategorical", {"nvec": (3, 2)}),
    "multi_categorical_rows": ("MultiCategorical", {"nvec": torch.tensor([[3, 2], [4, 5]])}),
    "multi_categorical_mask": ("MultiCategorical", {"nvec": (3, 2), "mask": MASK32}),
    "one_hot": ("OneHot", {"n": 4}),
    "one_hot_int": ("OneHot", {"n": 4, "dtype": torch.int64}),
    "one_hot_float": ("OneHot", {"n": 4, "dtype": torch.float32}),
    "one_hot_mask": ("OneHot", {"n": 4, "mask": MASK4}),
    "one_hot_rows": ("OneHot", {"n": 4, "shape": (2, 4), "mask": MASK_ROWS}),
    "multi_one_hot": ("MultiOneHot", {"nvec": (3, 2)}),
    "multi_one_hot_mask": ("MultiOneHot", {"nvec": (3, 2), "mask": MASK32}),
}
BATCHES = [(), (5,), (2, 3), (2, 1, 3), (0,)]


def build(case: str, library=specs):
    name, kwargs = CASES[case]
    return getattr(library, name)(**kwargs)


def valid(case: str, batch=()) -> torch.Tensor:
    if case == "bounded_half_open":  # nothing uniform to draw from
        return 1 - torch.rand(*batch, 3)
    return build(case).rand(batch)


def wild(case: str, batch=()) -> torch.Tensor:
    """A value of the right shape and type, mostly outside the spec."""
    spec = build(case)
    size = (*batch, *spec.shape)
    if spec.dtype is torch.bool:
        return torch.rand(size) < 0.5
    value = torch.randn(size) * 4
    if spec.dtype.is_floating_point and value.numel() > 3:
        value.view(-1)[:3] = torch.tensor([INF, -INF, 0.0])
    return value.to(spec.dtype)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


# --- parity with TorchRL ------------------------------------------------------------------------


@pytest.mark.parametrize("library", [specs, rl], ids=["fastprob", "torchrl"])
@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_valid_values_stay(case, batch, library):
    value = valid(case, batch)
    theirs = build(case, rl)
    assert theirs.is_in(value)
    ours = projection_for(build(case, library))(value)
    same(ours, theirs.project(value.clone()))
    same(ours, value)


# Where TorchRL draws at random, and so has no value to be equal to: one-hot rows and masks.
DETERMINISTIC = [case for case in CASES if "hot" not in case and "mask" not in case]
DETERMINISTIC.remove("categorical_rows")


@pytest.mark.parametrize("library", [specs, rl], ids=["fastprob", "torchrl"])
@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("case", DETERMINISTIC)
def test_invalid_values_go_where_torchrl_puts_them(case, batch, library):
    value = wild(case, batch)
    same(projection_for(build(case, library))(value), build(case, rl).project(value.clone()))


@pytest.mark.parametrize("spec_dtype", [*FLOATS, torch.int64, torch.uint8])
@pytest.mark.parametrize("value_dtype", [*FLOATS, torch.int64, torch.int8])
@pytest.mark.parametrize("each", [False, True])
def test_bounded_types_are_torchrls(value_dtype, spec_dtype, each):
    high = torch.tensor([1.0, 1.7, 2.0]) if each else torch.tensor([1.7, 1.7, 1.7])
    theirs = rl.Bounded(torch.full((3,), 0.3), high, dtype=spec_dtype)
    value = torch.tensor([[-2.0, 0.0, 2.0], [0.0, 1.0, 0.9]]).to(value_dtype)
    same(projection_for(theirs)(value), theirs.project(value))


@pytest.mark.parametrize("value_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_integer_bounds_beyond_the_range_of_the_value(value_dtype):
    theirs = rl.Bounded(-100_000, 100_000, (2,), dtype=torch.int64)
    value = torch.tensor([[INF, -INF], [1.0, -65504.0]]).to(value_dtype)
    same(projection_for(theirs)(value), theirs.project(value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spec_dtype", FLOATS)
def test_clamped_values_are_in_the_spec(spec_dtype, dtype):
    """0.1 and 0.7 have no exact form in any of the types."""
    spec = specs.Bounded(0.1, 0.7, (2,), dtype=spec_dtype)
    out = spec.project(torch.tensor([-3.0, 3.0], dtype=dtype))
    assert spec.is_in(out.to(spec_dtype))
    same(out.to(spec_dtype).to(out.dtype), out)


def test_bounded_keeps_nan():
    for theirs in (build("bounded", rl), build("bounded_each", rl)):
        value = torch.tensor([NAN, 7.0, 0.0])
        same(projection_for(theirs)(value), theirs.project(value))


@pytest.mark.parametrize("value_dtype", [*FLOATS, torch.int32, torch.int64, torch.int8])
@pytest.mark.parametrize("case", ["categorical", "binary", "multi_categorical", "unbounded"])
def test_other_types_go_where_torchrl_puts_them(case, value_dtype):
    spec = build(case, rl)
    value = (torch.randn(6, *spec.shape) * 3).to(value_dtype)
    value.view(-1)[0] = 100  # outside of each
    same(projection_for(spec)(value), spec.project(value.clone()))


def test_halves_are_rounded_to_even():
    value = torch.tensor([0.5, 1.5, 2.5, -0.5, 3.5])
    same(build("categorical").project(value), torch.tensor([0.0, 2.0, 2.0, 0.0, 3.0]))


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("high", [torch.tensor([True, True]), torch.tensor([True, False])])
def test_bool_bounds(low, high):
    spec = specs.Bounded(torch.tensor([low, False]), high, dtype=torch.bool)
    value = torch.tensor([[True, True], [False, False]])
    expected = torch.stack([value[:, 0] | low, value[:, 1] & high[1]], -1)
    same(spec.project(value), expected)
    assert spec.is_in(expected)
    same(spec.project(value.float() * 3), expected.float())


def test_uniform_bool_bounds():
    value = torch.tensor([True, False])
    same(specs.Bounded(False, True, (2,), dtype=torch.bool).project(value), value)
    same(specs.Bounded(True, True, (2,), dtype=torch.bool).project(value), ~value | value)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_bools_as_indices(n):
    value = torch.tensor([True, False])
    expected = value if n > 1 else torch.zeros_like(value)
    same(specs.Categorical(n).project(value), expected)
    same(specs.MultiCategorical((n, n)).project(value), expected.long())


def test_a_number_for_a_vector_of_length_one():
    spec = rl.MultiCategorical([3])
    for value in (torch.tensor(7), torch.tensor([7]), torch.tensor([[7], [-1]])):
        same(projection_for(spec)(value), spec.project(value.clone()))


def test_an_open_number_of_outcomes():
    value = torch.tensor([9, -1])
    same(projection_for(rl.Categorical(-1))(value), rl.Categorical(-1).project(value.clone()))


def test_an_open_size():
    spec = rl.Bounded(-1, 1, shape=(-1, 3), dtype=torch.float32)
    value = torch.randn(5, 3) * 3
    same(projection_for(spec)(value), value.clamp(-1, 1))
    assert specs.fits(spec, value.shape)


# --- the rules of fastprob's own ----------------------------------------------------------------


@pytest.mark.parametrize("library", [specs, rl], ids=["fastprob", "torchrl"])
@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_result_is_in_the_spec_and_a_fixed_point(case, batch, library):
    value = wild(case, batch)
    before = value.clone()
    spec = build(case, library)
    projection = projection_for(spec)
    out = projection(value)
    assert build(case).is_in(out)
    if "rows" not in case:  # TorchRL's is_in of a masked spec broadcasts its other way round
        assert spec.is_in(out)
    same(projection(out), out)
    same(value, before)
    same(out, projection(value))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", ["expanded", "transposed", "strided"])
def test_layouts(case, layout):
    value = wild(case, (4,))
    if layout == "expanded":
        value = value[:1].expand(4, *value.shape[1:])
    elif layout == "transposed":
        value = value.movedim(0, -1).contiguous().movedim(-1, 0)
    else:
        value = torch.stack([value, value], -1)[..., 0]
    projection = projection_for(build(case))
    same(projection(value), projection(value.contiguous()))


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_nearest_table(n):
    for bits in range(1, 2**n):
        mask = torch.tensor([bool(bits >> i & 1) for i in range(n)])
        allowed = mask.nonzero().flatten().tolist()
        expected = [min(allowed, key=lambda j, i=i: (abs(i - j), j)) for i in range(n)]
        assert nearest_table(mask).tolist() == expected


def test_masked_indices_go_to_the_nearest():
    spec = specs.Categorical(5, mask=[True, False, False, True, False])
    value = torch.tensor([0, 1, 2, 3, 4, -7, 99])
    same(spec.project(value), torch.tensor([0, 0, 3, 3, 3, 0, 3]))
    value = torch.tensor([1.4, 1.6, INF, -INF, NAN])
    same(spec.project(value), torch.tensor([0.0, 3.0, 3.0, 0.0, NAN]))
    same(spec.project(torch.tensor([True, False])), torch.tensor([False, False]))


def test_masked_rows_have_their_own_choice():
    value = torch.tensor([[1, 1], [3, 0], [0, 3]])
    same(build("categorical_rows").project(value), torch.tensor([[0, 3], [2, 3], [0, 3]]))


def test_masked_groups():
    value = torch.tensor([[1, 0], [2, 1], [9, -9]])
    same(build("multi_categorical_mask").project(value), torch.tensor([[0, 1], [2, 1], [2, 1]]))


def test_masked_groups_of_each_row():
    mask = torch.stack([MASK32, torch.tensor([False, True, False, True, False])])
    spec = specs.MultiCategorical((3, 2), (2, 2), mask=mask)
    value = torch.tensor([[1, 0], [2, 1]]).expand(4, 2, 2)
    same(spec.project(value)[0], torch.tensor([[0, 1], [1, 0]]))
    assert spec.is_in(spec.project(value))
    assert not spec.is_in(value)


def test_infinities_and_nan_in_an_integer_spec():
    value = torch.tensor([[INF, -INF], [NAN, INF]])
    same(build("multi_categorical").project(value), torch.tensor([[2, 0], [0, 1]]))
    spec = specs.MultiCategorical((300, 2))
    same(spec.project(torch.tensor([999.0, 0.0], dtype=torch.bfloat16)), torch.tensor([299, 0]))
    spec = specs.MultiCategorical((3, 2), dtype=torch.float32)
    same(spec.project(torch.tensor([NAN, 0.9])), torch.tensor([NAN, 1.0]))


@pytest.mark.parametrize(
    ("value", "index"),
    [
        ([0.0, 0.0, 0.0, 0.0], 0),
        ([0.1, 0.5, 0.5, 0.2], 1),
        ([-3.0, -2.0, -1.0, -1.0], 2),
        ([-INF, -INF, -INF, 0.0], 3),
        ([0, 1, 1, 0], 1),
        ([False, False, True, True], 2),
    ],
)
def test_one_hot_takes_the_first_largest(value, index):
    out = build("one_hot").project(torch.tensor(value))
    same(out, torch.arange(4) == index)


@pytest.mark.parametrize(
    ("value", "index"),
    [
        ([0.0, 9.0, 0.0, 0.0], 0),
        ([0.0, 9.0, 0.1, 0.0], 2),
        ([-INF, 9.0, -INF, 9.0], 0),
        ([0, 1, 0, 0], 0),
        ([1, 0, 1, 0], 0),
        ([-9, 0, -8, 0], 2),
        ([False, True, False, True], 0),
        ([False, True, True, True], 2),
        ([True, True, True, True], 0),
    ],
)
def test_masked_one_hot_takes_the_first_largest_valid(value, index):
    value = torch.tensor(value)
    out = build("one_hot_mask").project(value)
    same(out, (torch.arange(4) == index).to(value.dtype))


def test_masked_one_hot_of_unsigned_values():
    value = torch.tensor([[0, 255, 0, 0], [0, 1, 2, 255]], dtype=torch.uint8)
    expected = torch.tensor([[1, 0, 0, 0], [0, 0, 1, 0]], dtype=torch.uint8)
    same(build("one_hot_mask").project(value), expected)


def test_a_relaxed_row_is_left_alone_and_keeps_its_gradient():
    value = torch.tensor([[0.25, 0.25, 0.5, 0.0], [0.3, 0.3, 0.3, 0.3]], requires_grad=True)
    out = build("one_hot_float").project(value)
    same(out, torch.tensor([[0.25, 0.25, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0]]))
    out.sum().backward()
    same(value.grad, torch.tensor([[1.0] * 4, [0.0] * 4]))


def test_a_relaxed_row_with_mass_on_a_masked_entry_is_not():
    spec = specs.OneHot(4, dtype=torch.float32, mask=MASK4)
    value = torch.tensor([[0.5, 0.0, 0.5, 0.0], [0.4, 0.6, 0.0, 0.0]])
    same(spec.project(value), torch.tensor([[0.5, 0.0, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0]]))


# --- gradients, transforms, compilation ---------------------------------------------------------


@pytest.mark.parametrize("case", ["bounded", "bounded_each", "bounded_half_open"])
def test_the_clamp_stops_the_gradient_outside(case):
    spec = build(case, rl)
    value = torch.tensor([[-9.0, 0.2, 0.3], [9.0, -9.0, -9.0], [1.0, 0.5, 3.0]], requires_grad=True)
    grads = [
        torch.autograd.grad((project(value) * torch.arange(1.0, 4.0)).sum(), value)[0]
        for project in (projection_for(spec), spec.project)
    ]
    same(*grads)
    assert (grads[0] == 0).any() and (grads[0] != 0).any()


@pytest.mark.parametrize("case", ["bounded", "bounded_each"])
def test_gradcheck(case):
    projection = projection_for(build(case).to(torch.float64))
    value = torch.tensor([[-3.0, 0.2, 0.3], [3.0, -0.7, 4.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(projection, value.requires_grad_())


@pytest.mark.parametrize("case", CASES)
def test_vmap(case):
    value = wild(case, (4, 5))
    projection = projection_for(build(case, rl))
    same(torch.vmap(projection)(value), projection(value))
    same(torch.vmap(torch.vmap(projection))(value), projection(value))


@pytest.mark.parametrize("library", [specs, rl], ids=["fastprob", "torchrl"])
@pytest.mark.parametrize("case", CASES)
def test_compiles_without_a_break(case, library):
    torch.compiler.reset()
    value = wild(case, (5,))
    expected = projection_for(build(case))(value)
    projection = projection_for(build(case, library))  # never called in eager mode
    compiled = torch.compile(lambda v: projection(v), fullgraph=True, backend="aot_eager")
    same(compiled(value), expected)
    value = valid(case, (5,))
    same(compiled(value), value)
    with torch.inference_mode():
        same(compiled(value), value)


@pytest.mark.parametrize("case", ["bounded_each", "one_hot_float", "categorical_mask"])
def test_a_plan_made_in_inference_mode_serves_training(case):
    with torch.inference_mode():
        projection = projection_for(build(case))
        projection(valid(case))
    value = valid(case, (3,)).double().requires_grad_()
    out = projection(value)
    if out.requires_grad:
        out.sum().backward()
        assert value.grad is not None


@pytest.mark.parametrize("case", CASES)
def test_a_value_on_another_device(case):
    spec = build(case)
    projection = projection_for(spec)
    value = wild(case, (5,))
    out = projection(value.to("meta"))
    expected = projection(value)
    assert out.is_meta and out.shape == expected.shape and out.dtype is expected.dtype


def test_bounds_are_copied_to_a_device_once():
    projection = projection_for(build("bounded_each"))
    device = torch.device("meta")
    projection(torch.empty(3, device=device))
    first = projection._bounds[device]
    projection(torch.empty(3, device=device))
    assert all(a is b for a, b in zip(first, projection._bounds[device], strict=True))


@pytest.mark.parametrize("case", CASES)
def test_copies_and_pickles(case):
    projection = projection_for(build(case))
    value = wild(case, (3,))
    for twin in (copy.deepcopy(projection), pickle.loads(pickle.dumps(projection))):
        same(twin(value), projection(value))
    assert type(projection).__name__.strip("_") in repr(projection)


# --- what a plan is made of ---------------------------------------------------------------------


@pytest.mark.parametrize("library", [specs, rl], ids=["fastprob", "torchrl"])
def test_bounds_that_are_the_same_everywhere_become_numbers(library):
    projection = projection_for(library.Bounded(torch.full((2, 3), -1.0), torch.ones(2, 3)))
    assert isinstance(projection, ops.Clamp)
    assert (projection.low, projection.high) == (-1.0, 1.0)
    assert isinstance(projection_for(library.Bounded(LOW, torch.ones(3) * 3)), ops.ClampEach)


@pytest.mark.parametrize("library", [specs, rl], ids=["fastprob", "torchrl"])
def test_a_new_mask_is_seen(library):
    spec = library.Categorical(4)
    projection = projection_for(spec)
    value = torch.tensor([0, 1, 2, 3])
    same(projection(value), value)
    spec.update_mask(MASK4)
    same(projection(value), torch.tensor([0, 0, 2, 2]))
    spec.update_mask(~MASK4)
    same(projection(value), torch.tensor([1, 1, 1, 3]))
    spec.update_mask(None)
    same(projection(value), value)


class Half:
    """A spec of nobody's: ``project`` writes in place."""

    shape = torch.Size([])

    def project(self, value):
        return value.div_(2)


def test_an_unknown_spec_projects_itself_on_a_copy():
    value = torch.tensor([2.0, 4.0])
    same(projection_for(Half())(value), torch.tensor([1.0, 2.0]))
    same(value, torch.tensor([2.0, 4.0]))


class Shifted(rl.Binary):
    def _project(self, val):
        return torch.full_like(val, 1)


class Doubled(specs.Binary):
    def project(self, value):
        return value * 2


def test_a_subclass_with_a_project_of_its_own_is_asked():
    same(projection_for(Shifted(2))(torch.tensor([5, 5])), torch.tensor([1, 1]))
    same(projection_for(Doubled(2))(torch.tensor([5, 5])), torch.tensor([10, 10]))


def test_a_subclass_without_one_is_read():
    class Plain(rl.Categorical):
        pass

    assert isinstance(projection_for(Plain(3)).projection, ops.RoundClamp)


@pytest.mark.parametrize("case", ["bounded_each", "categorical_rows", "multi_categorical"])
def test_a_value_of_another_shape_is_refused(case):
    with pytest.raises(ValueError, match=r"value of shape \(2, 7\) onto a spec of shape"):
        projection_for(build(case))(torch.zeros(2, 7))


@pytest.mark.parametrize("case", ["one_hot", "one_hot_mask", "multi_one_hot"])
@pytest.mark.parametrize("shape", [(), (3,), (4, 6)])
def test_a_row_of_another_width_is_refused(case, shape):
    with pytest.raises(ValueError, match=r"last dim must be (4|5) wide"):
        projection_for(build(case))(torch.zeros(shape))


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (lambda: rl.Bounded(1.0, 0.0, shape=(3,)), "low <= high"),
        (lambda: rl.Bounded(NAN, 0.0, shape=(3,)), "NaN"),
        (lambda: rl.Categorical(2, mask=torch.zeros(2, dtype=torch.bool)), "no valid outcome"),
        (lambda: rl.OneHot(2, mask=torch.zeros(2, dtype=torch.bool)), "no valid outcome"),
        (
            lambda: rl.MultiOneHot((2, 2), mask=torch.tensor([True, True, False, False])),
            "no valid outcome",
        ),
    ],
)
def test_a_spec_of_torchrls_that_nothing_meets(theirs, message):
    with pytest.raises(ValueError, match=message):
        projection_for(theirs())
