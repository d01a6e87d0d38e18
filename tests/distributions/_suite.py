"""What every distribution must keep. A family names its oracle and inherits the rest.

The oracle is scipy, mpmath or numeric integration, in float64; never fastprob's own formulas.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch import distributions as D
from torch.autograd import forward_ad, gradcheck, gradgradcheck

BATCHES = [(), (3,), (2, 3), (2, 1, 3)]
HALVES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
JOINTS = ["rsample_and_log_prob", "sample_and_log_prob"]


def close(actual: Tensor, expected: Any, tolerance: float) -> None:
    torch.testing.assert_close(
        actual.detach().double(),
        torch.as_tensor(np.asarray(expected), dtype=torch.float64),
        rtol=tolerance,
        atol=tolerance,
        equal_nan=True,
    )


class Suite:
    """Inherited tests of a distribution with float parameters.

    A family gives `event`, `params`, `build`, `upstream` and `log_prob`, and of `mode`, `median`,
    `mean` and `entropy` those that it has.
    """

    event: ClassVar[tuple[int, ...]] = (4,)
    has_entropy: ClassVar[bool] = True
    # Whether a gradient flows through rsample, which for one-hot vectors is a surrogate.
    pathwise: ClassVar[bool] = True
    discrete: ClassVar[bool] = False
    # What joint scores and log_prob of the same float64 value may differ by.
    joint_tolerance: ClassVar[float] = 1e-12
    # Whether two draws differ.
    random: ClassVar[bool] = True
    # Whether the log-density has a derivative in the value.
    value_grad: ClassVar[bool] = True

    # the family --------------------------------------------------------------------------------

    def params(self, batch: tuple[int, ...], dtype: torch.dtype = torch.float64) -> dict:
        """Parameters of the shape `[*batch, *event]`."""
        raise NotImplementedError

    def build(self, params: dict) -> D.Distribution:
        raise NotImplementedError

    def upstream(self, params: dict) -> Any:
        """The same distribution of torch or TorchRL."""
        raise NotImplementedError

    def log_prob(self, params: dict, value: np.ndarray) -> np.ndarray:
        """The oracle's log-probability, summed over the event; parameters are numpy arrays."""
        raise NotImplementedError

    def points(self, params: dict) -> dict[str, np.ndarray]:
        """The oracle's mode, median and mean."""
        raise NotImplementedError

    def entropy(self, params: dict) -> np.ndarray:
        raise NotImplementedError

    # helpers -----------------------------------------------------------------------------------

    def values(self, params: dict, sample: tuple[int, ...] = ()) -> Tensor:
        """Values that nobody has drawn from the distribution under test."""
        generator_state = torch.get_rng_state()
        torch.manual_seed(11)
        value = self.upstream(params).sample(torch.Size(sample)).detach()
        torch.set_rng_state(generator_state)
        return value

    def leaves(self, batch: tuple[int, ...] = (3,)) -> dict:
        return {k: v.clone().requires_grad_() for k, v in self.params(batch).items()}

    @staticmethod
    def arrays(params: dict) -> dict:
        return {k: v.detach().double().numpy() for k, v in params.items()}

    def rebuilt(self, names: list[str], tensors: Any) -> D.Distribution:
        return self.build(dict(zip(names, tensors, strict=True)))

    # values of the formulas --------------------------------------------------------------------

    @pytest.mark.parametrize("sample", [(), (5,), (2, 3)], ids=str)
    @pytest.mark.parametrize("batch", BATCHES, ids=str)
    def test_log_prob(self, batch, sample):
        params = self.params(batch)
        dist, value = self.build(params), self.values(params, sample)
        found = dist.log_prob(value)
        assert found.shape == torch.Size(sample) + dist.batch_shape
        assert found.dtype == torch.float64
        close(found, self.log_prob(self.arrays(params), value.numpy()), 1e-9)

    @pytest.mark.parametrize("batch", BATCHES, ids=str)
    def test_entropy(self, batch):
        params = self.params(batch)
        dist = self.build(params)
        if not self.has_entropy:
            with pytest.raises(NotImplementedError):
                dist.entropy()
            return
        assert dist.entropy().shape == dist.batch_shape
        close(dist.entropy(), self.entropy(self.arrays(params)), 1e-9)

    @pytest.mark.parametrize("batch", BATCHES, ids=str)
    def test_mode_median_and_mean(self, batch):
        params = self.params(batch)
        dist = self.build(params)
        for name, expected in self.points(self.arrays(params)).items():
            close(getattr(dist, name), expected, 1e-6)

    # draws -------------------------------------------------------------------------------------

    @pytest.mark.parametrize("joint", JOINTS)
    @pytest.mark.parametrize("sample", [(), (5,), (2, 3)], ids=str)
    @pytest.mark.parametrize("batch", BATCHES, ids=str)
    def test_joint_draws(self, batch, sample, joint):
        params = {k: v.requires_grad_() for k, v in self.params(batch).items()}
        dist = self.build(params)
        value, score = getattr(dist, joint)(sample)
        assert value.shape == torch.Size(sample) + dist.batch_shape + dist.event_shape
        assert score.shape == torch.Size(sample) + dist.batch_shape
        pathwise = self.pathwise and joint == "rsample_and_log_prob"
        assert value.requires_grad == pathwise
        if not self.discrete:
            assert value.dtype == torch.float64
        again = self.build(params).log_prob(value.detach())
        tolerance = self.joint_tolerance
        torch.testing.assert_close(score, again, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("sample", [(), (5,), (2, 3)], ids=str)
    def test_every_way_to_draw_uses_the_same_noise(self, sample):
        params = self.params((3,))
        dist = self.build(params)
        drawn = []
        for draw in (dist.sample, dist.sample_and_log_prob, dist.rsample_and_log_prob):
            torch.manual_seed(5)
            value = draw(sample)
            drawn.append(value[0] if isinstance(value, tuple) else value)
        for other in drawn[1:]:
            # The straight-through value of a one-hot draw is p + (1 - p), rounded.
            torch.testing.assert_close(other.double(), drawn[0].double(), rtol=0, atol=1e-15)

    def test_draws_follow_the_seed_and_the_generator(self):
        dist = self.build(self.params((50,)))
        torch.manual_seed(5)
        first, second = dist.sample(), dist.sample()
        assert not torch.equal(first, second)
        torch.manual_seed(5)
        assert torch.equal(dist.sample(), first)
        outer = torch.get_rng_state()
        generator = torch.Generator().manual_seed(5)
        value, _ = dist.sample_and_log_prob((), generator=generator)
        assert torch.equal(value, first)
        assert torch.equal(torch.get_rng_state(), outer)

    def test_log_prob_of_a_value_has_no_history(self):
        params = self.params((3,))
        dist, value = self.build(params), self.values(params, (4,))
        before = dist.log_prob(value)
        dist.sample_and_log_prob((4,))
        drawn, _ = dist.rsample_and_log_prob((4,))
        _ = dist.mode, dist.median
        assert torch.equal(dist.log_prob(value), before)
        drawn = drawn.detach()
        same = dist.log_prob(drawn)
        assert torch.equal(dist.log_prob(drawn.clone()), same)
        assert torch.equal(self.build(params).log_prob(drawn), same)

    def test_log_prob_after_a_draw_has_its_gradients(self):
        params = self.leaves()
        value = self.values(params)
        expected = torch.autograd.grad(
            self.build(params).log_prob(value).sum(), list(params.values())
        )
        dist = self.build(params)
        dist.sample((2,))
        with torch.no_grad():
            dist.log_prob(value)
        found = torch.autograd.grad(dist.log_prob(value).sum(), list(params.values()))
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)

    # gradients ---------------------------------------------------------------------------------

    @pytest.mark.parametrize("batch", [(), (3,)], ids=str)
    def test_gradients_of_log_prob(self, batch):
        params = self.leaves(batch)
        names = list(params)
        value = self.values(params, (2,))
        inputs = tuple(params.values())
        if self.value_grad:
            inputs += (value.requires_grad_(),)

            def score(*args):
                return self.rebuilt(names, args[:-1]).log_prob(args[-1])
        else:

            def score(*args):
                return self.rebuilt(names, args).log_prob(value)

        assert gradcheck(score, inputs, fast_mode=True)
        assert gradgradcheck(score, inputs, fast_mode=True)

    @pytest.mark.parametrize("batch", [(), (3,)], ids=str)
    def test_gradients_of_entropy(self, batch):
        if not self.has_entropy:
            return
        params = self.leaves(batch)
        names = list(params)

        def entropy(*args):
            return self.rebuilt(names, args).entropy()

        assert gradcheck(entropy, tuple(params.values()), fast_mode=True)
        assert gradgradcheck(entropy, tuple(params.values()), fast_mode=True)

    @pytest.mark.parametrize("what", ["rsample", *JOINTS])
    def test_gradients_of_draws(self, what):
        if not self.pathwise or (self.discrete and what != "sample_and_log_prob"):
            return  # a surrogate gradient is not the derivative of the value
        params = self.leaves()
        names = list(params)
        drawn = self.build(params).sample_and_log_prob  # the value held fixed

        def draw(*args):
            torch.manual_seed(5)
            dist = self.rebuilt(names, args)
            if what == "rsample":
                return dist.rsample((2,))
            if what == "rsample_and_log_prob":
                return dist.rsample_and_log_prob((2,))
            torch.manual_seed(5)
            value = drawn((2,))[0]
            return dist.log_prob(value)

        if what == "sample_and_log_prob":
            # Its score has the gradients of log_prob at the value, which is detached.
            torch.manual_seed(5)
            _, score = self.build(params).sample_and_log_prob((2,))
            found = torch.autograd.grad(score.sum(), list(params.values()))
            expected = torch.autograd.grad(draw(*params.values()).sum(), list(params.values()))
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)
            return
        assert gradcheck(draw, tuple(params.values()), fast_mode=True)
        assert gradgradcheck(draw, tuple(params.values()), fast_mode=True)

    def test_hand_written_gradients_are_those_of_the_plain_formula(self):
        # torch.func gets the plain formula, autograd the hand-written backward.
        params = self.leaves((2, 3))
        names, tensors = list(params), tuple(params.values())
        value = self.values(params, (4,))

        def loss(*args):
            torch.manual_seed(5)
            dist = self.rebuilt(names, args)
            total = (dist.log_prob(value) * 0.3).sum()
            if not self.discrete:
                drawn, score = dist.rsample_and_log_prob()
                total = total + (drawn * 0.7).sum() + (score * 1.3).sum()
            return total

        expected = torch.func.grad(loss, argnums=tuple(range(len(tensors))))(
            *(t.detach() for t in tensors)
        )
        found = torch.autograd.grad(loss(*tensors), tensors)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)

    # torch 2.13 builds its forward-mode decompositions by the function that it has deprecated.
    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
    def test_forward_mode(self):
        params = self.leaves()
        names, tensors = list(params), tuple(params.values())
        value = self.values(params)

        def score(*args):
            return self.rebuilt(names, args).log_prob(value)

        tangents = tuple(torch.randn_like(t) for t in tensors)
        grads = torch.autograd.grad(score(*tensors).sum(), tensors)
        expected = sum((g * t).sum() for g, t in zip(grads, tangents, strict=True))
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(p.detach(), t) for p, t in zip(tensors, tangents, strict=True)
            ]
            found = forward_ad.unpack_dual(score(*duals)).tangent
        torch.testing.assert_close(found.sum(), expected, rtol=1e-10, atol=1e-10)

    # transforms --------------------------------------------------------------------------------

    def test_vmap_of_log_prob(self):
        params = self.params((6, 3))
        names, value = list(params), self.values(params)
        found = torch.vmap(lambda v, *p: self.rebuilt(names, p).log_prob(v))(
            value, *params.values()
        )
        close(found, self.build(params).log_prob(value), 1e-12)

    @pytest.mark.parametrize("randomness", ["same", "different"])
    def test_vmap_of_draws(self, randomness):
        row = self.params((3,))
        params = {k: v.expand(6, *v.shape).clone() for k, v in row.items()}
        names = list(params)

        def draw(*args):
            return self.rebuilt(names, args).sample_and_log_prob()

        value, score = torch.vmap(draw, randomness=randomness)(*params.values())
        equal_rows = all(torch.equal(v, value[0]) for v in value[1:])
        # Six draws of at least three elements do not agree by chance in every place.
        assert equal_rows == (randomness == "same" or not self.random)
        torch.testing.assert_close(
            score,
            self.build(params).log_prob(value),
            rtol=self.joint_tolerance,
            atol=self.joint_tolerance,
        )

    # shapes and layouts --------------------------------------------------------------------------

    @pytest.mark.parametrize("batch", [(0,), (2, 0), (0, 3)], ids=str)
    def test_empty_batches(self, batch):
        params = {k: v.requires_grad_() for k, v in self.params(batch).items()}
        dist = self.build(params)
        value, score = dist.rsample_and_log_prob()
        assert value.shape == torch.Size(batch) + dist.event_shape
        assert score.shape == dist.batch_shape == torch.Size(batch)
        assert dist.mode.shape == dist.median.shape == value.shape
        assert dist.log_prob(value.detach()).shape == score.shape
        assert dist.sample((2,)).shape == (2, *value.shape)
        (score.sum() + value.sum()).backward()
        assert all(p.grad is not None and p.grad.shape == p.shape for p in params.values())

    @pytest.mark.parametrize("layout", ["transposed", "expanded", "strided"])
    def test_layouts_give_what_contiguous_tensors_give(self, layout):
        def lay(tensor: Tensor) -> Tensor:
            if layout == "transposed":
                return tensor.transpose(0, 1).contiguous().transpose(0, 1)
            if layout == "expanded":
                return tensor[:1].expand_as(tensor)
            wide = torch.full((*tensor.shape, 2), float("nan"), dtype=tensor.dtype)
            wide[..., 0] = tensor
            return wide[..., 0]

        given = {k: lay(v) for k, v in self.params((5, 3)).items()}
        assert all(not v.is_contiguous() for v in given.values())
        plain = {k: v.clone(memory_format=torch.contiguous_format) for k, v in given.items()}
        results = []
        for params in (given, plain):
            params = {k: v.detach().requires_grad_() for k, v in params.items()}
            dist = self.build(params)
            torch.manual_seed(5)
            value, score = dist.rsample_and_log_prob((2,))
            external = dist.log_prob(self.values(plain, (2,)))
            total = score.sum() + external.sum()
            if value.requires_grad:
                total = total + value.sum()
            grads = torch.autograd.grad(total, list(params.values()))
            results.append((value, score, external, dist.mode, *grads))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    # objects -----------------------------------------------------------------------------------

    def test_expand(self):
        params = self.params((3,))
        dist = self.build(params)
        wide = dist.expand((2, 3))
        assert type(wide) is type(dist)
        assert wide.batch_shape == (2, 3) and wide.event_shape == dist.event_shape
        assert wide.sample().shape == (2, 3, *dist.event_shape)
        value = self.values(params)
        torch.testing.assert_close(
            wide.log_prob(value), dist.log_prob(value).expand(2, 3), rtol=1e-12, atol=1e-12
        )
        assert torch.equal(wide.mode, dist.mode.expand_as(wide.mode))

    @pytest.mark.parametrize(
        "copied",
        [copy.copy, copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))],
        ids=["copy", "deepcopy", "pickle"],
    )
    def test_copies(self, copied):
        params = self.params((3,))
        dist = self.build(params)
        twin = copied(dist)
        assert type(twin) is type(dist)
        value = self.values(params)
        assert torch.equal(twin.log_prob(value), dist.log_prob(value))
        torch.manual_seed(5)
        drawn = dist.sample((2,))
        torch.manual_seed(5)
        assert torch.equal(twin.sample((2,)), drawn)

    def test_repr_names_the_class_and_the_shapes(self):
        dist = self.build(self.params((3,)))
        assert type(dist).__name__ in repr(dist)
        assert "3" in repr(dist)

    # precision ---------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_dtypes_of_results(self, dtype):
        params = {k: v.requires_grad_() for k, v in self.params((3,), dtype).items()}
        dist = self.build(params)
        value, score = dist.rsample_and_log_prob((2,))
        results = [score, dist.log_prob(value.detach())]
        if not self.discrete:
            results += [value, dist.sample(), dist.mode, dist.median, dist.mean]
        if self.has_entropy:
            results.append(dist.entropy())
        assert {r.dtype for r in results} == {dtype}
        for grad in torch.autograd.grad(score.sum() + value.sum(), list(params.values())):
            assert grad.dtype == dtype and grad.isfinite().all()

    @pytest.mark.parametrize("dtype", HALVES[:3], ids=str)
    def test_error_of_log_prob_is_at_most_twice_upstreams(self, dtype):
        params = self.params((2000,), dtype)
        value = self.values({k: v.double() for k, v in params.items()})
        if not self.discrete:
            value = value.to(dtype)
        given = value.numpy() if self.discrete else value.double().numpy()
        truth = torch.as_tensor(self.log_prob(self.arrays(params), given))
        with torch.no_grad():
            mine = (self.build(params).log_prob(value).double() - truth).abs()
            theirs = (self.upstream(params).log_prob(value).double() - truth).abs()
        kept = theirs.isfinite()
        # The largest error counts, as in flash-attention's tests. (TanhNormal's mean one is 2.5
        # times upstream's in float32, 5e-7: its constants are added once to the sum of an event.)
        # The last term is the rounding of the result itself, which upstream can miss by luck.
        rounding = torch.finfo(dtype).eps / 2 * truth[kept].abs().max()
        assert mine[kept].max() <= 2 * theirs[kept].max() + rounding

    # modes of torch ----------------------------------------------------------------------------

    def test_inference_mode_and_what_it_leaves_behind(self):
        params = self.params((3,))
        value = self.values(params)
        with torch.inference_mode():
            dist = self.build(params)
            torch.manual_seed(5)
            drawn, score = dist.rsample_and_log_prob()
            external = dist.log_prob(value)
        leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
        dist = self.build(leaves)
        torch.manual_seed(5)
        again, again_score = dist.rsample_and_log_prob()
        torch.testing.assert_close(again.double(), drawn.double(), rtol=0, atol=1e-15)
        torch.testing.assert_close(again_score, score, rtol=1e-12, atol=1e-12)
        found = dist.log_prob(value)
        torch.testing.assert_close(found, external, rtol=1e-12, atol=1e-12)
        total = found.sum() + again_score.sum()
        if total.requires_grad:
            total.backward()
            assert all(p.grad is not None for p in leaves.values())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_autocast_changes_nothing(self, dtype):
        # None of this is a matrix product of the user's; scores must not lose precision.
        params = self.params((3,), torch.float32)
        value = self.values(params)
        results = []
        for enabled in (False, True):
            torch.manual_seed(5)
            with torch.autocast("cpu", dtype=dtype, enabled=enabled):
                dist = self.build(params)
                results.append((*dist.sample_and_log_prob(), dist.log_prob(value), dist.mode))
        for plain, cast in zip(*results, strict=True):
            assert cast.dtype == plain.dtype
            assert torch.equal(cast, plain)
