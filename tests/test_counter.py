"""CounterStream, and the draws of a seed that is not looked at."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from fastprob import CounterStream, ProbabilisticTensorDictModule, streams
from fastprob.counter import SeedCounter
from fastprob.distributions.normal import IndependentNormal
from fastprob.reference import philox


def test_draws_count_calls():
    stream = CounterStream(9)
    draws = [stream.standard_normal((3, 5)) for _ in range(3)]
    for call, draw in enumerate(draws):
        expected = philox.standard_normal(torch.tensor([9, call]), (3, 5), torch.float32)
        assert torch.equal(draw, expected)
    assert stream.state.tolist() == [9, 3]


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 2**63, 2**64 - 1])
def test_every_seed_of_64_bits(seed):
    stream = CounterStream(seed)
    assert int(stream.state[0]) % 2**64 == seed % 2**64
    assert stream.uniform((4,)).isfinite().all()


@pytest.mark.parametrize(
    ("seed", "error", "message"),
    [
        (2**64, ValueError, "must fit 64 bits"),
        (-(2**63) - 1, ValueError, "must fit 64 bits"),
        (1.0, TypeError, "must be an int, got float"),
        (True, TypeError, "must be an int, got bool"),
    ],
)
def test_no_other_seed(seed, error, message):
    with pytest.raises(error, match=message):
        CounterStream(seed)


def test_a_saved_stream_goes_on_bit_by_bit():
    stream = CounterStream(4)
    stream.uniform((7,))
    saved = stream.state_dict()
    assert list(saved) == ["state"]
    other = CounterStream(0)
    other.load_state_dict(saved)
    assert torch.equal(stream.standard_normal((6,)), other.standard_normal((6,)))


def test_folded_streams_differ():
    stream = CounterStream(4)
    seeds = {int(stream.fold_in(i).state[0]) for i in range(1000)}
    assert len(seeds) == 1000 and 4 not in seeds
    assert stream.state.tolist() == [4, 0]
    assert torch.equal(stream.fold_in(3).state, CounterStream(4).fold_in(3).state)
    with pytest.raises(ValueError, match="0 or more"):
        stream.fold_in(-1)


def test_a_seed_that_is_not_looked_at():
    counter = SeedCounter(torch.tensor([8]))
    first, second = counter.standard_normal((4,)), counter.standard_normal((4,))
    stream = CounterStream(8)
    assert torch.equal(first, stream.standard_normal((4,)))
    assert torch.equal(second, stream.standard_normal((4,)))
    # The next seed depends on the seed alone, and is none that an index is folded to.
    seed = int(SeedCounter(torch.tensor(8)).next_seed())
    assert seed == int(counter.next_seed())
    assert seed not in {int(CounterStream(8).fold_in(i).state[0]) for i in range(1000)}


def test_no_value_of_a_seed_on_an_accelerator_is_asked_for():
    # A tensor without data stands for one on a GPU: whoever looks at it fails.
    stream = streams.Stream(key="seed")
    td = TensorDict({"loc": torch.zeros(2), "seed": torch.tensor(3, device="meta")})
    generator, was_tensor = stream.open(td, ["loc"])
    assert isinstance(generator, SeedCounter) and was_tensor is True
    assert generator.standard_normal((5, 2)).shape == (5, 2)
    stream.close((td,), generator, was_tensor)
    assert td["seed"].is_meta and td["seed"].shape == ()


def test_a_module_draws_from_it(monkeypatch):
    monkeypatch.setattr(
        streams.Stream, "open", lambda self, td, keys: (SeedCounter(td[self.key]), True)
    )
    module = ProbabilisticTensorDictModule(
        ["loc", "scale"], ["action"], distribution_class=IndependentNormal, generator="seed",
        default_interaction_type="random",
    )  # fmt: skip
    td = TensorDict({"loc": torch.zeros(6), "scale": torch.ones(6), "seed": torch.tensor(8)})
    module(td)
    assert torch.equal(td["action"], CounterStream(8).standard_normal((6,)))
    assert torch.equal(td["seed"], SeedCounter(torch.tensor(8)).next_seed())
