"""CudaGraphPolicy on a GPU: what the stand-in cannot show."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

import fastprob as fp
from fastprob.counter import CounterStream
from tests._graphs import policy_of

pytestmark = pytest.mark.gpu
# A graph runs the kernels of eager mode on the same inputs; only a matrix product may choose
# another algorithm for it.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(autouse=True)
def _rollout_like():
    """No gradients, and no argument checks: they wait for the device."""
    before = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(False)
    with torch.no_grad():
        yield
    torch.distributions.Distribution.set_default_validate_args(before)


def observations(*batch: int) -> TensorDict:
    return TensorDict(obs=torch.randn(*batch, 3, device="cuda"), batch_size=batch)


def make(**head: Any) -> tuple[Any, fp.CudaGraphPolicy]:
    policy = policy_of(**{"safe": False, "spec": None, **head}).to("cuda")
    return policy, fp.CudaGraphPolicy(policy)


def assert_like_eager(graph: Any, policy: Any, given: TensorDict, seed: int = 3) -> Any:
    torch.manual_seed(seed)
    theirs = policy(given.copy())
    after = torch.cuda.get_rng_state()
    torch.manual_seed(seed)
    ours = graph(given.copy())
    assert torch.equal(torch.cuda.get_rng_state(), after), "another number of random draws"
    assert list(ours.keys(True, True)) == list(theirs.keys(True, True))
    for key, value in theirs.items(True, True):
        torch.testing.assert_close(ours[key], value, **CLOSE)
    return ours


def ks_statistic(sample: torch.Tensor) -> float:
    """Kolmogorov's distance to the standard normal distribution."""
    ordered = sample.double().flatten().sort().values
    ranks = torch.arange(len(ordered) + 1, device=ordered.device, dtype=torch.float64) / len(
        ordered
    )
    cdf = torch.special.ndtr(ordered)
    return float(torch.maximum(ranks[1:] - cdf, cdf - ranks[:-1]).max())


@pytest.mark.parametrize("batch", [1, 64, 4096, 65536])
@pytest.mark.parametrize("kind", ["random", "mode", "mean"])
def test_calls_are_those_of_the_policy(kind, batch):
    policy, graph = make()
    with fp.set_interaction_type(kind):
        for seed in range(4):
            assert_like_eager(graph, policy, observations(batch), seed)
    (held,) = graph.graphs
    assert (held.captured, held.replays) == (True, 4)


@pytest.mark.parametrize(
    "name",
    ["TanhNormal", "TruncatedNormal", "Categorical", "OneHotCategorical", "Bernoulli", "Beta"],
)
def test_families(name):
    keys = {
        "TanhNormal": ["loc", "scale"],
        "TruncatedNormal": ["loc", "scale"],
        "Beta": ["concentration1", "concentration0"],
    }.get(name, ["logits"])
    policy = fp.ProbabilisticTensorDictModule(
        in_keys=keys,
        out_keys=["action"],
        distribution_class=name,
        default_interaction_type="random",
        return_log_prob=True,
    )
    graph = fp.CudaGraphPolicy(policy)
    for seed in range(3):
        for kind in ("random", "mode"):
            given = TensorDict({k: torch.rand(64, 3, device="cuda") + 1.1 for k in keys}, [64])
            with fp.set_interaction_type(kind):
                assert_like_eager(graph, policy, given, seed)
    assert [g.captured for g in graph.graphs] == [True, True]


def test_a_thousand_replays_draw_afresh_from_the_distribution():
    policy, graph = make()
    given = observations(64)
    parameters = policy(given.copy())
    draws = torch.stack([graph(given.copy())["action"] for _ in range(1000)])
    noise = (draws - parameters["loc"]) / parameters["scale"]
    assert len(draws.flatten(1).unique(dim=0)) == 1000
    # 1.95 / sqrt(n) is exceeded once in a thousand times.
    assert ks_statistic(noise) < 1.95 / noise.numel() ** 0.5
    pairs = torch.stack([noise[1:].flatten(), noise[:-1].flatten()])
    assert abs(torch.corrcoef(pairs)[0, 1]) < 4 / noise.numel() ** 0.5


def test_switching_the_interaction_type_never_repeats_the_wrong_branch():
    policy, graph = make()
    given = observations(16)
    mode = policy(given.copy())["loc"]
    graph.capture(given, interaction_types=["random", "mode", "mean"])
    kinds = [("random", "mode", "mean")[i] for i in torch.randint(3, (1000,)).tolist()]
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for kind in kinds:
        with fp.set_interaction_type(kind):
            action = graph(given.copy())["action"]
        same = torch.isclose(action, mode, **CLOSE).all()
        wrong += same if kind == "random" else ~same
    assert wrong.item() == 0
    assert len(graph.graphs) == 3


@pytest.mark.parametrize("source", ["seed", "generator", "counter"])
def test_a_generator_draws_as_it_does_eagerly(source):
    def made():
        return {
            "seed": lambda: 5,
            "generator": lambda: torch.Generator("cuda").manual_seed(5),
            "counter": lambda: CounterStream(5, "cuda"),
        }[source]()

    inputs = [observations(32) for _ in range(5)]
    policy, _ = make(generator=made())
    expected = [policy(td.copy())["action"] for td in inputs]
    policy, graph = make(generator=made())
    before = torch.cuda.get_rng_state()
    for td, action in zip(inputs, expected, strict=True):
        torch.testing.assert_close(graph(td.copy())["action"], action, **CLOSE)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_no_call_waits_for_the_device():
    _, graph = make()
    inputs = [observations(256) for _ in range(4)]
    for _ in range(2):
        for td in inputs:
            graph(td.copy())
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        # A device that sleeps for a second, while the host goes on.
        torch.cuda._sleep(2_000_000_000)
        last = torch.cuda.Event()
        for td in inputs:
            graph(td.copy())
        last.record()
        assert not last.query()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.synchronize()


def test_updates_are_seen_and_moves_are_noticed():
    policy, graph = make()
    with fp.set_interaction_type("mode"):
        assert_like_eager(graph, policy, observations(8))
        for p in policy.parameters():
            p.add_(0.25)
        assert_like_eager(graph, policy, observations(8))
        (held,) = graph.graphs
        assert held.replays == 2
        policy.load_state_dict({k: v + 1 for k, v in policy.state_dict().items()}, assign=True)
        assert_like_eager(graph, policy, observations(8))
        assert [g.replays for g in graph.graphs] == [1]
        policy.cpu()
        policy.cuda()
        assert_like_eager(graph, policy, observations(8))


def test_streams_are_ordered():
    """Calls in turn on two streams use the same buffers without a race."""
    policy, graph = make(default_interaction_type="mode")
    inputs = [observations(4096) for _ in range(40)]
    graph(inputs[0].copy())
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    current = torch.cuda.current_stream()
    results = []
    for stream in streams:
        stream.wait_stream(current)
    for i, td in enumerate(inputs):
        with torch.cuda.stream(streams[i % 2]):
            # Uneven, so that the streams drift apart where nothing holds them together.
            torch.cuda._sleep(200_000 * (i % 3))
            results.append(graph(td.copy())["action"])
    for stream in streams:
        current.wait_stream(stream)
    for td, action in zip(inputs, results, strict=True):
        torch.testing.assert_close(action, policy(td.copy())["action"], **CLOSE)


def test_a_capture_beside_other_threads_and_garbage():
    policy, graph = make()
    stop = threading.Event()
    failures: list[BaseException] = []

    def work():
        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                while not stop.is_set():
                    loop: list[Any] = [torch.randn(256, 256, device="cuda")]
                    loop.append(loop)
                    (loop[0] @ loop[0]).sum().item()
        except BaseException as err:
            failures.append(err)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for size in range(1, 9):
            with fp.set_interaction_type("mode"):
                assert_like_eager(graph, policy, observations(size))
    finally:
        stop.set()
        thread.join(60)
    assert failures == []
    assert len(graph.graphs) == 8


@pytest.mark.parametrize("probed", [True, False], ids=["foreseen", "met in the capture"])
def test_a_wait_for_the_device_leaves_everything_usable(probed, monkeypatch):
    """Eager draws, earlier graphs and new captures go on after a capture that failed."""
    policy, graph = make()
    assert_like_eager(graph, policy, observations(8))

    def waits(td):
        noise = torch.randn_like(td["obs"])
        return td.set("out", noise * td["obs"].sum().item())

    if not probed:
        from fastprob.graphs import _table

        monkeypatch.setattr(_table, "probed", lambda run, device_type: (run(), None))
    broken = fp.CudaGraphPolicy(waits)
    for _ in range(2):
        with pytest.raises(fp.GraphError, match="waits cannot be captured"):
            broken(observations(4))
    waits(observations(4))
    assert_like_eager(graph, policy, observations(8), seed=9)
    assert_like_eager(graph, policy, observations(9), seed=9)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def test_memory_is_shared_and_given_back():
    _, graph = make()
    torch.cuda.synchronize()
    for _ in range(3):
        before = torch.cuda.memory_allocated()
        for batch in (65536, 32768, 16384):
            graph(observations(batch))
        held = graph.graphs
        assert [g.memory > 0 for g in held] == [True] * 3
        # The smaller ones fit into what the largest one took.
        assert sum(g.memory for g in held) < 2 * held[0].memory
        gc.disable()
        try:
            graph.reset()
            assert torch.cuda.memory_allocated() <= before + (1 << 20)
        finally:
            gc.enable()


def test_wrong_devices_and_gradients():
    policy, graph = make()
    with pytest.raises(fp.GraphError, match="input 'obs' is on cpu"):
        graph(TensorDict(obs=torch.zeros(2, 3), batch_size=[2]))
    with torch.enable_grad(), pytest.raises(fp.GraphError, match="requires a gradient"):
        graph(observations(2))
    assert_like_eager(graph, policy, observations(2))


def test_a_compiled_policy():
    net = torch.compile(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh()).cuda())
    policy = TensorDictModule(net, in_keys=["obs"], out_keys=["out"])
    graph = fp.CudaGraphPolicy(policy)
    for batch in (8, 8, 16):
        given = observations(batch)
        ours = graph(given.copy())["out"]
        torch.testing.assert_close(ours, policy(given.copy())["out"], **CLOSE)
    assert [g.captured for g in graph.graphs] == [True, True]


def test_an_outer_capture_holds_the_policy():
    """In somebody else's graph the policy's operations are captured, not a graph of them."""
    policy, graph = make(default_interaction_type="mode")
    given = observations(8)
    graph(given.copy())
    outer = torch.cuda.CUDAGraph()
    static = given.copy()
    with torch.cuda.graph(outer):
        out = graph(static.copy())["action"]
    given["obs"].copy_(torch.randn(8, 3, device="cuda"))
    outer.replay()
    torch.testing.assert_close(out, policy(given.copy())["action"], **CLOSE)
