"""Policies compiled ahead of time: the same results as the policy itself, for less time a call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

import fastprob as fp
from fastprob.counter import CounterStream
from fastprob.export import export_program
from fastprob.specs import Bounded, Categorical
from tests._modules import RANDOM, TYPES, assert_same, head, keys, normal_td

OBS, ACTIONS = 5, 4


class Net(torch.nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(OBS, n) for n in sizes)

    def forward(self, x: torch.Tensor) -> Any:
        first, *rest = (layer(x) for layer in self.layers)
        return (first, *(torch.nn.functional.softplus(r) + 0.1 for r in rest)) if rest else first


def policy(names: list[str], **config: Any) -> Any:
    net = TensorDictModule(Net(*[ACTIONS] * len(names)), ["obs"], names)
    cls = fp.SafeProbabilisticModule if "spec" in config else fp.ProbabilisticTensorDictModule
    return fp.ProbabilisticTensorDictSequential(
        net, cls(names, ["action"], return_log_prob=True, **config)
    )


FAMILIES = {
    "safe Normal": (
        ["loc", "scale"],
        {
            "distribution_class": "IndependentNormal",
            "spec": Bounded(-0.5, 0.5, shape=(ACTIONS,)),
            "safe": True,
        },
    ),
    "TanhNormal": (["loc", "scale"], {"distribution_class": "TanhNormal"}),
    "TruncatedNormal": (
        ["loc", "scale"],
        {
            "distribution_class": "TruncatedNormal",
            "distribution_kwargs": {"low": -1.0, "high": 1.0},
        },
    ),
    "safe Categorical": (
        ["logits"],
        {"distribution_class": "Categorical", "spec": Categorical(ACTIONS), "safe": True},
    ),
}


def given(rows: int) -> TensorDict:
    draw = torch.Generator().manual_seed(rows)
    return TensorDict(obs=torch.randn(rows, OBS, generator=draw), batch_size=[rows])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("safe Normal", kind) for kind in TYPES),
        *((name, RANDOM) for name in FAMILIES if name != "safe Normal"),
        ("TanhNormal", fp.InteractionType.MEAN),
        ("safe Categorical", fp.InteractionType.MEAN),
    ],
    ids=str,
)
@torch.no_grad()
def test_an_exported_program_gives_what_the_policy_gives(name, kind):
    names, config = FAMILIES[name]
    module = policy(names, **config)
    if name == "safe Categorical" and kind.value == "mean":
        with pytest.raises(Exception, match="no log-probability"):
            export_program(module, given(3), kind)
        return
    program = export_program(module, given(3), kind).module()
    for rows in (3, 7):
        td = given(rows)
        torch.manual_seed(1)
        with fp.set_interaction_type(kind):
            expected = module(td.copy())
        torch.manual_seed(1)
        found = dict(zip(module.out_keys, program(td["obs"]), strict=True))
        assert_same(TensorDict(found, [rows]), expected.select(*module.out_keys))


@torch.no_grad()
def test_a_file_and_back(tmp_path):
    names, config = FAMILIES["safe Normal"]
    module = policy(names, **config)
    path = tmp_path / "policy.pt2"
    assert fp.export_policy(module, given(16), "random", path) == str(path)
    loaded = fp.load_policy(path)
    assert loaded.in_keys == ["obs"]
    assert loaded.out_keys == module.out_keys == ["loc", "scale", "action", "sample_log_prob"]
    assert loaded.interaction_type is RANDOM
    for rows in (16, 2, 33):
        for _ in range(2):
            td = given(rows)
            torch.manual_seed(rows)
            expected = module(td.copy(), interaction_type="random")
            torch.manual_seed(rows)
            # Whatever is set: the type was chosen when the file was made.
            with fp.set_interaction_type("mode"):
                assert loaded(td) is td
            assert_same(td, expected)
    first = td["action"]
    assert not torch.equal(loaded(given(33))["action"], first)
    # Another tensordict, and an input that is no block of memory.
    wide = torch.randn(4, 2 * OBS)
    td = TensorDict(obs=wide[:, ::2], batch_size=[4])
    torch.manual_seed(0)
    out = loaded(td, TensorDict(batch_size=[4]))
    assert keys(td) == ["obs"]
    torch.manual_seed(0)
    assert_same(out, module(td, TensorDict(batch_size=[4]), interaction_type="random"))
    # What fitted before does not vouch for a tensordict of another kind.
    loaded(given(33))
    td = given(33)
    other = TensorDict(batch_size=[32])
    with pytest.raises(RuntimeError, match=r"cannot write 'loc' of shape"):
        loaded(td, other)
    assert keys(other) == []
    with pytest.raises(RuntimeError, match="lock"):
        loaded(given(33).lock_())
    assert loaded(td, TensorDict(batch_size=[]))["action"].shape == (33, ACTIONS)
    assert loaded(given(33).to("cpu"))["action"].device == torch.device("cpu")
    with pytest.raises(KeyError, match=r"reads 'obs'.*it has \['other'\]"):
        loaded(TensorDict(other=torch.zeros(3, OBS), batch_size=[3]))
    for bad in (torch.zeros(3, OBS + 1), torch.zeros(3, OBS, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"reads 'obs' as torch.float32 of shape \(2 or more"):
            loaded(TensorDict(obs=bad, batch_size=[3]))
    with pytest.raises(ValueError, match=r"got torch.float32 of shape \(1, 5\)"):
        loaded(given(1))


def test_what_cannot_be_exported(tmp_path):
    names, config = FAMILIES["TanhNormal"]
    module = policy(names, **config)
    with pytest.raises(ValueError, match=r"must end in .pt2, got 'policy.bin'"):
        fp.export_policy(module, given(3), "random", "policy.bin")
    with pytest.raises(ValueError, match=r"interaction_type must be"):
        fp.export_policy(module, given(3), "likeliest", tmp_path / "p.pt2")
    with pytest.raises(KeyError, match=r"no tensor under 'obs'.*it has \['loc', 'scale'\]"):
        fp.export_policy(module, normal_td(3), "random", tmp_path / "p.pt2")
    with pytest.raises(ValueError, match=r"batch size is \(1,\)"):
        fp.export_policy(module, given(1), "random", tmp_path / "p.pt2")
    with pytest.raises(FileNotFoundError, match=r"no exported policy at .*nothing.pt2"):
        fp.load_policy(tmp_path / "nothing.pt2")
    for source, said in ((3, "cannot take the generator= of this module"), ("seed", "the seed")):
        with pytest.raises(RuntimeError, match=said):
            td = TensorDict(normal_td(3).to_dict())
            td["seed"] = torch.tensor(3)
            reads = head(generator=source)
            reads.in_keys = [*reads.in_keys]
            if source == "seed":
                reads = Reads(reads)
            export_program(reads, td, "random")


class Reads(torch.nn.Module):
    """A head whose seed is one of its inputs."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module
        self.in_keys, self.out_keys = [*module.in_keys, "seed"], module.out_keys

    def forward(self, td: Any) -> Any:
        return self.module(td)


@torch.no_grad()
def test_a_counter_stream_is_carried_along():
    module = head(generator=CounterStream(5))
    program = export_program(module, normal_td(3), "random").module()
    again = head(generator=CounterStream(5))
    # Tracing the example is no draw.
    assert module.generator.state.tolist() == [5, 0]
    for _ in range(2):
        td = normal_td(3)
        expected = again(td.copy(), interaction_type="random")["action"]
        torch.testing.assert_close(program(td["loc"], td["scale"])[0], expected)
