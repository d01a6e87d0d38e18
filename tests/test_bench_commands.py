"""The benchmark's other commands: loops, scaling, kernels, gpu and report."""

from __future__ import annotations

import ast
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("torchrl")

from bench import cases, gpu, kernels, report, scaling
from bench.gate import WrongResult
from bench.loops import common, compare, ppo_continuous, ppo_discrete, sac
from bench.loops.common import Flags, Run

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------- loops


def test_loops_run_side_by_side_and_write(tmp_path, capsys, keep_threads):
    from bench.__main__ import main

    assert main(["loops", "--quick", "--out", str(tmp_path)]) == 0
    assert main(["loops", "--loop", "nothing"]) == 2
    out = capsys.readouterr().out
    assert "unknown loop nothing" in out and "FAILED" not in out
    stored = json.loads((tmp_path / "loops.json").read_text())
    assert {item["loop"] for item in stored["loops"]} == compare.LOOPS.keys()
    for item in stored["loops"]:
        assert item["problems"] == []
        for side in ("upstream", "fastprob"):
            assert item["steps_per_second"][side].keys() == {"collection", "update"}
            (run,) = item["runs"][side]
            assert run["flags"]["impl"] == side and len(run["evaluation"]) == 2
    assert (tmp_path / "loops.png").read_bytes().startswith(b"\x89PNG")


def _ended(side, first, final, **flags):
    run = Run("loop", "CartPole-v1", Flags(side, **flags), returns=[first, 0.0])
    run.evaluation = [final]
    return run


def _problems(first, final, **flags):
    runs = {
        "upstream": _ended("upstream", 20.0, 500.0, **flags),
        "fastprob": _ended("fastprob", first, final, **flags),
    }
    return compare.check(compare.LOOPS["ppo_masked"], runs, runs["fastprob"].flags)


def test_loops_are_held_to_the_first_returns_and_to_the_goal():
    assert _problems(20.1, 475.0) == []
    (problem,) = _problems(22.0, 475.0)
    assert "the same noise was drawn" in problem
    (problem,) = _problems(20.0, 474.0)
    assert "474" in problem
    assert len(_problems(20.0, math.nan)) == 1
    # Compiled upstream draws other noise.
    assert _problems(22.0, 475.0, compile=True) == []


def test_a_disagreeing_loop_has_no_speed(capsys):
    from bench.console import PlainProgress, make_console

    def other_noise(settings, flags):
        shift = 7 if flags.impl == "fastprob" else 0
        return ppo_continuous.train(settings, replace(flags, seed=flags.seed + shift))

    loop = compare.LOOPS["ppo_independentnormal"].shortened()
    wrong = compare._compare(replace(loop, train=other_noise), [0], Flags(), PlainProgress(), 0)
    (problem,) = wrong.problems
    assert "the same noise was drawn" in problem
    compare.print_table(make_console(), [wrong])
    assert "wrong" in capsys.readouterr().out


MASKED = compare.LOOPS["ppo_masked"]


def _fake_loop(problem=None):
    """A loop of one iteration that notes how it was run; upstream may fail where it is compiled."""

    def train(settings, flags):
        if flags.compile and flags.impl == "upstream" and problem is not None:
            raise problem
        run = Run("loop", settings.env, flags, steps=[10], returns=[20.0], evaluation=[500.0])
        speed = {"upstream": 100.0, "fastprob": 150.0}[flags.impl] * (2 if flags.compile else 1)
        run.cpu_steps_per_second = {"collection": speed + flags.seed, "update": 10.0}
        yield run

    return replace(MASKED, name="fake", train=train)


def test_loops_report_eager_and_compiled_apart(tmp_path, monkeypatch, capsys, keep_threads):
    from bench.__main__ import main

    monkeypatch.setattr(compare, "LOOPS", {"fake": _fake_loop()})
    assert main(["loops", "--device", "cpu", "--out", str(tmp_path)]) == 0
    eager, compiled = json.loads((tmp_path / "loops.json").read_text())["loops"]
    assert (eager["form"], compiled["form"]) == ("eager", "compiled")
    assert [len(item["runs"]["upstream"]) for item in (eager, compiled)] == [3, 1]
    spread = eager["steps_per_second"]["fastprob"]["collection"]
    assert spread == {"p20": 150.4, "p50": 151.0, "p80": 151.6}
    assert compiled["steps_per_second"]["upstream"]["collection"]["p50"] == 200.0
    assert all(run["flags"]["compile"] for run in compiled["runs"]["fastprob"])
    out = capsys.readouterr().out
    assert "Steps per second, eager" in out and "Steps per second, compiled" in out
    assert (tmp_path / "loops.png").read_bytes().startswith(b"\x89PNG")
    for words, form in (
        (["--compile"], "compiled"),
        (["--eager"], "eager"),
        (["--quick"], "eager"),
    ):
        monkeypatch.setattr(compare, "LOOPS", {"fake": replace(_fake_loop(), short={})})
        assert main(["loops", "--device", "cpu", "--out", str(tmp_path), *words]) == 0
        (item,) = json.loads((tmp_path / "loops.json").read_text())["loops"]
        assert item["form"] == form


def test_a_side_that_does_not_compile_is_named_and_the_other_goes_on(tmp_path, capsys):
    broken = RuntimeError("fake tensors\n  Explanation: sizes differ\n  Hint: none")
    forms = [(Flags(compile=True), [0, 1])]
    assert compare.report([_fake_loop(broken)], forms, tmp_path) == 0
    (item,) = json.loads((tmp_path / "loops.json").read_text())["loops"]
    assert item["missing"] == {"upstream": "RuntimeError: sizes differ"}
    assert item["runs"]["upstream"] == [] and len(item["runs"]["fastprob"]) == 2
    assert list(item["steps_per_second"]) == ["fastprob"]
    assert (
        "not run: fake, upstream, compiled: RuntimeError: sizes differ" in capsys.readouterr().out
    )
    # Where it is fastprob, that is a failure; and in eager mode nobody gives up.
    swapped = replace(
        _fake_loop(broken),
        train=lambda settings, flags: _fake_loop(broken).train(
            settings, replace(flags, impl="upstream" if flags.impl == "fastprob" else "fastprob")
        ),
    )
    assert compare.report([swapped], forms, None) == 1
    with pytest.raises(RuntimeError, match="a masked action"):

        def wrong(settings, flags):
            raise RuntimeError("a masked action was taken")
            yield

        compare.report([replace(_fake_loop(), train=wrong)], [(Flags(), [0])], None)


def test_cuda_graphs_are_refused_on_a_cpu(capsys):
    from bench.__main__ import main

    assert main(["loops", "--device", "cpu", "--cudagraphs"]) == 2
    assert "a CUDA graph is a recording" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="NVIDIA GPU, so there is none on cpu"):
        sac.main(["--cudagraphs"])
    assert Flags(cudagraphs=True, device="cuda").form == "CUDA graphs"


def test_mujoco_is_asked_for_where_it_is_not_installed(monkeypatch, capsys):
    from bench.__main__ import main

    find = compare.importlib.util.find_spec
    monkeypatch.setattr(
        compare.importlib.util, "find_spec", lambda name: None if name == "mujoco" else find(name)
    )
    assert main(["loops", "--mujoco"]) == 2
    assert "gymnasium[mujoco]" in capsys.readouterr().out
    assert main(["loops", "--mujoco", "--loop", "sac"]) == 2
    assert "expected one of halfcheetah_independentnormal" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["loops", "--compile", "--eager"])


def test_masks_leave_one_copy_of_each_action():
    masks = ppo_discrete.Masks(2, seed=0, device="cpu")
    mask = masks.draw(torch.zeros(64, 4))["mask"]
    assert mask.shape == (64, 4)
    assert (mask[:, :2] ^ mask[:, 2:]).all() and mask.any(0).all()
    assert masks.act(torch.tensor([0, 1, 2, 3])).tolist() == [0, 1, 0, 1]
    allowed = ppo_discrete._allowed(mask, mask.int().argmax(-1))
    assert allowed.all() and not ppo_discrete._allowed(mask, (~mask).int().argmax(-1)).any()


def test_the_buffer_is_written_in_a_circle():
    from tensordict import TensorDict

    buffer = sac.Buffer(5, "cpu")
    for start in (0, 3, 6):
        buffer.add(TensorDict({"x": torch.arange(start, start + 3)}, batch_size=[3]))
    assert buffer.data is not None
    assert sorted(buffer.data["x"].tolist()) == [4, 5, 6, 7, 8]
    assert set(buffer.sample(200)["x"].tolist()) == {4, 5, 6, 7, 8}
    few = sac.Buffer(5, "cpu")
    few.add(TensorDict({"x": torch.arange(2)}, batch_size=[2]))
    assert set(few.sample(50)["x"].tolist()) == {0, 1}


def test_returns_are_those_of_the_episodes_that_ended():
    returns = common.Returns(2, "cpu")
    for reward, done in (([1.0, 2.0], [False, True]), ([3.0, 4.0], [True, False])):
        returns.add(torch.tensor(reward), torch.tensor(done))
    # 2 of the second's first episode, 1 + 3 of the first's.
    assert returns.take() == 3.0
    returns.add(torch.tensor([1.0, 5.0]), torch.tensor([False, True]))
    assert returns.take() == 9.0
    returns.add(torch.tensor([1.0, 5.0]), torch.tensor([False, False]))
    assert returns.take() is None


@pytest.mark.parametrize("name", ["Pendulum-v1", "CartPole-v1"])
def test_both_kinds_of_environment_look_alike(name):
    made = [kind(name, 3, seed=0) for kind in (common.Tensors, common.Gymnasium)]
    for env in made:
        shape = (3, env.actions) if env.low is not None else (3,)
        action = torch.zeros(shape, dtype=torch.float32 if env.low is not None else torch.int64)
        for _ in range(12):
            last, reward, terminated, truncated = env.step(action)
        assert last.shape == env.observation.shape and last.dtype is torch.float32
        assert reward.shape == terminated.shape == truncated.shape == (3,)
        assert terminated.dtype is torch.bool
        ended = terminated | truncated
        assert torch.equal(last[~ended], env.observation[~ended])
    tensors, gymnasium = made
    gymnasium.close()
    assert tensors.actions == gymnasium.actions
    if tensors.low is None:
        assert gymnasium.low is None
    else:
        assert torch.equal(tensors.low, gymnasium.low) and torch.equal(tensors.high, gymnasium.high)


def test_gymnasium_returns_the_observation_before_a_reset():
    env = common.Gymnasium("CartPole-v1", 2, seed=0)
    for _ in range(30):
        last, _, terminated, _ = env.step(torch.ones(2, dtype=torch.int64))
        if terminated.any():
            break
    # A pole that has fallen is 12 degrees off; one that starts anew less than 3.
    assert (last[terminated][:, 2].abs() > 0.2).all()
    assert (env.observation[terminated].abs() <= 0.05).all()
    env.close()


@pytest.mark.parametrize("loop", [ppo_continuous, ppo_discrete, sac])
def test_a_loop_runs_from_its_own_command_line(loop, capsys):
    run = loop.main(["--impl", "upstream", "--iterations", "1"])
    assert run.flags == Flags("upstream") and run.frames > 0
    assert "upstream, seed 0: return" in capsys.readouterr().out


# --------------------------------------------------------------------------- scaling and kernels


def test_scaling_writes_json_and_plot(tmp_path, monkeypatch, keep_threads):
    from bench.__main__ import main

    monkeypatch.setattr(scaling, "FAMILY_NAMES", ("normal", "categorical"))
    assert main(["scaling", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 0
    points = json.loads((tmp_path / "scaling.json").read_text())["points"]
    assert [(p["family"], p["axis"], p["at"]) for p in points] == [
        ("normal", "rows", 1),
        ("normal", "rows", 256),
        ("normal", "width", 1),
        ("normal", "width", 64),
        ("categorical", "rows", 1),
        ("categorical", "rows", 256),
        ("categorical", "width", 64),
    ]
    for point in points:
        assert {"upstream", "fastprob", "copy roof"} == point["providers"].keys()
        assert point["refused"] == {}
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_scaling_reaches_the_ends_of_both_axes(device):
    planned = {(axis, shape) for _, axis, shape in scaling.plan(device, quick=False)}
    assert {("rows", (1, 8)), ("rows", (1 << 22, 8)), ("width", (256, 32768))} <= planned


def test_scaling_says_what_it_leaves_out(tmp_path, monkeypatch, capsys, keep_threads):
    from bench.__main__ import main

    assert scaling.too_large((1 << 22, 8), 8 * 2**30) is None
    assert scaling.too_large((1 << 22, 8), 4 * 2**30) == (
        "needs about 5.0 GiB of memory, and 4.0 are free"
    )
    assert 1e8 < scaling.free_bytes("cpu") < 1e14
    monkeypatch.setattr(scaling, "FAMILY_NAMES", ("normal",))
    monkeypatch.setattr(scaling, "free_bytes", lambda device: 160 * 256 * 10)
    command = ["scaling", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert main(command) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "not timed: normal 256x64, upstream: needs about" in out
    stored = json.loads((tmp_path / "scaling.json").read_text())["points"]
    assert [bool(p["providers"]) for p in stored] == [True, True, True, False]
    assert stored[3]["missing"].keys() == {"upstream", "fastprob"}
    clock = iter([0.0, 0.0, scaling.LIMIT_S + 1])
    monkeypatch.setattr(scaling, "time", SimpleNamespace(perf_counter=clock.__next__))
    assert main(command) == 0
    assert "left out after 400 s: normal 256x1, normal 256x8, normal 256x64" in (
        capsys.readouterr().out
    )
    assert len(json.loads((tmp_path / "scaling.json").read_text())["points"]) == 1


@pytest.mark.parametrize("name", kernels.KERNELS)
def test_every_pass_of_the_kernels_is_checked(name):
    made = list(kernels.passes(cases.FAMILIES[name], (300, 5), torch.float32, "cpu"))
    assert {"draw", "score", "score, backward"} <= {item.name for item in made}
    for item in made:
        item.check()
        assert item.moved >= 300 * 5 * 4
        assert kernels._time(item, "cpu")["us"]["p50"] > 0


def test_a_wrong_kernel_is_refused(monkeypatch):
    from fastprob.distributions import IndependentNormal

    right = IndependentNormal.log_prob
    monkeypatch.setattr(IndependentNormal, "log_prob", lambda d, x: right(d, x) * 1.001)
    made = {
        item.name: item
        for item in kernels.passes(cases.FAMILIES["normal"], (300, 5), torch.float32, "cpu")
    }
    for name in ("score", "score, backward"):
        with pytest.raises(WrongResult):
            made[name].check()
    made["draw"].check()


def test_kernels_without_a_gpu_are_read_as_machine_code(tmp_path, monkeypatch, capsys):
    from bench.__main__ import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["kernels", "--quick", "--out", str(tmp_path)]) == 0
    assert "no GPU" in capsys.readouterr().out
    stored = json.loads((tmp_path / "kernels.json").read_text())
    assert stored["kernels"]
    for row in stored["kernels"]:
        assert row["registers"] > 0 and row["slots_per_element"] > 0


# --------------------------------------------------------------------------------------------- gpu


def test_without_a_gpu_nothing_is_run(tmp_path, monkeypatch, capsys):
    from bench.__main__ import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu", "--out", str(tmp_path)]) == 0
    assert "no GPU" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_parts_fit_into_eight_minutes_and_name_what_exists():
    from bench.__main__ import COMMANDS

    parts = gpu.parts()
    order = ["gate", "calls", "kernels", "graphs", "loops"]
    assert list(parts) == [name for name in order if name == "gate" or name in COMMANDS]
    assert sum(part.limit_s for part in parts.values()) <= 480
    assert all(part.command[2] == name for name, part in parts.items() if name != "gate")
    named = parts["calls"].command
    assert {named[i + 1] for i, word in enumerate(named) if word == "--case"} <= cases.CASES.keys()
    assert "tests/kernels/test_normal.py" in parts["gate"].command
    assert "tests/test_keys.py" not in parts["gate"].command


def test_a_red_gate_ends_it(tmp_path, capfd):
    def part(code, writes=False):
        return gpu.Part(("-c", code), 20, writes)

    fine = part("import sys; open(sys.argv[2] + '/ran', 'w')", writes=True)
    done = gpu.run_parts({"gate": part("raise SystemExit(1)"), "calls": fine}, tmp_path, False)
    assert [p["status"] for p in done] == ["failed (1)", "left out: the gate is red"]
    assert not (tmp_path / "ran").exists()
    slow = gpu.Part(("-c", "import time; time.sleep(60)"), 0.5, writes=False)
    chosen = {"gate": part(""), "kernels": slow, "calls": fine}
    done = gpu.run_parts(chosen, tmp_path, False)
    assert [p["status"] for p in done] == ["ok", "stopped after 0 s", "ok"]
    assert (tmp_path / "ran").exists()


# Not on a GPU machine, which has torch, triton, tensordict, torchrl, pytest and what these need.
ABSENT = ("rich", "matplotlib", "gymnasium", "scipy", "hypothesis")
BARE = f"""
import sys
for name in {ABSENT}:
    sys.modules[name] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda n, *a: None if n == "gymnasium" else find(n, *a)
import torch
torch.cuda.is_available = lambda: False
from bench import scaling
from bench.__main__ import main
scaling.FAMILY_NAMES = ("normal",)
out = sys.argv[1]
assert main(["gpu", "--out", out]) == 0
assert main(["calls", "--quick", "--case", "delta", "--out", out]) == 0
assert main(["loops", "--quick", "--loop", "ppo_masked", "--out", out]) == 0
assert main(["scaling", "--quick", "--out", out]) == 0
assert main(["--quick"]) == 2
"""


def test_the_gpu_path_needs_torchrl_and_no_more(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "Delta, random" in done.stdout and "[/]" not in done.stdout
    assert {p.name for p in tmp_path.iterdir()} == {"calls.json", "loops.json", "scaling.json"}
    for left_out in (
        "no GPU here: nothing was run",
        "no curves: ",
        "no plot: ",
        "needs gymnasium, which is not installed: pip install -e '.[bench]'",
    ):
        assert left_out in done.stdout


def test_the_gate_imports_what_a_gpu_machine_has():
    def imported(path):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)

    todo = [ROOT / path for path in gpu.gate_files()]
    todo += [ROOT / "tests" / "conftest.py", ROOT / "tests" / "kernels" / "conftest.py"]
    seen, absent = set(), []
    while todo:
        path = todo.pop()
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        for name in imported(path):
            absent += [f"{path.name}: {name}"] if name.partition(".")[0] in ABSENT else []
            # A module, or a name of one.
            parts = name.split(".")
            todo += [ROOT.joinpath(*p).with_suffix(".py") for p in (parts, parts[:-1]) if p]
    assert absent == []
    assert {"accuracy.py", "test_normal.py"} <= {path.name for path in seen}


# ------------------------------------------------------------------------------------------ report


def test_the_readme_is_what_the_result_files_say(tmp_path, monkeypatch):
    # As committed: the README's first command writes a result of its own over one of them.
    archive = tmp_path / "committed.tar"
    command = ["git", "archive", "-o", str(archive), "HEAD", "README.md", "bench/results"]
    folder = ROOT
    if subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0:
        folder = tmp_path
        subprocess.run(["tar", "-xf", str(archive)], cwd=folder, check=True)
        monkeypatch.setattr(report.results, "ROOT", folder)
    text = (folder / "README.md").read_text("utf-8")
    assert report.with_tables(text, report.tables(folder / "bench" / "results")) == text


def test_the_readme_has_no_other_figures():
    text = (ROOT / "README.md").read_text("utf-8")
    figure = re.compile(r"\d[\d.,]* ?(µs|ms\b|times\b|×|x\b|%|GB|CPU seconds)")
    assert figure.search(f"{report.BEGIN} 8.99 (≥ 6) 16×8")
    outside = text.partition(report.BEGIN)[0] + text.partition(report.END)[2]
    assert figure.findall(outside) == []


def test_a_changed_figure_is_noticed():
    text = (ROOT / "README.md").read_text("utf-8")
    before, _, rest = text.partition(report.BEGIN)
    digit = next(c for c in rest if c.isdigit())
    changed = before + report.BEGIN + rest.replace(digit, "0" if digit != "0" else "1", 1)
    assert report.with_tables(changed, report.tables(report.RESULTS)) != changed


def test_report_quick_prints_and_writes_nothing(capsys):
    from bench.__main__ import main

    before = report.README.read_bytes()
    assert main(["report", "--quick"]) == 0
    assert capsys.readouterr().out.strip() == report.tables(report.RESULTS).strip()
    assert report.README.read_bytes() == before


@pytest.mark.parametrize(
    "text",
    ["", report.BEGIN, f"{report.END} {report.BEGIN}", f"{report.BEGIN}{report.END}{report.END}"],
)
def test_a_text_without_markers_is_refused(text):
    with pytest.raises(report.NoMarkers, match="once each"):
        report.with_tables(text, "tables")


ENVIRONMENT = {
    "device": "a chip",
    "commit": "0123456789",
    "date": "2026-01-02T03:04:05",
    "cores": 3,
    "threads": 1,
    "python": "3.11",
    "versions": {"torch": "1", "tensordict": "2", "torchrl": "3"},
}


def _loop_result(name, form, collection, **more):
    run = {"final_return": 475.4, "frames": 2048}
    rates = {
        side: {"collection": {"p50": rate}, "update": {"p50": 10.0}}
        for side, rate in collection.items()
    }
    runs = {side: [run] if side in rates else [] for side in ("upstream", "fastprob")}
    more = {"goal": 475.0, "missing": {}, **more}
    return {"loop": name, "form": form, "steps_per_second": rates, "runs": runs, **more}


def test_every_file_has_its_tables_and_what_is_slower_comes_first(tmp_path):
    files = {
        "compiled": {
            "rows": [
                {"case": "Delta 16x8", "us": [8.0, 10.0], "ratio": 0.8, "goal": 1.6},
                {"case": "Delta 64x8", "us": [30.0, 10.0], "ratio": 3.0, "goal": 2.0},
                {
                    "case": "Delta 16x8: opaque, Inductor",
                    "us": [1.0, 2.0],
                    "ratio": 0.5,
                    "goal": None,
                },
            ]
        },
        "opaque": {
            "limit": 1.1,
            "rows": [
                {
                    "family": "Beta",
                    "call": "mode",
                    "pass": "forward",
                    "shape": [64, 8],
                    "us": {"operator": 10.0, "Inductor": 12.5, "fastprob": 5.0},
                    "of_best": 0.5,
                    "ratio": 1.25,
                    "decision": "operator",
                }
            ],
        },
        "matrix": {
            "backend": "aot_eager",
            "product": 20520,
            "strength": None,
            "cells": 90,
            "sides": {
                "upstream": {
                    "passed": 6,
                    "by_choice": {"form": {"plain": [6, 9]}},
                    "failed": {},
                    "environment": {**ENVIRONMENT, "commit": "fedcba9876"},
                },
                "fastprob": {
                    "ran": 80,
                    "passed": 79,
                    "by_choice": {"form": {"plain": [9, 9], "sequence": [70, 71]}},
                    "failed": {"Delta / sequence": "another key"},
                },
            },
        },
        "graphs": {"stand-in": True, "results": {"look-up of a graph": {"p50": 4.823}}},
        "loops": {
            "unit": "steps per second of CPU time; at the clock in the runs",
            "loops": [
                _loop_result("ppo", "eager", {"upstream": 100.0, "fastprob": 125.0}),
                _loop_result("ppo", "compiled", {"upstream": 400.0, "fastprob": 300.0}),
                _loop_result(
                    "masked", "compiled", {"fastprob": 300.0}, missing={"upstream": "sizes differ"}
                ),
            ],
        },
        "loops-mujoco": {
            "unit": "steps per second of CPU time; at the clock in the runs",
            "loops": [
                _loop_result("cheetah", "eager", {"upstream": 4.0, "fastprob": 5.0}, goal=None)
            ],
        },
    }
    (tmp_path / "cpu").mkdir()
    for name, data in files.items():
        text = json.dumps({"environment": ENVIRONMENT, **data})
        (tmp_path / "cpu" / f"{name}.json").write_text(text)
    made = report.tables(tmp_path)
    for line in (
        "| ppo | collection | fastprob compiled | upstream compiled | 0.75 | `loops.json` |\n"
        "| Delta 16×8 |  | fastprob compiled | upstream compiled | 0.80 | `compiled.json` |\n\n",
        "| Delta 16×8 | 8.0 | 10.0 | **0.80** | ≥ 1.6 |\n"
        "| Delta 64×8 | 30.0 | 10.0 | 3.00 | ≥ 2 |\n\n",
        "| Delta 16×8 | 1.0 | 2.0 | 0.50 |  |",
        "operator in 1 of 1 cases, where Inductor's code for the formula takes 1.1 times",
        "| Beta | mode | forward | 64×8 | 10.0 | 12.5 | 1.25 | operator | 5.0 | 0.50 |",
        "aot_eager): upstream 6 of 90; fastprob 79 of 80. There are 20,520 configurations; those"
        " that ran are the whole product, as far as it ran.",
        "- `matrix.json, upstream`: a chip",
        "- Delta / sequence: another key",
        "| form | plain | 6 / 9 | 9 / 9 |\n| form | sequence |  | 70 / 71 |",
        "no GPU, so no graph was timed",
        "| look-up of a graph | 4.82 |",
        "| ppo | 100 | 125 | 1.25 | 10 | 10 | 1.00 | 475 | 475 | ≥ 475 |",
        "| ppo | 400 | 300 | 0.75 | 10 | 10 | 1.00 | 475 | 475 | ≥ 475 |",
        "| masked |  | 300 |  |  | 10 |  |  | 475 | ≥ 475 |",
        "- masked, upstream, compiled: sizes differ",
        "| cheetah | 4 | 5 | 1.25 | 10 | 10 | 1.00 | 475 | 475 |  |",
    ):
        assert line in made
    assert "matrix.json, fastprob" not in made
    assert made.index("Where fastprob is slower") < made.index("Compiled calls")
    whole = {name: {"ran": 90, "passed": 90, "by_choice": {}} for name in ("upstream", "fastprob")}
    found = "".join(report._matrix({**files["matrix"], "product": 90, "sides": whole}))
    assert found.endswith("There are 90 configurations, and all of them ran.")
    # With a GPU graphs are timed, and one of upstream's may be faster.
    timed = {"upstream graph": {"p50": 3.0}, "fastprob graph": {"p50": 4.0}}
    gpu_graphs = {
        "environment": ENVIRONMENT,
        "stand-in": False,
        "results": {"64": timed, "4096": {"fastprob graph": {"p50": 5.0}}},
        "rollouts": [{"environment": "Pendulum", "count": 64, "eager": 1e4, "graph": 2e5}],
    }
    (tmp_path / "a-gpu").mkdir()
    (tmp_path / "a-gpu" / "graphs.json").write_text(json.dumps(gpu_graphs))
    made = report.section(tmp_path / "a-gpu")
    assert "| 64 | fastprob graph | upstream graph | 0.75 | `graphs.json` |" in made
    assert "| upstream graph | 3.0 |  |\n| fastprob graph | 4.0 | 5.0 |" in made
    assert "| Pendulum | 64 | 10,000 | 200,000 |" in made


def test_a_missed_goal_is_bold_and_slower_comes_first(tmp_path):
    q = {"p20": 0.5, "p50": 0.625, "p80": 0.7}
    data = {
        "environment": ENVIRONMENT,
        "slower": [
            {"case": "delta", "shape": [16, 8], "fastprob": "fastprob", "other": "hand", "ratio": q}
        ],
        "targets": [
            {
                "case": "delta",
                "shape": [16, 8],
                "numerator": "upstream",
                "denominator": "fastprob",
                "ratio": q,
                "target": "≥ 4",
                "met": False,
            }
        ],
        "results": [
            {
                "case": "delta",
                "title": "Delta, random",
                "shape": [16, 8],
                "providers": {"upstream": q, "fastprob": q},
                "ratios_to_fastprob": {"upstream": q},
                "missing": {"upstream compiled": "Unsupported: no"},
            }
        ],
    }
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "calls.json").write_text(json.dumps(data))
    made = report.tables(tmp_path)
    assert "a chip, 3 cores" in made and "commit 0123456, 2026-01-02" in made
    assert made.index("is slower than upstream in no case") < made.index("Goals")
    assert made.index("slower than upstream compiled or captured") < made.index("Goals")
    assert "| Delta, random | 16×8 | fastprob | hand | 0.62 |" in made
    assert "| Delta, random | upstream ÷ fastprob | **0.62** (≥ 4) |" in made
    assert "| Delta | 0.62 |" in made
    assert "- Delta, random, 16×8, upstream compiled: Unsupported: no" in made
    data["slower"], data["targets"][0]["met"] = [], True
    (tmp_path / "cpu" / "calls.json").write_text(json.dumps(data))
    made = report.tables(tmp_path)
    assert "slower than upstream compiled or" not in made and "**0.62**" not in made
    data["slower"] = [
        {"case": "delta", "shape": [16, 8], "fastprob": "fastprob", "other": "upstream", "ratio": q}
    ]
    (tmp_path / "cpu" / "calls.json").write_text(json.dumps(data))
    assert "| Delta, random | 16×8 | fastprob | upstream | 0.62 |" in report.tables(tmp_path)
