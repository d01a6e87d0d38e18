"""The benchmarks' own machinery: the timer, the registry, the gate, the rules, the command line."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

pytest.importorskip("torchrl")

from bench import agreement, calls, objectives
from bench.cases import CASES, FAMILIES, SAFE, SHAPES, TARGETS
from bench.families import Expected
from bench.gate import Problem, Provider, WrongResult, compare, verify
from bench.implementations import implementation
from bench.providers import EXPORTED, GRAPHED, NAMES, REDUCED, ROOF, copies, copy_roof
from bench.timing import CudaMeter, Quantiles, Timings, interleave, ratio

ROOT = Path(__file__).resolve().parent.parent
TINY = (5, 3)


class FakeClock:
    """A clock in nanoseconds that only moves when something is called."""

    def __init__(self):
        self.now = 0

    def __call__(self):
        return self.now

    def taking(self, *costs):
        """Returns a call that takes these times in turn, the last one for ever."""
        left = list(costs)

        def call():
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


# ------------------------------------------------------------------------------------- the timer


def test_quantiles_interpolate():
    assert Quantiles.of([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == Quantiles(2.0, 3.5, 5.0)
    assert Quantiles.of([7.0]) == Quantiles(7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="empty sample"):
        Quantiles.of([])


def test_interleave_counts_time_per_call():
    clock = FakeClock()
    timings = interleave(
        {"slow": clock.taking(30_000), "fast": clock.taking(10_000)},
        budget_s=0.0,
        min_rounds=8,
        block_s=60e-6,
        clock=clock,
    )
    assert timings["slow"].inner == 2
    assert timings["fast"].inner == 6
    assert timings["slow"].us == [30.0] * 8
    assert timings["fast"].us == [10.0] * 8
    assert ratio(timings["slow"], timings["fast"]) == Quantiles(3.0, 3.0, 3.0)


def test_ratio_ignores_drift_and_outliers():
    # The machine slows down threefold in the middle, and one round is disturbed: five calls
    # calibrate, then each round is one untimed and one timed call.
    speeds = [1] * 5 + [1, 1] * 10 + [3, 3] * 10 + [3, 50] + [3, 3] * 20
    clock = FakeClock()
    timings = interleave(
        {
            "a": clock.taking(*(4_000 * s for s in speeds)),
            "b": clock.taking(*(2_000 * min(s, 3) for s in speeds)),
        },
        budget_s=0.0,
        min_rounds=41,
        block_s=1e-6,
        clock=clock,
    )
    assert max(timings["a"].us) == 200.0
    assert ratio(timings["a"], timings["b"]).p50 == 2.0


def test_interleave_keeps_to_its_budget_and_limits():
    clock = FakeClock()
    call = clock.taking(1_000_000)
    # A round is an untimed and a timed call: 2 ms.
    timings = interleave({"a": call}, budget_s=0.1, min_rounds=3, block_s=1e-3, clock=clock)
    assert len(timings["a"].us) == 51
    timings = interleave({"a": call}, budget_s=9, max_rounds=7, block_s=1e-3, clock=clock)
    assert len(timings["a"].us) == 7


def test_a_long_call_calibrates_once():
    clock = FakeClock()
    call = clock.taking(120_000_000, 1_000_000)
    # 120 ms are 60 blocks of 2 ms: the next call already belongs to a round.
    (timing,) = interleave({"a": call}, budget_s=0.0, min_rounds=1, clock=clock).values()
    assert (timing.inner, clock.now) == (1, 122_000_000)


# ---------------------------------------------------------------------------- registry and gate


def _sides():
    return {name: implementation(name) for name in ("upstream", "fastprob")}


@pytest.mark.parametrize("name", CASES)
def test_every_case_passes_its_gate(name):
    case = CASES[name]
    shape = objectives.SHAPE if name.startswith("objective") else TINY
    problem = case.build({side: implementation(side) for side in case.sides}, shape)
    assert set(case.providers("cuda", (16, 8))) - {ROOF} <= set(problem.makers)
    # Compiling takes seconds; the tests of other draws below cover its branch of the gate.
    for provider in {*case.sides, "hand"} & set(problem.makers):
        verify(problem, problem.makers[provider](), provider)


def test_targets_name_cases_and_providers():
    for target in TARGETS:
        case = CASES[target.case]
        for shape in target.bounds:
            assert shape in case.at(target.device)
            named = {target.numerator, target.denominator}
            assert named <= set(case.providers(target.device, shape))
    low, high = TARGETS[0], TARGETS[3]
    assert low.met(6.0, (16, 8)) and not low.met(5.9, (16, 8))
    assert high.met(1.5, (16, 8)) and not high.met(1.6, (16, 8))


def test_providers_by_device():
    case = CASES["normal"]
    assert not {*REDUCED, *GRAPHED, ROOF} & set(case.providers("cpu", (16, 8)))
    assert set(case.providers("cuda", (16, 8))) == set(NAMES)
    assert EXPORTED not in case.providers("cpu", (65536, 16))
    assert case.at("cpu") == SHAPES and (1 << 20, 64) in case.at("cuda")


def test_inputs_take_turns_beyond_the_caches():
    assert copies(1) == 8 and copies(60e6) == 4 and copies(1e9) == 2
    problem = CASES["normal"].build(_sides(), TINY)
    provider = problem.makers["fastprob"]()
    drawn = [provider.call() for _ in range(9)]
    assert len({id(out) for out in drawn}) == 8 and drawn[0] is drawn[8]
    roof = copy_roof(1000, "cpu")
    assert roof().numel() == 500


def test_every_family_has_a_safe_case_with_a_target():
    from fastprob.distributions import _registry

    known = {cls.__name__ for cls in _registry._BY_NAME.values()}
    cases = {f"safe_{key}": family.distribution for key, family in FAMILIES.items()}
    assert {*SAFE, "safe_normal"} == set(cases)
    cases["safe_composite"] = "CompositeDistribution"
    assert known == set(cases.values())
    bounds = {
        t.case: t.bounds[16, 8]
        for t in TARGETS
        if t.numerator == "upstream" and t.at_least and (16, 8) in t.bounds
    }
    assert all(bounds[name] >= 4 for name in cases)


def _wrong(provider: Provider, change) -> Provider:
    return replace(provider, read=lambda out: change(dict(provider.read(out))))


WRONG = {
    "score off by 1e-3": lambda got: {**got, "log_prob": got["log_prob"] + 1e-3},
    "action off by 1e-5": lambda got: {**got, "action": got["action"] + 1e-5},
    "not a number": lambda got: {**got, "log_prob": got["log_prob"] * math.nan},
    "another shape": lambda got: {**got, "log_prob": got["log_prob"].unsqueeze(-1)},
    "nothing written": lambda got: {"action": got["action"]},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
def test_gate_refuses_a_wrong_provider(change):
    problem = CASES["normal"].build({"upstream": implementation("upstream")}, TINY)
    right = problem.makers["upstream"]()
    verify(problem, right, "right")
    with pytest.raises(WrongResult, match="wrong"):
        verify(problem, _wrong(right, change), "wrong")


def test_gate_refuses_scoring_the_projected_value():
    problem = CASES["safe_normal"].build({"upstream": implementation("upstream")}, (64, 3))
    right = problem.makers["upstream"]()
    params = implementation("upstream").IndependentNormal, right.call()

    def rescored(got):
        dist = params[0](params[1]["loc"], params[1]["scale"])
        return {**got, "log_prob": dist.log_prob(got["action"])}

    verify(problem, right, "right")
    with pytest.raises(WrongResult, match="log_prob"):
        verify(problem, _wrong(right, rescored), "wrong")


@pytest.mark.parametrize(
    ("name", "entry", "error"),
    [
        # Its value is held less tightly than its score, which is that of the value returned.
        ("safe_truncated_normal", "log_prob", 1e-3),
        ("safe_truncated_normal", "action", 1e-2),
        ("safe_beta", "action", 1e-6),
        ("safe_masked_one_hot", "action", 1),
        ("safe_composite", "stick", 1e-5),
        ("safe_composite", "button_log_prob", 1e-3),
    ],
)
def test_gate_refuses_a_wrong_safe_provider(name, entry, error):
    problem = CASES[name].build({"fastprob": implementation("fastprob")}, TINY)
    right = problem.makers["fastprob"]()
    verify(problem, right, "right")
    with pytest.raises(WrongResult, match="wrong"):
        verify(problem, _wrong(right, lambda got: {**got, entry: got[entry] - error}), "wrong")


def test_gate_refuses_another_draw_and_holds_other_noise():
    problem = CASES["normal"].build({"upstream": implementation("upstream")}, (256, 3))
    right = problem.makers["upstream"]()

    def shifted():
        torch.rand(1)
        return right.call()

    # Another draw is wrong for an eager provider, and fine for one that has its own noise.
    with pytest.raises(WrongResult, match="action"):
        verify(problem, replace(right, call=shifted), "shifted")
    verify(problem, replace(right, call=shifted, same_draw=False), "own noise")
    frozen = right.call().clone()
    with pytest.raises(WrongResult, match="same action"):
        verify(problem, replace(right, call=lambda: frozen, same_draw=False), "frozen")


OWN_NOISE = {
    "too wide": ("normal", lambda got: {**got, "action": got["action"] * 1.2}),
    "one row for all": ("normal", lambda got: {k: v[:1].expand_as(v) for k, v in got.items()}),
    "score of another value": ("tanh_normal", lambda got: {**got, "log_prob": got["log_prob"] + 1}),
    "never the last action": (
        "categorical",
        lambda got: {**got, "action": got["action"].clamp(max=1)},
    ),
    "projected twice": ("safe_normal", lambda got: {**got, "action": got["action"] / 2}),
    "not a number": ("safe_tanh_normal", lambda got: {**got, "action": got["action"] * math.nan}),
}


@pytest.mark.parametrize(("name", "change"), OWN_NOISE.values(), ids=OWN_NOISE.keys())
def test_gate_holds_a_provider_with_noise_of_its_own(name, change):
    problem = CASES[name].build({"upstream": implementation("upstream")}, (2048, 3))
    right = replace(problem.makers["upstream"](), same_draw=False)
    verify(problem, right, "own noise")
    with pytest.raises(WrongResult):
        verify(problem, _wrong(right, change), "wrong")


def test_gate_looks_at_the_last_rows():
    problem = CASES["normal"].build({"upstream": implementation("upstream")}, (20_000, 2))
    right = replace(problem.makers["upstream"](), same_draw=False)

    def stale(got):
        action = got["action"].clone()
        # The rows that no block of 4,096 fills.
        action[16_384:] = action[:3616]
        return {**got, "action": action}

    verify(problem, right, "right")
    with pytest.raises(WrongResult, match="log_prob"):
        verify(problem, _wrong(right, stale), "wrong")


def test_gate_takes_the_score_of_the_value_returned_where_it_is_as_right():
    got = {"log_prob": torch.tensor([1.0, 2.0])}
    expected = Expected(torch.tensor([1.0, 2.5]).double(), 0.1)

    def either(other):
        return lambda results: {"log_prob": torch.tensor([9.0, other]).double()}

    for refused in (None, either(2.2), either(math.nan), lambda results: {}):
        with pytest.raises(WrongResult, match="1 of 2 entries of log_prob"):
            compare("provider", "log_prob", got, expected, refused)
    compare("provider", "log_prob", got, expected, either(2.05))
    problem = CASES["tanh_normal"].build(_sides(), TINY)
    value = torch.full(TINY, 0.9995)
    (scores,) = problem.either_score({"action": value}).values()
    params = FAMILIES["tanh_normal"].params(*TINY)
    normal = torch.distributions.Normal(params["loc"].double(), params["scale"].double())
    squash = torch.distributions.TanhTransform()
    by_torch = torch.distributions.TransformedDistribution(normal, squash)
    torch.testing.assert_close(scores, by_torch.log_prob(value.double()).sum(-1))
    assert CASES["normal"].build(_sides(), TINY).either_score is None


def test_objectives_are_held_to_upstreams_loss_and_gradient():
    problem = CASES["objective_sac"].build(_sides(), objectives.SHAPE)
    right = problem.makers["fastprob"]()
    verify(problem, right, "right")
    for key, factor in (("loss_actor", 1.01), ("grads", 1.01)):
        wrong = _wrong(right, lambda got, key=key, by=factor: {**got, key: got[key] * by})
        with pytest.raises(WrongResult, match=key):
            verify(problem, wrong, "wrong")
    own = replace(right, same_draw=False)
    verify(problem, own, "own noise")
    with pytest.raises(WrongResult, match="loss_qvalue"):
        verify(problem, _wrong(own, lambda got: {**got, "loss_qvalue": got["loss_qvalue"] * 2}), "")
    with pytest.raises(ValueError, match="unknown objective 'dqn'"):
        objectives.make_loss("dqn", accelerated=False)


def test_gate_refuses_wrong_gradients():
    problem: Problem = CASES["normal_train"].build({"upstream": implementation("upstream")}, TINY)
    right = problem.makers["upstream"]()
    with pytest.raises(WrongResult, match="d_scale"):
        verify(
            problem,
            _wrong(right, lambda got: {**got, "d_scale": got["d_scale"] * 1.001}),
            "wrong",
        )


# ------------------------------------------------------------------------------ tables of calls


def _row(name, **us):
    timings = {key.replace("_", " "): Timings(1, value) for key, value in us.items()}
    return calls.Row(CASES[name], (16, 8), timings, {}, {})


def test_slower_lists_form_by_form_and_the_worst_first():
    rows = [
        _row("normal", upstream=[9.0] * 5, fastprob=[3.0] * 5, hand=[2.4] * 5),
        _row("delta", upstream=[3.0] * 5, fastprob=[5.0] * 5),
        _row("safe_normal", upstream_compiled=[4.0] * 5, fastprob_compiled=[8.0] * 5),
        _row("one_hot", upstream_compiled=[1.0] * 5, fastprob=[2.0] * 5, copy_roof=[0.1] * 5),
        _row("beta", upstream_compiled=[4.0] * 5, fastprob=[1.0] * 5, copy_roof=[0.1] * 5),
    ]
    found = calls.slower(rows)
    assert [(item.case, item.ours, item.other, item.ratio.p50) for item in found] == [
        ("safe_normal", "fastprob compiled", "upstream compiled", 0.5),
        ("delta", "fastprob", "upstream", 0.6),
        ("one_hot", "fastprob", "upstream compiled", 0.5),
        ("normal", "fastprob", "hand", pytest.approx(0.8)),
    ]
    assert calls.slower(rows[4:]) == []


def test_targets_are_judged_on_their_own_device():
    rows = [_row("normal", upstream_graph=[9.0], fastprob_graph=[2.0], fastprob=[1.0], hand=[1.0])]
    (on_cpu,) = calls.judge(rows, "cpu")
    assert (on_cpu.target.denominator, on_cpu.met) == ("hand", True)
    (on_gpu,) = calls.judge(rows, "cuda")
    assert (on_gpu.ratio.p50, on_gpu.met) == (4.5, True)


class FakeCuda:
    """A device whose work takes a time of its own, on the host's clock."""

    def __init__(self, clock, device_ns):
        self.clock, self.cost, self.busy_until = clock, device_ns, 0
        self.slept = 0

    def launch(self, host_ns):
        def call():
            self.clock.now += host_ns
            self.busy_until = max(self.busy_until, self.clock.now) + self.cost

        return call

    def synchronize(self):
        self.clock.now = max(self.clock.now, self.busy_until)

    def _sleep(self, cycles):
        self.slept += 1
        self.busy_until = max(self.busy_until, self.clock.now) + cycles // 2

    def Event(self, enable_timing):
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self):
        self.at = max(self.cuda.busy_until, self.cuda.clock.now)

    def synchronize(self):
        self.cuda.synchronize()

    def elapsed_time(self, end):
        return (end.at - self.at) / 1e6


def test_cuda_meter_tells_host_device_and_clock_apart():
    clock = FakeClock()
    cuda = FakeCuda(clock, device_ns=3_000)
    timings = interleave(
        {"a": cuda.launch(host_ns=10_000)},
        budget_s=0.0,
        min_rounds=4,
        block_s=130e-6,
        meter=CudaMeter(cuda, clock),
    )["a"]
    assert timings.inner == 10 and cuda.slept == 4
    # The host is the slower of the two: the device waits for it, but for the last call.
    assert timings.host_us == [10.0] * 4
    assert timings.us == pytest.approx([10.3] * 4)
    # With the queue filled ahead, the device does not wait.
    assert timings.device_us == pytest.approx([3.0] * 4)
    assert {"p50", "host", "device", "rounds"} <= timings.as_dict().keys()


def test_cuda_meter_keeps_within_the_launch_queue():
    clock = FakeClock()
    cuda = FakeCuda(clock, device_ns=1)
    assert CudaMeter(cuda, clock).inner(cuda.launch(host_ns=10), 2e-3) == CudaMeter.MOST


# --------------------------------------------------------------- rules of agreement in the main job


def _batch(offset=0.0, late=0.0):
    generator = torch.Generator().manual_seed(0)
    action = torch.randn(4, 6, 1, generator=generator)
    action[:, 0] += offset
    action[:, 3:] += late
    observation = torch.ones(4, 6, 3)
    return TensorDict(
        {
            "action": action,
            "loc": torch.zeros(4, 6, 1),
            "action_log_prob": torch.zeros(4, 6),
            "observation": observation,
            "next": {"reward": torch.zeros(4, 6, 1)},
        },
        [4, 6],
    )


def test_first_step_allows_rounding_only():
    assert agreement.check_first_step(_batch(), _batch()).passed
    nudged = _batch()
    agreement.rounding_twin(0)(nudged)
    assert not torch.equal(nudged["action"], _batch()["action"])
    assert agreement.check_first_step(_batch(), nudged).passed
    assert not agreement.check_first_step(_batch(), _batch(offset=1e-5)).passed


def test_first_batch_is_held_to_the_rounding_twin():
    twin = _batch(late=1e-5)
    assert agreement.check_first_batch(_batch(), _batch(late=5e-5), twin).passed
    assert not agreement.check_first_batch(_batch(), _batch(late=5e-4), twin).passed
    broken = _batch()
    broken["action"][0, 0] = math.nan
    assert not agreement.check_first_batch(_batch(), broken, twin).passed


def test_returns_are_held_to_the_spread_of_seeds():
    assert agreement.check_returns([-170, -200, -150], [-210, -160, -190]).passed
    assert not agreement.check_returns([-170, -180, -175], [-230, -240, -235]).passed
    assert agreement.final_return([-1000.0, -500.0, -300.0, -200.0]) == -200.0
    assert not agreement.check_learning([[-1200.0, -1100.0, -1000.0, -900.0]]).passed


# ------------------------------------------------------------------------------- the command line


def _bench(*args):
    return subprocess.run(
        [sys.executable, "-m", "bench", *args], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_help_explains_itself():
    done = _bench("--help")
    assert done.returncode == 0, done.stderr
    for word in ("Pendulum-v1", "--quick", "--seed", "--out", "calls"):
        assert word in done.stdout
    assert "--threads" in _bench("calls", "--help").stdout


def test_calls_writes_json(tmp_path, capsys):
    from bench.__main__ import main

    threads = torch.get_num_threads()
    try:
        assert main(["calls", "--quick", "--null", "--case", "delta", "--out", str(tmp_path)]) == 0
        assert main(["calls", "--case", "nothing"]) == 2
        assert main(["calls", "--provider", "nobody"]) == 2
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "Delta, random" in out and "unknown case nothing" in out
    stored = json.loads((tmp_path / "calls.json").read_text())
    assert {"device", "versions", "commit", "date", "command"} <= stored["environment"].keys()
    (row,) = stored["results"]
    assert row["shape"] == [16, 8]
    assert {"p20", "p50", "p80"} <= row["providers"]["fastprob"].keys()


# ----------------------------------------------------------------------------------- the main job


@pytest.fixture
def short_job(monkeypatch):
    from bench import train
    from bench.ppo import Settings

    monkeypatch.setattr(train, "QUICK", Settings(envs=4, steps=40, iterations=1, epochs=1))
    threads = torch.get_num_threads()
    yield train
    torch.set_num_threads(threads)


def test_main_job_checks_and_writes(short_job, tmp_path, capsys):
    from bench.__main__ import main

    assert main(["--quick", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "first step" in out and "FAILED" not in out
    stored = json.loads((tmp_path / "train.json").read_text())
    assert {check["name"]: check["passed"] for check in stored["checks"]} == {
        "first step": True,
        "first batch": True,
    }
    assert stored["cpu_seconds_median"]["fastprob"]["actor, both"] > 0
    assert (tmp_path / "train.png").read_bytes().startswith(b"\x89PNG")


def test_main_job_fails_where_an_actor_draws_other_noise(short_job, monkeypatch, capsys):
    from bench.__main__ import main

    upstream = implementation("upstream")

    class Shifted(upstream.IndependentNormal):
        def sample(self, shape=()):
            torch.rand(1)
            return super().sample(shape)

        def rsample(self, shape=()):
            torch.rand(1)
            return super().rsample(shape)

    sides = {"upstream": upstream, "fastprob": replace(upstream, IndependentNormal=Shifted)}
    monkeypatch.setattr(short_job, "implementation", sides.__getitem__)
    assert main(["--quick"]) == 1
    assert "FAILED" in capsys.readouterr().out
