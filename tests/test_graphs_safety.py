"""What a graph refuses, how long its outputs last, threads, garbage, compilers, and its cost."""

from __future__ import annotations

import contextlib
import doctest
import gc
import importlib
import subprocess
import sys
import textwrap
import threading
import time
import types
import weakref
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

import fastprob as fp
from fastprob.graphs import RecordingBackend
from fastprob.graphs import _backend as backend_module
from fastprob.graphs import _table as table_module
from fastprob.graphs._backend import CudaBackend, Graph
from tests._graphs import assert_like_eager, graphed, observations, policy_of

policy_module = importlib.import_module("fastprob.graphs.policy")
step_module = importlib.import_module("fastprob.graphs.step")
rollout_module = importlib.import_module("fastprob.graphs.rollout")


@pytest.fixture(autouse=True)
def _rollout_like():
    """No gradients, and no argument checks: they look at values, which no graph can hold."""
    before = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(False)
    with torch.no_grad():
        yield
    torch.distributions.Distribution.set_default_validate_args(before)


# what is refused -------------------------------------------------------------------------------


def assert_still_usable(graph: Any, policy: Any, make: Any) -> None:
    """After an error: the policy by itself, the object switched off, and other calls of it."""
    with torch.no_grad():
        policy(make())
        graph.enabled = False
        assert_like_eager(graph, policy, make)
        graph.enabled = True


def test_an_input_that_needs_a_gradient():
    policy = policy_of()
    graph, backend = graphed(policy)
    needs = TensorDict(obs=torch.randn(4, 3, requires_grad=True), batch_size=[4])
    with torch.enable_grad(), pytest.raises(fp.GraphError, match=r"input 'obs' of Safe.*gradient"):
        graph(needs)
    assert list(needs.keys()) == ["obs"]
    assert backend.captures == 0
    assert_still_usable(graph, policy, lambda: observations(4))
    assert_like_eager(graph, policy, lambda: observations(4))


def test_an_output_that_needs_a_gradient():
    policy = policy_of()
    graph, _ = graphed(policy)
    with torch.enable_grad(), pytest.raises(fp.GraphError, match=r"output 'loc'.*torch\.no_grad"):
        graph(observations(4))
    assert graph.graphs == []
    assert_still_usable(graph, policy, lambda: observations(4))
    assert_like_eager(graph, policy, lambda: observations(4))


def test_a_tensor_on_another_device():
    policy = policy_of()
    graph, backend = graphed(policy)
    with pytest.raises(fp.GraphError, match=r"on cpu, but its input 'obs' is on meta"):
        graph(TensorDict(obs=torch.randn(4, 3, device="meta"), batch_size=[4]))
    assert backend.captures == 0
    assert_still_usable(graph, policy, lambda: observations(4))
    assert_like_eager(graph, policy, lambda: observations(4))


def _item(td):
    return td.set("out", td["obs"] * td["obs"].sum().item())


def _branch(td):
    return td.set("out", td["obs"] + 1 if (td["obs"] > 100).any() else td["obs"])


def _mask(td):
    return td.set("out", td["obs"][td["obs"] > 0].sum().expand(4))


def _unique(td):
    return td.set("out", td["obs"].unique().sum().expand(4))


def _equal(td):
    return td.set("out", td["obs"] + torch.equal(td["obs"], td["obs"]))


@pytest.mark.parametrize(
    ("policy", "operation"),
    [
        (_item, "aten._local_scalar_dense.default"),
        (_branch, "aten._local_scalar_dense.default"),
        (_mask, "aten.index.Tensor"),
        (_unique, "aten._unique2.default"),
        (_equal, "aten.equal.default"),
    ],
)
def test_a_wait_for_the_device_is_named_with_its_line(policy, operation):
    graph, backend = graphed(policy)
    line = policy.__code__.co_firstlineno + 1
    with pytest.raises(fp.GraphError) as caught:
        graph(observations(4))
    text = str(caught.value)
    assert f"{policy.__name__} cannot be captured: the operation {operation}" in text
    assert f"test_graphs_safety.py:{line}, in {policy.__name__}" in text
    assert (backend.captures, graph.graphs) == (0, [])
    assert_still_usable(graph, policy, lambda: observations(4))


def test_what_does_not_wait_is_captured():
    """The same decisions, made on the device."""

    def policy(td):
        obs = td["obs"].clone()
        obs[obs > 1] = 0.0
        many = torch.where((obs > 100).any(), obs + 1, obs)
        hot = torch.nn.functional.one_hot(obs.argmax(-1), 3)
        return td.set("out", many * hot).set("top", obs.topk(2).values)

    graph, backend = graphed(policy)
    for seed in range(3):
        assert_like_eager(graph, policy, lambda: observations(4), seed)
    assert backend.captures == 1


def test_an_error_of_the_policy_is_the_policys():
    graph, _ = graphed(policy_of())
    with pytest.raises(KeyError, match="obs"):
        graph(TensorDict(other=torch.zeros(2, 3), batch_size=[2]))
    assert graph.graphs == []


def test_a_failure_of_the_capture_itself_names_it():
    class Breaks(RecordingBackend):
        def capture(self, run, generators):
            raise RuntimeError("operation not permitted when stream is capturing")

    policy = policy_of()
    graph = fp.CudaGraphPolicy(policy, backend=Breaks())
    with pytest.raises(fp.GraphError, match=r"cannot be captured.*not permitted") as caught:
        graph(observations(4))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert table_module.nesting.depth == 0
    assert gc.isenabled()
    assert_still_usable(graph, policy, lambda: observations(4))


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"policy must be a module or a function.*got int"):
        fp.CudaGraphPolicy(3)  # type: ignore[arg-type]
    for name in ("warmup", "max_graphs"):
        for value in (0, -1, 1.0, True, None):
            with pytest.raises(ValueError, match=f"{name} must be an int of 1 or more"):
                fp.CudaGraphPolicy(policy_of(), **{name: value})
    with pytest.raises(RuntimeError, match="device"):
        fp.CudaGraphPolicy(policy_of(), device="nowhere")
    graph, _ = graphed(lambda td: td["obs"])
    with pytest.raises(fp.GraphError, match=r"returned a Tensor; .*return a tensordict"):
        graph(observations(2))
    graph, _ = graphed(lambda td, scale=None: td)
    with pytest.raises(TypeError, match="'scale' is a Tensor; a graph takes plain tensors"):
        graph(observations(2), scale=torch.ones(2))


def test_tensors_of_other_kinds():
    class Odd(torch.Tensor):
        pass

    graph, _ = graphed(lambda td: td.set("out", td["obs"] + 1))
    odd = torch.randn(4, 3).as_subclass(Odd)
    with pytest.raises(TypeError, match="'obs' is a Odd; a graph takes plain tensors"):
        graph(TensorDict(obs=odd, batch_size=[4]))


# how long outputs last -------------------------------------------------------------------------


def test_outputs_handed_over_are_overwritten_by_the_next_call():
    graph, _ = graphed(policy_of(), clone_outputs=False)
    first = graph(observations(4))
    kept = first.clone()
    second = graph(observations(4))
    assert first["action"].data_ptr() == second["action"].data_ptr()
    assert torch.equal(first["action"], second["action"])
    assert not torch.equal(first["action"], kept["action"])
    # Graphs of other kinds have outputs of their own.
    other = graph(observations(5))["action"].clone()
    graph(observations(4))
    assert torch.equal(graph.policy(observations(5))["action"], other) is False
    # Resizing what was handed over does not resize the buffer.
    second["action"].resize_(1)
    assert graph(observations(4))["action"].shape == (4, 2)


@pytest.mark.parametrize("how", ["tensordict", "tensor", "view", "list"])
def test_debug_finds_outputs_that_are_still_in_use(how):
    graph, _ = graphed(policy_of(), clone_outputs=False, debug=True)
    result = graph(observations(4))
    held: Any = {
        "tensordict": lambda: result,
        "tensor": lambda: result["action"],
        "view": lambda: result["action"][0, :1],
        "list": lambda: [result["action"]],
    }[how]()
    if how != "tensordict":
        del result
    name = "loc" if how == "tensordict" else "action"
    with pytest.raises(fp.GraphError, match=f"output '{name}' .* still in use"):
        graph(observations(4))
    # A call of another kind overwrites nothing of it.
    graph(observations(5))
    if how == "tensordict":
        del result
    del held
    graph(observations(4))


def test_debug_lets_a_loop_go_on_with_its_tensordict():
    """The entries that this very call replaces are nobody's any more."""
    policy = policy_of()
    graph, backend = graphed(policy, clone_outputs=False, debug=True)
    td = observations(4)
    copies = []
    for _ in range(4):
        td = graph(td)
        copies.append(td.clone())
        td["obs"] = torch.randn(4, 3)
    assert backend.captures == 1
    assert not torch.equal(copies[0]["action"], copies[1]["action"])


# garbage ---------------------------------------------------------------------------------------


def test_no_reference_cycle():
    policy = policy_of()
    graph, _ = graphed(policy, clone_outputs=False, debug=True)
    gc.collect()
    gc.disable()
    try:
        for kind in ("random", "mode"):
            with fp.set_interaction_type(kind):
                graph(observations(4))
        with contextlib.suppress(fp.GraphError):
            graph(TensorDict(obs=torch.randn(4, 3, device="meta"), batch_size=[4]))
        entries = list(graph._table.entries.values())
        gone = [weakref.ref(x) for e in entries for x in (*e.static, *e.outputs)]
        gone.append(weakref.ref(graph))
        del entries, graph
        assert [ref() for ref in gone] == [None] * len(gone)
        # Nothing of the graph keeps the policy, and nothing keeps the graph's hold on its memory.
        weight = weakref.ref(policy[0].module[0].weight)
        del policy
        assert weight() is None
    finally:
        gc.enable()


def test_evicted_and_replaced_graphs_are_freed_at_once():
    policy = policy_of()
    graph, _ = graphed(policy, max_graphs=1)
    gc.collect()
    gc.disable()
    try:
        graph(observations(4))
        (entry,) = graph._table.entries.values()
        first = weakref.ref(entry.static[0])
        del entry
        graph(observations(5))
        assert first() is None
        (entry,) = graph._table.entries.values()
        second = weakref.ref(entry.static[0])
        del entry
        graph.reset()
        assert second() is None
    finally:
        gc.enable()


def test_garbage_is_not_collected_during_a_capture():
    seen = []

    class Looks(RecordingBackend):
        def capture(self, run, generators):
            seen.append(gc.isenabled())
            return super().capture(run, generators)

    graph = fp.CudaGraphPolicy(policy_of(), backend=Looks())
    graph(observations(2))
    assert seen == [False]
    assert gc.isenabled()
    gc.disable()
    try:
        graph(observations(3))
        assert not gc.isenabled()
    finally:
        gc.enable()


# threads ---------------------------------------------------------------------------------------


def run_threads(functions: list[Any]) -> None:
    failures: list[BaseException] = []

    def guarded(function: Any) -> None:
        try:
            with torch.no_grad():
                function()
        except BaseException as err:
            failures.append(err)

    threads = [threading.Thread(target=guarded, args=(f,)) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


def test_threads_share_a_policy():
    """Two batch sizes, four threads: no call sees another's inputs or outputs."""
    policy = policy_of(default_interaction_type="mode")
    graph, backend = graphed(policy)

    def use(seed):
        generator = torch.Generator().manual_seed(seed)
        for i in range(40):
            obs = torch.randn(2 + i % 2, 3, generator=generator)
            ours = graph(TensorDict(obs=obs, batch_size=[len(obs)]))
            assert torch.equal(ours["action"], policy(TensorDict(obs=obs))["action"])

    # tensordict 0.14 has one interaction type for all threads, which a policy without one sets.
    with fp.set_interaction_type("mode"):
        run_threads([lambda seed=seed: use(seed) for seed in range(4)])
    assert backend.captures == 2
    assert sum(g.replays for g in graph.graphs) == 160


def test_one_capture_at_a_time():
    """Captures of different policies in different threads take turns."""
    inside, most = [0], [0]

    class Counts(RecordingBackend):
        def capture(self, run, generators):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.01)
            try:
                return super().capture(run, generators)
            finally:
                inside[0] -= 1

    graphs = [fp.CudaGraphPolicy(policy_of(), backend=Counts()) for _ in range(4)]
    run_threads([lambda g=g: g(observations(3)) for g in graphs])
    assert most == [1]
    assert [len(g.graphs) for g in graphs] == [1] * 4


def test_threads_leave_the_compiler_as_it_was():
    """Its stance is one for all threads, and is changed while operations are looked at."""
    importlib.import_module("torch._dynamo")
    graphs = [graphed(policy_of())[0] for _ in range(4)]
    run_threads([lambda g=g: [g(observations(n)) for n in range(1, 6)] for g in graphs])
    counts: list[int] = []
    torch.compile(lambda x: x + 1, backend=counting(counts))(torch.ones(2))
    assert len(counts) == 1


def test_a_capture_beside_other_work():
    """A thread that computes, draws from its own generator and makes garbage meanwhile."""
    policy = policy_of()
    graph, _ = graphed(policy)
    stop = threading.Event()

    def work():
        generator = torch.Generator().manual_seed(0)
        while not stop.is_set():
            loop: list[Any] = [torch.randn(4, 4, generator=generator)]
            loop.append(loop)
            gc.collect(0)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for size in range(1, 8):
            assert_like_eager(graph, policy, lambda size=size: observations(size))
    finally:
        stop.set()
        thread.join(60)


# compilers -------------------------------------------------------------------------------------


class Runs(RecordingBackend):
    """Captures by calling and replays by calling again, so that compiled code runs compiled."""

    def capture(self, run, generators):
        result = run()
        self.captures += 1

        def replay():
            again = run()
            for old, new in zip(
                result[2].values(True, True), again[2].values(True, True), strict=True
            ):
                old.copy_(new)

        return Graph(replay, 0), result


def counting(counts: list[int]) -> Any:
    def compiler(module, inputs):
        counts.append(1)
        return module.forward

    return compiler


def test_a_compiled_policy_is_compiled_before_it_is_captured():
    counts: list[int] = []
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh())
    compiled = torch.compile(net, backend=counting(counts), dynamic=False)
    policy = TensorDictModule(compiled, in_keys=["obs"], out_keys=["out"])
    graph = fp.CudaGraphPolicy(policy, backend=Runs())
    for i in range(3):
        given = observations(4)
        assert torch.equal(graph(given.copy())["out"], policy(given.copy())["out"])
        assert len(counts) == 1, i
    graph(observations(5))
    assert len(counts) == 2


def test_a_compilation_during_a_capture_is_refused_and_others_are_not():
    class Fickle(torch.nn.Module):
        """Asks for another compilation each time."""

        def __init__(self):
            super().__init__()
            self.calls = 0
            self.inner = torch.compile(self.add, backend=counting([]), dynamic=False)

        def add(self, x, n):
            return x + n.sum()

        def forward(self, x):
            self.calls += 1
            return self.inner(x, torch.ones(self.calls))

    policy = TensorDictModule(Fickle(), in_keys=["obs"], out_keys=["out"])
    graph = fp.CudaGraphPolicy(policy, backend=Runs())
    with pytest.raises(fp.GraphError, match="would compile during the capture"):
        graph(observations(4))
    # Outside of a capture it may.
    policy(observations(4))

    other = torch.compile(lambda x: x * 2, backend=counting([]), dynamic=False)

    class Elsewhere(Runs):
        def capture(self, run, generators):
            run_threads([lambda: other(torch.ones(3))])
            return super().capture(run, generators)

    graph, policy = fp.CudaGraphPolicy(policy_of(), backend=Elsewhere()), policy_of()
    assert_like_eager(graph, policy, lambda: observations(4))


def test_the_stand_in_leaves_compiled_functions_compiled():
    """Under a dispatch mode the compiler would give a function up for good."""
    counts: list[int] = []
    compiled = torch.compile(torch.nn.Linear(3, 4), backend=counting(counts), dynamic=False)
    policy = TensorDictModule(compiled, in_keys=["obs"], out_keys=["out"])
    graph, backend = graphed(policy)
    given = observations(4)
    assert torch.allclose(graph(given.copy())["out"], policy(given.copy())["out"])
    assert backend.captures == 1
    assert len(counts) == 1
    policy(observations(6))
    assert len(counts) == 2


def test_a_compiled_caller_runs_the_policy():
    policy = policy_of(default_interaction_type="mode", safe=False, spec=None)
    graph, backend = graphed(policy)

    def call(obs):
        return graph(TensorDict(obs=obs, batch_size=[4]))["action"]

    obs = torch.randn(4, 3)
    out = torch.compile(call, backend="eager")(obs)
    assert torch.equal(out, policy(TensorDict(obs=obs, batch_size=[4]))["action"])
    assert backend.captures == 0


# cost ------------------------------------------------------------------------------------------


def best_us(call: Any, rounds: int = 40, calls: int = 300) -> float:
    """Microseconds of this thread's CPU time for a call, in the fastest of many rounds."""
    best = float("inf")
    for _ in range(rounds):
        begin = time.thread_time_ns()
        for _ in range(calls):
            call()
        best = min(best, time.thread_time_ns() - begin)
    return best / calls / 1e3


def test_a_graph_is_looked_up_in_little_python():
    """The goal is 5 us; attributes of a tensor calibrate the machine."""
    graph, _ = graphed(policy_of())
    td = observations(16)
    graph(td)

    def look():
        parts, _, watch = graph._look(td, None, {})
        entry = graph._table.find(parts)
        assert entry.places == watch.places()

    x = td["obs"]

    def calibration():
        # 1.4 us on the machine of the figures below.
        for _ in range(5):
            (x.shape, x.dtype, x.device, x.is_contiguous())

    ratios = []
    for _ in range(3):
        ratios.append(best_us(look) / best_us(calibration))
    # 3.1 was measured, 4.4 us; a walk over `parameters()` alone would add 7.
    assert min(ratios) < 6, ratios


# documentation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [policy_module, step_module, rollout_module])
def test_examples(module):
    with torch.enable_grad():
        results = doctest.testmod(module, raise_on_error=True)
    assert results.attempted > 5


def test_graphs_are_imported_at_first_use():
    code = """
        import sys, fastprob
        assert not [name for name in sys.modules if name.startswith("fastprob.graphs")]
        names = {}
        exec("from fastprob import *", names)
        assert names["CudaGraphPolicy"] is fastprob.graphs.CudaGraphPolicy
        assert fastprob.rollout is fastprob.graphs.rollout
        try:
            fastprob.nothing
        except AttributeError as err:
            print(err)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "module 'fastprob' has no attribute 'nothing'\n", done.stderr


def test_the_benchmark_says_that_there_is_no_gpu(capsys):
    pytest.importorskip("torchrl")
    from bench.__main__ import main

    if torch.cuda.is_available():
        return
    threads = torch.get_num_threads()
    try:
        assert main(["graphs", "--quick"]) == 0
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert "No GPU here" in said
    assert "look-up of a graph" in said


# CUDA's calls, on a fake of them ----------------------------------------------------------------


class FakeCuda:
    """Enough of torch.cuda to see in which order the backend calls it."""

    def __init__(self, fail_at_end: bool = False) -> None:
        self.log: list[Any] = []
        self.stream = self.Stream(self, "first")
        self.fail_at_end = fail_at_end
        self.pools = 0
        fake = self

        class CUDAGraph:
            def register_generator_state(self, generator):
                fake.log.append("register")

            def capture_begin(self, pool=None, capture_error_mode="global"):
                fake.log.append(("begin", fake.stream.name, pool, capture_error_mode))

            def capture_end(self):
                fake.log.append(("end", fake.stream.name))
                if fake.fail_at_end:
                    fake.fail_at_end = False
                    raise RuntimeError("capture was invalidated")

            def replay(self):
                fake.log.append("replay")

            def reset(self):
                fake.log.append("reset")

        self.CUDAGraph = CUDAGraph

    class Stream:
        def __init__(self, fake, name="side"):
            self.fake, self.name = fake, name

        def wait_stream(self, other):
            self.fake.log.append((self.name, "waits for", other.name))

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        @contextlib.contextmanager
        def use(stream):
            before, self.stream = self.stream, stream
            try:
                yield
            finally:
                self.stream = before

        def handle():
            self.pools += 1
            return (0, self.pools)

        def tell(name):
            return lambda device, pool: self.log.append((name, device, pool))

        cuda = types.SimpleNamespace(
            CUDAGraph=self.CUDAGraph,
            Stream=lambda device: self.Stream(self),
            current_stream=lambda device: self.stream,
            graph_pool_handle=handle,
            memory_reserved=lambda device: 0,
            stream=use,
        )
        c = types.SimpleNamespace(
            _cuda_getCurrentRawStream=lambda index: id(self.stream),
            _cuda_endAllocateToPool=tell("endAllocateToPool"),
            _cuda_releasePool=tell("releasePool"),
        )
        zeros = lambda *a, **k: torch.zeros(1)  # noqa: E731
        fake_torch = types.SimpleNamespace(cuda=cuda, _C=c, zeros=zeros, device=torch.device)
        monkeypatch.setattr(backend_module, "torch", fake_torch)


DEVICE = torch.device("cuda", 0)


def test_cuda_captures_on_a_side_stream_in_one_pool_without_waiting(monkeypatch):
    fake = FakeCuda()
    fake.install(monkeypatch)
    backend = CudaBackend(DEVICE)
    own = types.SimpleNamespace(device=DEVICE)
    graphs = [backend.capture(lambda: 5, generators)[0] for generators in ([], [own])]
    side = [
        ("side", "waits for", "first"),
        ("begin", "side", (0, 1), "thread_local"),
        ("end", "side"),
        ("first", "waits for", "side"),
    ]
    assert fake.log == [*side, "register", *side]
    fake.log.clear()
    graphs[0].replay()
    assert fake.log == ["replay"]
    # A pool is gone with its last graph: the next one takes a new handle.
    graphs.clear()
    backend.capture(lambda: 5, [])
    assert fake.pools == 2


def test_cuda_orders_streams_only_where_they_change(monkeypatch):
    fake = FakeCuda()
    fake.install(monkeypatch)
    backend = CudaBackend(DEVICE)
    for _ in range(3):
        backend.order()
    assert fake.log == []
    fake.stream = fake.Stream(fake, "second")
    for _ in range(3):
        backend.order()
    assert fake.log == [("second", "waits for", "first")]


@pytest.mark.parametrize("fail_at_end", [False, True])
def test_cuda_cleans_up_after_a_capture_that_failed(monkeypatch, fail_at_end):
    fake = FakeCuda(fail_at_end)
    fake.install(monkeypatch)
    backend = CudaBackend(DEVICE)

    def run():
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        backend.capture(run, [])
    told = [("endAllocateToPool", 0, (0, 1)), ("releasePool", 0, (0, 1))]
    proper = [("begin", "side", None, "thread_local"), ("end", "side")]
    begun = [("side", "waits for", "first"), ("begin", "side", (0, 1), "thread_local")]
    healed = [*told, *proper] if fail_at_end else []
    assert fake.log == [*begun, ("end", "side"), *healed, "reset"]
    assert fake.stream.name == "first"
    # Not the pool of the capture that failed.
    backend.capture(lambda: 5, [])
    assert fake.pools == 2
