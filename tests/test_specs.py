"""The specs against TorchRL's of the same names, composites, plans, and every error."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torchrl.data as rl
from tensordict import TensorDict

from fastprob import specs
from fastprob.ops import projection as ops
from fastprob.specs import (
    Binary,
    Bounded,
    Categorical,
    Composite,
    MultiCategorical,
    MultiOneHot,
    OneHot,
    Unbounded,
    as_composite,
    fits,
    projection_for,
    projection_plan,
)

INF, NAN = float("inf"), float("nan")
LOW, HIGH = torch.tensor([-1.0, -2.0, 0.0]), torch.tensor([1.0, 0.5, 3.0])
MASK4 = torch.tensor([True, False, True, False])
MASK5 = torch.tensor([True, False, True, False, True])

# Calls that mean the same in both libraries: (class, positional arguments, keyword arguments)
CALLS = [
    ("Bounded", (-1, 1, (3,)), {}),
    ("Bounded", (-1, 1, 3), {}),
    ("Bounded", (LOW, HIGH), {}),
    ("Bounded", (LOW, 3.0), {}),
    ("Bounded", (LOW.numpy(), HIGH.numpy()), {"dtype": torch.float64}),
    ("Bounded", (-1.0, 1.0), {"shape": (2, 3), "dtype": torch.float16}),
    ("Bounded", (-1.0, 1.0, (), "cpu", torch.float64), {}),
    ("Bounded", (-3, 200), {"shape": (2,), "dtype": torch.int64}),
    ("Bounded", (0, 255), {"shape": (2,), "dtype": torch.uint8, "domain": "discrete"}),
    ("Bounded", (False, True), {"shape": (2,), "dtype": torch.bool}),
    ("Unbounded", (), {}),
    ("Unbounded", (3,), {}),
    ("Unbounded", ((2, 3), "cpu", torch.float64), {}),
    ("Unbounded", ((),), {"dtype": torch.int32}),
    ("Categorical", (4,), {}),
    ("Categorical", (4, (2, 3), "cpu", torch.int32), {}),
    ("Categorical", (4,), {"mask": MASK4}),
    ("Categorical", (4, (2,)), {"mask": MASK4}),
    ("OneHot", (4,), {}),
    ("OneHot", (4, (2, 4), "cpu", torch.int64), {}),
    ("OneHot", (4, (2, 4), "cpu", torch.bool, False, MASK4), {}),
    ("MultiCategorical", ((3, 2),), {}),
    ("MultiCategorical", ([3, 2], (5, 2)), {"dtype": torch.int32}),
    ("MultiCategorical", (torch.tensor([[3, 2], [4, 5]]),), {}),
    ("MultiCategorical", ((3, 2), None, "cpu", torch.int64, MASK5), {}),
    ("MultiCategorical", ([3],), {}),
    ("MultiCategorical", ([3],), {"remove_singleton": False}),
    ("MultiOneHot", ((3, 2),), {}),
    ("MultiOneHot", ((3, 2), (4, 5)), {"dtype": torch.int64}),
    ("MultiOneHot", ((3, 2),), {"mask": MASK5}),
    ("Binary", (3,), {}),
    ("Binary", (), {"shape": (2, 3)}),
    ("Binary", (3, (2, 3), "cpu", torch.bool), {}),
]
IDS = [f"{name}{index}" for index, (name, _, _) in enumerate(CALLS)]
every_call = pytest.mark.parametrize("call", CALLS, ids=IDS)


def make(call, library=specs):
    name, args, kwargs = call
    return getattr(library, name)(*args, **kwargs)


# --- leaves, against TorchRL --------------------------------------------------------------------


@every_call
@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (2, 1, 3), (0,)], ids=str)
def test_shape_dtype_device_zero_and_rand(call, batch):
    ours, theirs = make(call), make(call, rl)
    assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
    assert ours.ndim == theirs.ndim
    zero = ours.zero(batch)
    assert torch.equal(zero, theirs.zero(batch)) and torch.equal(zero, ours.zeros(batch))
    assert zero.dtype is theirs.dtype
    drawn, reference = ours.rand(batch), theirs.rand(batch)
    assert (drawn.shape, drawn.dtype) == (reference.shape, reference.dtype)
    assert ours.is_in(drawn)
    assert ours.is_in(reference)
    assert theirs.is_in(drawn)


@every_call
def test_is_in_agrees_with_torchrl(call):
    ours, theirs = make(call), make(call, rl)
    batch = ours.rand((6,))
    wild = batch.clone()
    if ours.dtype is not torch.bool:
        wild[0] = 100
    else:
        wild[0] = False
    unmasked = getattr(theirs, "mask", None) is None
    for value in [
        batch,
        wild,
        batch.double() if unmasked else batch,  # TorchRL does not look at the type under a mask
        batch[0],
        *([batch[..., :1]] if unmasked and batch.shape[-1] > 1 else []),
    ]:
        try:
            expected = bool(theirs.is_in(value))
        except RuntimeError:  # shapes that do not broadcast, an index out of the mask's range
            expected = False
        assert ours.is_in(value) is expected


@every_call
def test_the_two_ends_of_the_range(call):
    """Draws reach every member, and only members."""
    spec = make(call)
    if call[0] in ("Bounded", "Unbounded"):
        drawn = spec.rand((2000,))
        assert spec.is_in(drawn)
        assert drawn.float().std(0).min() > 0
        return
    drawn = spec.rand((400,)).reshape(400, -1).long()
    for column in drawn.unbind(-1):
        seen = set(column.tolist())
        assert len(seen) > 1 or getattr(spec, "mask", None) is not None
        assert seen <= set(range(5))


@every_call
def test_rand_takes_a_generator_and_leaves_the_global_one_alone(call):
    spec = make(call)
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    before = torch.get_rng_state()
    first, second = (spec.rand((50,), generator=generator) for generator in generators)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, spec.rand((50,), generator=generators[0]))


@every_call
def test_equality_clone_expand_and_to(call):
    spec = make(call)
    twin = spec.clone()
    assert spec == twin and twin is not spec and type(twin) is type(spec)
    assert spec == make(call)
    for name in ("low", "high", "mask", "nvec"):
        field = getattr(spec, name, None)
        if isinstance(field, torch.Tensor):
            assert getattr(twin, name).data_ptr() != field.data_ptr()
    assert spec.to(spec.dtype) is spec and spec.to("cpu") is spec and spec.to(None) is spec
    assert spec.to(torch.device("cpu")) is spec

    bigger = spec.expand(2, 5, *spec.shape)
    # TorchRL's own expand raises for a masked MultiCategorical, and so is not asked.
    assert bigger.shape == (2, 5, *spec.shape) and bigger != spec
    assert bigger == spec.expand(torch.Size([2, 5, *spec.shape]))
    assert bigger.is_in(bigger.rand((3,)))
    value = spec.zero((2, 5)) + (0 if spec.dtype is torch.bool else 1)
    if call[0] not in ("OneHot", "MultiOneHot"):
        assert torch.equal(bigger.project(value), spec.project(value))

    other = spec.to(torch.float64 if spec.dtype is not torch.float64 else torch.float32)
    assert other.dtype is not spec.dtype and other != spec
    assert other.is_in(other.rand((3,))) and other.to(spec.dtype) == spec
    assert spec != 3 and repr(spec).startswith(type(spec).__name__)


def test_what_makes_specs_differ():
    same_type = [
        Bounded(-1, 1, (3,)),
        Bounded(-1, 2, (3,)),
        Bounded(-2, 1, (3,)),
        Bounded(-1, 1, (2,)),
        Bounded(-1, 1, (3,), dtype=torch.float64),
        Bounded(LOW, HIGH),
        Categorical(3),
        Categorical(4),
        Categorical(4, (3,)),
        Categorical(4, mask=MASK4),
        Categorical(4, mask=~MASK4),
        OneHot(4),
        OneHot(4, mask=MASK4),
        MultiOneHot((2, 2)),
        MultiOneHot((1, 3)),
        MultiCategorical((2, 2)),
        MultiCategorical((1, 3)),
        Binary(3),
        Binary(4),
        Unbounded(3),
    ]
    for i, one in enumerate(same_type):
        for j, other in enumerate(same_type):
            assert (one == other) is (i == j)


def test_specs_are_kin_as_in_torchrl():
    assert issubclass(Binary, Categorical) and issubclass(MultiCategorical, Categorical)
    assert issubclass(MultiOneHot, OneHot) and issubclass(Composite, specs.Spec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_in_at_the_edges(dtype):
    spec = Bounded(0.1, 0.7, (2,), dtype=dtype)
    ends = torch.tensor([0.1, 0.7], dtype=dtype)
    assert spec.is_in(ends)
    assert not spec.is_in(torch.nextafter(ends, torch.tensor([0.0, 1.0], dtype=dtype)))
    assert not spec.is_in(torch.tensor([NAN, 0.5], dtype=dtype))
    assert Bounded(-INF, INF, ()).is_in(torch.tensor([INF, -INF]))


def test_is_in_wants_members():
    assert not Categorical(4, dtype=torch.float32).is_in(torch.tensor(1.5))
    assert not Categorical(4, mask=MASK4).is_in(torch.tensor(1))
    assert not Categorical(4, mask=MASK4).is_in(torch.tensor(4))
    assert not OneHot(4, mask=MASK4).is_in(torch.tensor([True, False, True, False]))
    assert not OneHot(4).is_in(torch.tensor([True, False, True, False]))
    assert not OneHot(4).is_in(torch.tensor([True]))
    assert not MultiOneHot((2, 2)).is_in(torch.tensor([True, True, False, False]))
    assert not Binary(2).is_in(torch.tensor([0, 2], dtype=torch.int8))
    assert not MultiCategorical((3, 2)).is_in(torch.tensor([1, 2]))
    assert MultiCategorical([3]).is_in(torch.tensor(2))
    assert not MultiCategorical((3, 2)).is_in(torch.tensor(1))


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [
        (torch.finfo(torch.float32).min, torch.finfo(torch.float32).max, torch.float32),
        (-60000.0, 60000.0, torch.float16),
        (-1.0, 1.0, torch.bfloat16),
        (torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max, torch.int64),
        (2**62, 2**63 - 1, torch.int64),
        (-(2**62), 2**62, torch.int64),
        (0, 2**62 - 1, torch.int64),
        (-128, 127, torch.int8),
    ],
)
def test_draws_fill_wide_ranges(low, high, dtype):
    spec = Bounded(torch.tensor(low), torch.tensor(high), (2,), dtype=dtype)
    drawn = spec.rand((4000,))
    assert spec.is_in(drawn)
    share = (drawn.double() - low) / (float(high) - float(low))
    # The mean of 8000 uniform numbers has a spread of 0.0032; five of them.
    assert abs(share.mean() - 0.5) < 0.016
    assert share.min() < 0.02 and share.max() > 0.98


def test_integer_draws_are_uniform():
    drawn = Bounded(-1, 1, (), dtype=torch.int64).rand((9000,))
    counts = torch.stack([(drawn == k).sum() for k in (-1, 0, 1)])
    assert ((counts - 3000).abs() < 250).all()  # spread 45


def test_masked_draws_are_uniform_over_what_is_left():
    drawn = Categorical(4, (2,), mask=MASK4).rand((4500,))
    assert set(drawn.flatten().tolist()) == {0, 2}
    assert abs((drawn == 0).double().mean() - 0.5) < 0.03
    drawn = OneHot(4, mask=MASK4).rand((4500,))
    assert abs(drawn[..., 2].double().mean() - 0.5) < 0.04


def test_bounds_take_the_type_without_a_detour():
    assert Bounded(0.1, 0.7, (), dtype=torch.float64).low.item() == 0.1
    assert Bounded(2**53 + 1, 2**60 + 1, (), dtype=torch.int64).high.item() == 2**60 + 1
    assert Bounded(np.float64(0.1), 1, (), dtype=torch.float64).low.item() == 0.1


def test_bounds_are_copies():
    low = torch.zeros(3)
    spec = Bounded(low, 1.0)
    low.fill_(0.5)
    assert torch.equal(spec.low, torch.zeros(3))


def test_bounds_without_a_shape_are_of_any():
    spec = Bounded(-1, 1)
    assert spec.shape == () and spec.is_in(torch.zeros(4, 3))


def test_project_is_the_projection():
    value = torch.tensor([-3.0, 0.0, 9.0])
    assert torch.equal(Bounded(LOW, HIGH).project(value), torch.tensor([-1.0, 0.0, 3.0]))
    assert torch.equal(value, torch.tensor([-3.0, 0.0, 9.0]))


@pytest.mark.parametrize(
    ("shape", "value", "expected"),
    [
        ((), (), True),
        ((), (2, 3), True),
        ((3,), (3,), True),
        ((3,), (5, 3), True),
        ((3,), (4,), False),
        ((3,), (1,), False),
        ((3,), (), False),
        ((1,), (7,), True),
        ((2, 1), (2, 9), True),
        ((2, 1), (4, 2, 9), True),
        ((2, 3), (3,), False),
        ((0,), (5, 0), True),
    ],
)
def test_fits(shape, value, expected):
    for library in (specs, rl):
        spec = library.Bounded(-1.0, 1.0, shape)
        assert fits(spec, value) is expected
        assert fits(spec, torch.Size(value)) is expected
    assert fits(None, value)


def test_fits_a_number_for_one_choice():
    for library in (specs, rl):
        assert fits(library.MultiCategorical([3]), ())
        assert not fits(library.OneHot(1), ())


# --- composites ---------------------------------------------------------------------------------


def nested(library=specs):
    return library.Composite(
        {
            "a": library.Bounded(-1.0, 1.0, (3,)),
            ("n", "b"): library.OneHot(4),
            ("n", "deep", "c"): library.Categorical(4, mask=MASK4),
            "none": None,
            "u": library.Unbounded(2),
        }
    )


@pytest.mark.parametrize("include_nested", [False, True])
@pytest.mark.parametrize("leaves_only", [False, True])
def test_keys_items_and_values_are_torchrls(include_nested, leaves_only):
    ours, theirs = nested(), nested(rl)
    keys = ours.keys(include_nested, leaves_only)
    assert keys == list(theirs.keys(include_nested, leaves_only))
    items = ours.items(include_nested, leaves_only)
    assert [key for key, _ in items] == keys
    assert all(ours[key] is spec for key, spec in items)
    assert [spec for _, spec in items] == ours.values(include_nested, leaves_only)


def test_composite_access():
    spec = nested()
    assert spec["n", "deep", "c"].n == 4 and spec[("n", ("deep", "c"))].n == 4
    assert ("n", "b") in spec and "zzz" not in spec and ("a", "b") not in spec
    assert list(spec) == ["a", "n", "none", "u"] and len(spec) == 4
    assert spec.get("zzz", 3) == 3 and spec.get("none", 3) is None
    assert spec.set("d", Binary(2)) is spec and spec["d"] == Binary(2)
    spec[("n", "deep", "e")] = None
    assert ("n", "deep", "e") in spec
    spec[("x", "y")] = Binary(1)
    assert isinstance(spec["x"], Composite)
    del spec[("n", "b")]
    del spec["a"]
    assert ("n", "b") not in spec and "a" not in spec
    spec["dict"] = {"inner": Binary(1)}
    assert spec["dict", "inner"] == Binary(1)
    spec.update({"n": {"new": Binary(5)}, "d": None})
    assert spec["n", "new"] == Binary(5) and ("n", "deep", "c") in spec and spec["d"] is None
    assert not spec.is_empty() and Composite().is_empty()
    assert Composite(a=None, b={"c": None}).is_empty(recurse=True)
    assert Composite({"_": None}).keys() == ["_"]
    assert spec.dtype is None and spec.batch_size == spec.shape


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
def test_composite_values(batch):
    ours, theirs = nested(), nested(rl)
    for made, like in (
        (ours.zero(batch), theirs.zero(batch)),
        (ours.rand(batch), theirs.rand(batch)),
    ):
        assert set(made.keys(True, True)) == set(like.keys(True, True))
        for key in made.keys(True, True):
            assert made[key].shape == like[key].shape and made[key].dtype is like[key].dtype
        assert made.batch_size == like.batch_size
    assert (ours.zero(batch) == theirs.zero(batch)).all()
    drawn = ours.rand(batch)
    assert ours.is_in(drawn) and theirs.is_in(drawn)
    drawn["a"] = drawn["a"] + 5
    assert not ours.is_in(drawn) and not theirs.is_in(drawn)
    before = drawn.clone()
    out = ours.project(drawn)
    assert (drawn == before).all() and out is not drawn and ours.is_in(out)
    assert torch.equal(out["a"], torch.ones(*batch, 3))
    assert not ours.is_in(drawn.exclude("a"))
    assert set(ours.project(drawn.exclude("a")).keys()) == {"n", "u"}


def test_composite_draws_from_a_generator():
    first, second = (nested().rand(generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert (first == second).all()


def test_composite_shape():
    spec = Composite(a=Bounded(0, 1, (2, 3)), n={"b": Binary(shape=(2, 4))}, shape=(2,))
    assert spec["n"].shape == (2,) and spec.rand((5,)).batch_size == (5, 2)
    assert Composite(n=Composite(), batch_size=2)["n"].shape == (2,)
    bigger = spec.expand(7, 2)
    theirs = rl.Composite(a=rl.Bounded(0, 1, (2, 3)), shape=(2,)).expand(7, 2)
    assert bigger.shape == theirs.shape and bigger["a"].shape == theirs["a"].shape
    assert bigger["n", "b"].shape == (7, 2, 4)


def test_composite_equality_clone_and_to():
    spec = nested()
    twin = spec.clone()
    assert twin == spec and twin["n"] is not spec["n"] and twin["a"] is not spec["a"]
    twin["n", "b"] = OneHot(5)
    assert twin != spec and spec["n", "b"].n == 4
    assert spec != nested(rl) and spec != Composite() and spec.to(None) is spec
    assert Composite(shape=(2,)) != Composite()
    assert spec.to("cpu").device == torch.device("cpu") and spec.device is None
    assert spec.to(torch.float64)["a"].dtype is torch.float64
    text = repr(spec)
    assert text.startswith("Composite(") and "deep: Composite(" in text and "none: None" in text


def test_composite_device():
    spec = Composite(a=Bounded(0, 1, (3,)), n=Composite(), device="cpu")
    assert spec["n"].device == torch.device("cpu")
    with pytest.raises(
        ValueError, match="'b' on cpu, the device of the composite, got one on meta"
    ):
        spec["b"] = Unbounded(3, device="meta")


# --- plans --------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", [specs, rl], ids=["fastprob", "torchrl"])
def test_plan_of_a_nested_composite(library):
    spec = nested(library)
    plan = projection_plan(spec)
    assert [key for key, _ in plan] == ["a", ("n", "b"), ("n", "deep", "c"), "u"]
    td = spec.rand((4,))
    td["a"] = torch.randn(4, 3) * 5
    for key, projection in plan:
        assert torch.equal(projection(td[key]), spec[key].project(td[key].clone()))
    assert isinstance(dict(plan)["a"], ops.Clamp)


def test_plan_leaves_out_the_underscore():
    assert projection_plan(Composite({"_": Binary(2), "a": None})) == ()


def test_plan_of_stacked_specs():
    stacked = torch.stack([nested(rl), nested(rl)])
    plan = dict(projection_plan(stacked))
    value = torch.randn(2, 3) * 5
    assert torch.equal(plan["a"](value), value.clamp(-1, 1))


@pytest.mark.parametrize("library", [specs, rl], ids=["fastprob", "torchrl"])
def test_as_composite_wraps_a_leaf(library):
    leaf = library.Bounded(-1.0, 1.0, (3,))
    spec = as_composite(leaf, [("n", "a")])
    assert type(spec) is library.Composite
    assert spec["n", "a"] == leaf and spec["n", "a"] is not leaf


@pytest.mark.parametrize("library", [specs, rl], ids=["fastprob", "torchrl"])
def test_as_composite_fills_and_clones(library):
    given = library.Composite({("n", "a"): library.Binary(2)})
    spec = as_composite(given, ["b", ("n", ("a",)), ("n", "c")])
    assert type(spec) is library.Composite
    assert set(spec.keys(True, True)) == {"b", ("n", "a"), ("n", "c")}
    assert spec["b"] is None and spec["n", "a"] == library.Binary(2)
    assert list(given.keys(True, True)) == [("n", "a")]


def test_as_composite_of_nothing():
    spec = as_composite(None, ["a", ("n", "b")])
    assert isinstance(spec, Composite) and spec.is_empty(recurse=True)
    assert spec.keys(True, True) == ["a", ("n", "b")]


@pytest.mark.parametrize("library", [specs, rl], ids=["fastprob", "torchrl"])
def test_as_composite_refuses(library):
    leaf = library.Bounded(-1.0, 1.0, (3,))
    with pytest.raises(RuntimeError, match=r"one spec cannot serve the out-keys \['a', 'b'\]"):
        as_composite(leaf, ["a", "b"])
    with pytest.raises(RuntimeError, match=r"the spec has \['x', 'a'\], the out-keys are \['a'\]"):
        as_composite(library.Composite(x=leaf, a=leaf), ["a"])
    with pytest.raises(TypeError, match=r"expected a spec .* got builtins\.int"):
        as_composite(3, ["a"])


@pytest.mark.parametrize("library", [specs, rl], ids=["fastprob", "torchrl"])
def test_as_composite_warns_of_an_underscore(library):
    with pytest.warns(UserWarning, match='spec of the key "_" is ignored'):
        as_composite(library.Composite({"_": library.Binary(2), "a": None}), ["_", "a"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        as_composite(library.Composite({"_": None, "a": None}), ["_", "a"])


def test_neither_torchrl_nor_its_specs_are_needed():
    """And a TorchRL that is imported later is recognised."""
    code = """if True:
        import sys
        from fastprob import specs
        spec = specs.as_composite(specs.Bounded(-1, 1, 3), ["a"])
        assert specs.projection_plan(spec)
        spec = specs.projection_for(specs.OneHot(3))
        assert "torchrl" not in sys.modules
        import torchrl.data as rl
        assert type(specs.as_composite(rl.Binary(3), ["a"])) is rl.Composite
    """
    subprocess.run([sys.executable, "-c", code], check=True)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make_it", "error", "message"),
    [
        (lambda: Bounded(1, 0, (3,)), ValueError, "expected low <= high, got low=1.0, high=0.0"),
        (lambda: Bounded(LOW, torch.tensor([1.0, -3.0, 3.0])), ValueError, "expected low <= high"),
        (lambda: Bounded(NAN, 1, (3,)), ValueError, "expected a number for low, got NaN"),
        (lambda: Bounded(0, torch.tensor([1.0, NAN])), ValueError, "number for high, got NaN"),
        (lambda: Bounded(0, NAN, (), dtype=torch.int64), ValueError, "high=nan"),
        (lambda: Bounded(0, INF, (), dtype=torch.int64), ValueError, "high=inf is no torch.int64"),
        (
            lambda: Bounded(0, torch.tensor(INF), (), dtype=torch.int64),
            ValueError,
            "it must be finite",
        ),
        (lambda: Bounded(None, 1.0, (3,)), TypeError, "number or tensor for low, got None"),
        (
            lambda: Bounded(LOW, torch.ones(4)),
            ValueError,
            r"low \(3,\), high \(4,\) and shape None",
        ),
        (lambda: Bounded(LOW, HIGH, (4,)), ValueError, r"low \(3,\), high \(3,\) and shape \(4,\)"),
        (lambda: Bounded(0, 1, (3,), domain="odd"), ValueError, "got 'odd'"),
        (lambda: Bounded(0, 1, (-1, 3)), ValueError, r"sizes >= 0, got \(-1, 3\)"),
        (lambda: Unbounded(3, domain="odd"), ValueError, "got 'odd'"),
        (lambda: Categorical(0), ValueError, "Categorical: expected a number of outcomes >= 1"),
        (lambda: Categorical(-1), ValueError, "got -1"),
        (lambda: Categorical(2.5), ValueError, "got 2.5"),
        (lambda: Categorical(True), ValueError, "got True"),
        (
            lambda: Categorical(4, mask=[True, False]),
            ValueError,
            r"expands to \(4,\) .* got one of shape \(2,\)",
        ),
        (
            lambda: Categorical(4, (2,), mask=torch.ones(3, 4, dtype=torch.bool)),
            ValueError,
            r"expands to \(2, 4\) .* got one of shape \(3, 4\)",
        ),
        (lambda: Categorical(2, mask=[False, False]), ValueError, "no valid outcome"),
        (
            lambda: Categorical(2, (2,), mask=[[True, True], [False, False]]),
            ValueError,
            "no valid outcome",
        ),
        (lambda: Categorical(2, mask=[0, 1]), ValueError, "mask of bools.* got torch.int64"),
        (lambda: OneHot(0), ValueError, "OneHot: expected a number of outcomes >= 1, got 0"),
        (lambda: OneHot(4, (3,)), ValueError, r"ends in the width 4, got \(3,\)"),
        (lambda: OneHot(4, ()), ValueError, r"ends in the width 4, got \(\)"),
        (lambda: OneHot(4, mask=[True] * 3), ValueError, r"expands to \(4,\)"),
        (lambda: OneHot(2, mask=[False, False]), ValueError, "no valid outcome"),
        (lambda: OneHot(4, use_register=True), NotImplementedError, "use TorchRL's spec"),
        (lambda: MultiOneHot((3, 0)), ValueError, r"outcomes >= 1, got \[3, 0\]"),
        (lambda: MultiOneHot((3, 2), (4,)), ValueError, r"ends in the width 5, got \(4,\)"),
        (
            lambda: MultiOneHot((2, 2), mask=[True, True, False, False]),
            ValueError,
            "MultiOneHot: the mask leaves no valid outcome",
        ),
        (lambda: MultiCategorical((3, 0)), ValueError, r"outcomes >= 1, got \[3, 0\]"),
        (lambda: MultiCategorical((3.5, 1.0)), ValueError, "outcomes >= 1"),
        (lambda: MultiCategorical(()), ValueError, r"got \[\]"),
        (
            lambda: MultiCategorical((3, 2), (3,)),
            ValueError,
            r"nvec, of shape \(2,\), expands to, got \(3,\)",
        ),
        (lambda: MultiCategorical([3], (4,)), ValueError, r"expands to, got \(4,\)"),
        (
            lambda: MultiCategorical([[3, 2], [2, 3]], mask=torch.ones(2, 5, dtype=torch.bool)),
            ValueError,
            "same numbers of outcomes in every row",
        ),
        (lambda: MultiCategorical((3, 2), mask=[True] * 4), ValueError, r"expands to \(5,\)"),
        (lambda: Binary(), TypeError, "expected n or shape"),
        (lambda: Binary(0), ValueError, "got 0"),
        (lambda: Binary(3, (2, 4)), ValueError, r"ends in n=3, got \(2, 4\)"),
        (lambda: Binary(3).update_mask(MASK4), ValueError, "Binary: expected no mask"),
        (lambda: Bounded(0, 1, (3,)).expand(4), ValueError, r"shape \(3,\) to \(4,\)"),
        (lambda: Bounded(0, 1, (3,)).expand(()), ValueError, r"shape \(3,\) to \(\)"),
        (lambda: Composite(shape=(2,)).expand(3), ValueError, r"shape \(2,\) to \(3,\)"),
        (lambda: Bounded(0, INF, (3,)).rand(), ValueError, "between infinite bounds"),
        (lambda: Composite(3), TypeError, "expected a mapping of specs, got int"),
        (lambda: Composite(a=3), TypeError, "for 'a', got builtins.int"),
        (lambda: Composite(a=rl.Binary(2)), TypeError, "for 'a', got torchrl.data"),
        (lambda: Composite(shape=2, batch_size=2), TypeError, "shape or batch_size, got both"),
        (
            lambda: Composite(a=Binary(3), shape=(2,)),
            ValueError,
            r"'a' whose shape begins with that of the composite, \(2,\), got \(3,\)",
        ),
        (lambda: nested()["zzz"], KeyError, "no key 'zzz'; the spec has"),
        (lambda: nested()["a", "b"], KeyError, "no key"),
        (lambda: nested().get("zzz"), KeyError, "no key 'zzz'"),
        (lambda: nested().__delitem__("zzz"), KeyError, "no key 'zzz'"),
        (lambda: nested()[0], TypeError, "expected a key, a string or a tuple of strings, got 0"),
        (lambda: projection_for(nested()), TypeError, "use projection_plan"),
        (lambda: projection_for(nested(rl)), TypeError, "use projection_plan"),
        (lambda: projection_for(3), TypeError, "object with a project method, got 3"),
        (lambda: projection_plan(Binary(2)), TypeError, "use projection_for"),
        (lambda: specs.Spec((), None, None).projection(), NotImplementedError, "no projection"),
        (lambda: specs.Spec((), None, None).rand(), NotImplementedError, "cannot draw"),
    ],
)
def test_bad_input(make_it, error, message):
    with pytest.raises(error, match=message):
        make_it()


def test_a_refused_mask_leaves_the_old_one():
    spec = Categorical(4, mask=MASK4)
    with pytest.raises(ValueError, match="no valid outcome"):
        spec.update_mask(torch.zeros(4, dtype=torch.bool))
    assert torch.equal(spec.mask, MASK4)


def test_is_in_of_a_missing_key_is_false():
    spec = Composite(a=Binary(2), b=None)
    assert not spec.is_in(TensorDict({"b": torch.zeros(1)}))
    assert spec.is_in(TensorDict({"a": torch.zeros(2, dtype=torch.int8)}))
