"""The interaction type of one call, and of one thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict import nn as tdnn
from tensordict.nn import probabilistic

import fastprob as fp
from fastprob.interaction import in_this_thread
from fastprob.specs import Unbounded
from tests._modules import MODE, RANDOM, head, keys, normal_td

THREAD_LOCAL = hasattr(probabilistic._interaction_type, "get_thread_mode")


def net(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x, x.exp()


def sequence(*heads: Any, **kwargs: Any) -> Any:
    first = tdnn.TensorDictModule(net, ["obs"], ["loc", "scale"])
    return fp.ProbabilisticTensorDictSequential(first, *heads, **kwargs)


def second_head(cls: type = fp.ProbabilisticTensorDictModule) -> Any:
    return cls(
        in_keys={"loc": "action"},
        out_keys=["next"],
        distribution_class=torch.distributions.Normal,
        distribution_kwargs={"scale": 1.0},
    )


# What is called, with a value that equals "loc" where the type is MODE.
MODULES: dict[str, Callable[[], Any]] = {
    "plain": head,
    "straight": lambda: head(distribution_class="IndependentNormal", return_log_prob=True),
    "safe": lambda: head(fp.SafeProbabilisticModule, spec=Unbounded(4), safe=True),
    "sequence": lambda: sequence(head()),
    "sequence in a sequence": lambda: sequence(fp.ProbabilisticTensorDictSequential(head())),
    "sequence of heads": lambda: sequence(head(), second_head()),
    "upstream's head": lambda: sequence(head(tdnn.ProbabilisticTensorDictModule)),
    "upstream's head last": lambda: sequence(
        head(), second_head(tdnn.ProbabilisticTensorDictModule)
    ),
    "selected keys": lambda: sequence(head(), selected_out_keys=["action"]),
}


def given() -> TensorDict:
    td = normal_td(3)
    td["obs"] = td["loc"]
    return td


def is_mode(td: Any) -> bool:
    result = torch.equal(td["action"], td["loc"])
    if td.get("next", None) is not None:
        assert torch.equal(td["next"], td["action"]) is result
    return result


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_the_keyword_beats_the_global_and_the_default(name, compiled):
    module = call = MODULES[name]()
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(module, backend="aot_eager", fullgraph=True)
    td = given()
    assert is_mode(call(td.copy(), interaction_type="mode"))
    assert not is_mode(call(td.copy(), interaction_type=RANDOM))
    with fp.set_interaction_type("random"):
        assert is_mode(call(td.copy(), interaction_type=MODE))
        assert not is_mode(call(td.copy()))
    with fp.set_interaction_type("mode"):
        assert not is_mode(call(td.copy(), interaction_type="random"))
        assert is_mode(call(td.copy()))
    # Nothing is left behind.
    assert fp.interaction_type() is None
    for part in module.modules():
        if isinstance(part, tdnn.ProbabilisticTensorDictModule):
            part.default_interaction_type = MODE
    assert is_mode(call(td.copy()))


def test_the_keyword_with_num_samples_and_another_tensordict():
    td = normal_td(3)
    module = head(num_samples=2)
    assert module(td.copy(), interaction_type="random")["action"].std(0).min() > 0
    out = head()(td, TensorDict(batch_size=[3]), interaction_type="random")
    assert keys(out) == ["action"]
    assert not torch.equal(out["action"], td["loc"])


def test_the_keyword_in_a_call_with_tensors():
    td = normal_td(3)
    for module, args in (
        (head(), (td["loc"], td["scale"])),
        (fp.ProbabilisticTensorDictSequential(head()), (td["loc"], td["scale"])),
    ):
        value = module(*args, interaction_type="random")
        assert not torch.equal(value, td["loc"])
        value = module(loc=args[0], scale=args[1], interaction_type="mode")
        assert torch.equal(value, td["loc"])


def test_the_keyword_reaches_modules_that_look_at_the_type():
    seen = []

    def look(x):
        seen.append(fp.interaction_type())
        return x

    seq = fp.ProbabilisticTensorDictSequential(
        tdnn.TensorDictModule(look, ["loc"], ["loc"]), head()
    )
    td = normal_td(3)
    seq(td)
    seq(td, interaction_type="random")
    with fp.set_interaction_type("mean"):
        seq(td, interaction_type="random")
        seq(td)
    assert [t.value for t in seen] == ["mode", "random", "random", "mean"]


@pytest.mark.parametrize("module", [head(), sequence(head())], ids=["module", "sequence"])
def test_a_keyword_that_is_no_type(module):
    with pytest.raises(ValueError, match=r"interaction_type must be .* got 'likeliest'"):
        module(given(), interaction_type="likeliest")
    assert fp.interaction_type() is None


# --- threads ---


def in_threads(*runs: Callable[[], None]) -> None:
    """Runs functions at the same time, and raises what one of them raised."""
    failed: list[BaseException] = []

    def guarded(run):
        try:
            run()
        except BaseException as err:
            failed.append(err)

    threads = [threading.Thread(target=guarded, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


@pytest.mark.parametrize("name", [n for n in MODULES if "upstream" not in n])
def test_threads_that_say_the_type_with_the_call_do_not_see_each_other(name):
    module = MODULES[name]()
    start = threading.Barrier(2)

    def ask(kind, wanted):
        def run():
            torch.manual_seed(0)
            start.wait()
            with torch.no_grad():
                for _ in range(150):
                    assert is_mode(module(given(), interaction_type=kind)) is wanted

        return run

    in_threads(ask("mode", True), ask("random", False))
    assert fp.interaction_type() is None


def test_overlapping_calls_leave_no_type_behind():
    """The types of two calls that begin in one order and end in the same."""
    begun, ended = threading.Event(), threading.Event()

    def first(x):
        begun.wait(10)
        return x

    def second(x):
        begun.set()
        assert ended.wait(10)
        return x

    def call(net, kind):
        def run():
            seq = fp.ProbabilisticTensorDictSequential(
                tdnn.TensorDictModule(net, ["loc"], ["loc"]), head(default_interaction_type=kind)
            )
            seq(normal_td(3), interaction_type=kind)
            ended.set()

        return run

    for before in (None, MODE):
        begun.clear()
        ended.clear()
        with fp.set_interaction_type(before):
            in_threads(call(first, "random"), call(second, "mean"))
            assert fp.interaction_type() is before


if THREAD_LOCAL:
    # tensordict 0.15: a type of one thread alone.

    @pytest.mark.parametrize("name", MODULES)
    @pytest.mark.parametrize("other", [None, "mode"], ids=["default", "global"])
    def test_a_thread_does_not_see_the_type_of_another(name, other):
        module = MODULES[name]()
        inside, done = threading.Barrier(2), threading.Barrier(2)

        def has_one():
            with fp.set_interaction_type("random", thread_local=True):
                inside.wait()
                assert not is_mode(module(given()))
                done.wait()

        def has_none():
            inside.wait()
            assert is_mode(module(given()))
            done.wait()

        with fp.set_interaction_type(other):
            in_threads(has_one, has_none)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_both_threads_compiled(compiled):
        module = head()
        td = normal_td(3)
        torch._dynamo.reset()
        call = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
        assert is_mode(call(td.copy()))
        with fp.set_interaction_type("random", thread_local=True):
            assert not is_mode(call(td.copy()))
            in_threads(lambda: None if is_mode(call(td.copy())) else pytest.fail("not the mode"))
        assert is_mode(call(td.copy()))

    def test_a_thread_does_not_see_the_switch_of_another():
        module = head(default_interaction_type="random")
        td = normal_td(3)
        td["action"] = torch.zeros(3, 4)

        def draws():
            assert not torch.equal(module(td.copy())["action"], td["action"])

        with tdnn.set_skip_existing(True, thread_local=True):
            assert torch.equal(module(td.copy())["action"], td["action"])
            in_threads(draws)

    def test_a_sequence_leaves_its_default_type_to_its_own_thread():
        reached, looked = threading.Event(), threading.Event()

        def wait(x):
            reached.set()
            assert looked.wait(10)
            return x

        seq = fp.ProbabilisticTensorDictSequential(
            tdnn.TensorDictModule(wait, ["loc"], ["loc"]), head(default_interaction_type="random")
        )

        def look():
            assert reached.wait(10)
            try:
                assert fp.interaction_type() is None
            finally:
                looked.set()

        in_threads(lambda: seq(normal_td(3)), look)

else:

    def test_one_type_for_all_threads():
        """tensordict 0.14 offers no other; the keyword is what tells threads apart there."""
        seen = []
        with in_this_thread(RANDOM):
            in_threads(lambda: seen.append(fp.interaction_type()))
        assert seen == [RANDOM]
