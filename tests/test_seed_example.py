"""The example of the documentation that fixes the contract, run as it stands there."""

from __future__ import annotations

import doctest

import pytest
import torch

# torch 2.13 says that vmap runs the example's GRU cell one by one.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

# Verbatim but for two imports: the classes come from fastprob, and make_functional, which the
# example does not use and tensordict no longer has, is left out.
EXAMPLE = """
>>> import torch
>>> from tensordict import TensorDict
>>> from tensordict.nn import TensorDictModule
>>> from fastprob import (
...     ProbabilisticTensorDictModule,
...     ProbabilisticTensorDictSequential,
... )
>>> from tensordict.nn.distributions import NormalParamExtractor
>>> from torch.distributions import Normal, Independent
>>> td = TensorDict(
...     {"input": torch.randn(3, 4), "hidden": torch.randn(3, 8)}, [3]
... )
>>> net = torch.nn.GRUCell(4, 8)
>>> module = TensorDictModule(
...     net, in_keys=["input", "hidden"], out_keys=["params"]
... )
>>> normal_params = TensorDictModule(
...     NormalParamExtractor(), in_keys=["params"], out_keys=["loc", "scale"]
... )
>>> def IndepNormal(**kwargs):
...     return Independent(Normal(**kwargs), 1)
>>> prob_module = ProbabilisticTensorDictModule(
...     in_keys=["loc", "scale"],
...     out_keys=["action"],
...     distribution_class=IndepNormal,
...     return_log_prob=True,
... )
>>> td_module = ProbabilisticTensorDictSequential(
...     module, normal_params, prob_module
... )
>>> params = TensorDict.from_module(td_module)
>>> with params.to_module(td_module):
...     _ = td_module(td)
>>> print(td)
TensorDict(
    fields={
        action: Tensor(shape=torch.Size([3, 4]), device=cpu, dtype=torch.float32, is_shared=False),
        hidden: Tensor(shape=torch.Size([3, 8]), device=cpu, dtype=torch.float32, is_shared=False),
        input: Tensor(shape=torch.Size([3, 4]), device=cpu, dtype=torch.float32, is_shared=False),
        loc: Tensor(shape=torch.Size([3, 4]), device=cpu, dtype=torch.float32, is_shared=False),
        params: Tensor(shape=torch.Size([3, 8]), device=cpu, dtype=torch.float32, is_shared=False),
        sample_log_prob: Tensor(shape=torch.Size([3]), device=cpu, dtype=torch.float32, is_shared=False),
        scale: Tensor(shape=torch.Size([3, 4]), device=cpu, dtype=torch.float32, is_shared=False)},
    batch_size=torch.Size([3]),
    device=None,
    is_shared=False)
>>> with params.to_module(td_module):
...     dist = td_module.get_dist(td)
>>> print(dist)
Independent(Normal(loc: torch.Size([3, 4]), scale: torch.Size([3, 4])), 1)
>>> # we can also apply the module to the TensorDict with vmap
>>> from torch import vmap
>>> params = params.expand(4)
>>> def func(td, params):
...     with params.to_module(td_module):
...         return td_module(td)
>>> td_vmap = vmap(func, (None, 0))(td, params)
>>> print(td_vmap)
TensorDict(
    fields={
        action: Tensor(shape=torch.Size([4, 3, 4]), device=cpu, dtype=torch.float32, is_shared=False),
        hidden: Tensor(shape=torch.Size([4, 3, 8]), device=cpu, dtype=torch.float32, is_shared=False),
        input: Tensor(shape=torch.Size([4, 3, 4]), device=cpu, dtype=torch.float32, is_shared=False),
        loc: Tensor(shape=torch.Size([4, 3, 4]), device=cpu, dtype=torch.float32, is_shared=False),
        params: Tensor(shape=torch.Size([4, 3, 8]), device=cpu, dtype=torch.float32, is_shared=False),
        sample_log_prob: Tensor(shape=torch.Size([4, 3]), device=cpu, dtype=torch.float32, is_shared=False),
        scale: Tensor(shape=torch.Size([4, 3, 4]), device=cpu, dtype=torch.float32, is_shared=False)},
    batch_size=torch.Size([4, 3]),
    device=None,
    is_shared=False)
"""  # noqa: E501


def run(example: str) -> tuple[doctest.TestResults, str, dict]:
    """The counts, the printed differences, and the names that the example leaves behind."""
    test = doctest.DocTestParser().get_doctest(example, {}, "seed", None, 0)
    said: list[str] = []
    results = doctest.DocTestRunner(verbose=False).run(test, out=said.append, clear_globs=False)
    return results, "".join(said), test.globs


def test_the_example_prints_what_the_seed_prints():
    results, said, left = run(EXAMPLE)
    assert results.failed == 0, said
    assert results.attempted == EXAMPLE.count("\n>>> ") - EXAMPLE.count("\n>>> #")
    # The example takes the mode, so that vmap over four equal copies gives four equal results.
    for key in ("action", "sample_log_prob"):
        torch.testing.assert_close(
            left["td_vmap"][key], left["td"][key].expand(4, *left["td"][key].shape)
        )


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("action: Tensor(shape=torch.Size([3, 4])", "action: Tensor(shape=torch.Size([3, 5])"),
        ("sample_log_prob", "action_log_prob"),
        ("dtype=torch.float32", "dtype=torch.float64"),
        ("Independent(Normal(loc", "Normal(loc"),
    ],
)
def test_another_print_would_fail(right, wrong):
    source, printed = EXAMPLE.split(">>> print(td)\n")
    results, _, _ = run(source + ">>> print(td)\n" + printed.replace(right, wrong, 1))
    assert results.failed == 1
