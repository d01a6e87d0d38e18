"""The run of the matrix that goes on after an interruption, and the timing of operators."""

from __future__ import annotations

import argparse
import collections
import json
from types import SimpleNamespace

import pytest
import torch

from bench import matrix, opaque, options
from bench.cells import Cell, Outcome, cover, product

CELLS = [
    Cell("Normal", "mode", False, "none", "none", "plain"),
    Cell("Normal", "mean", False, "none", "none", "sequence"),
]
SIDE = SimpleNamespace(name="fastprob", version="fastprob 0")


def state(folder, code="a", shard="1of1"):
    return matrix.State(folder, "fastprob", "aot_eager", code, shard)


def parsed(*words):
    parser = argparse.ArgumentParser()
    options.add_matrix_arguments(parser)
    return parser.parse_args(words)


# --- the state ---


def test_outcomes_of_all_processes_are_read_and_those_of_other_code_are_not(tmp_path):
    assert state(tmp_path).read() == {}
    state(tmp_path).add(Outcome(CELLS[0], None), 0.25)
    state(tmp_path, shard="2of2").add(Outcome(CELLS[1], "another value"), 0.5)
    found = state(tmp_path).read()
    assert {name: row["reason"] for name, row in found.items()} == {
        str(CELLS[0]): None,
        str(CELLS[1]): "another value",
    }
    assert state(tmp_path, code="b").read() == {}


def test_a_line_that_was_cut_off_costs_one_cell(tmp_path):
    first = state(tmp_path)
    first.add(Outcome(CELLS[0], None), 0.25)
    with first.path.open("a") as file:
        file.write('{"cell": "Normal / mo')
    state(tmp_path).add(Outcome(CELLS[1], None), 0.25)
    assert set(state(tmp_path).read()) == set(map(str, CELLS))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The command over two cells, whose check says what `answers` holds."""
    asked = []
    answers = {}

    def check_cell(cell, library, backend):
        asked.append(cell)
        answer = answers.get(cell)
        if isinstance(answer, type):
            raise answer
        return Outcome(cell, answer)

    monkeypatch.setattr(matrix, "product", lambda: CELLS)
    monkeypatch.setattr(matrix, "in_order", list)
    monkeypatch.setattr(matrix, "check_cell", check_cell)
    monkeypatch.setattr(matrix, "implementation", lambda name: SIDE)

    def only(*words):
        out, states = str(tmp_path / "out"), str(tmp_path / "state")
        status = matrix.run(parsed("--side=fastprob", "--out", out, "--state", states, *words))
        data = json.loads((tmp_path / "out" / "matrix.json").read_text())
        return status, data["sides"]["fastprob"]

    def run(*words):
        return only("--full", *words)

    run.only, run.asked, run.answers = only, asked, answers
    return run


def test_a_run_goes_on_where_one_was_interrupted(run):
    run.answers[CELLS[1]] = KeyboardInterrupt
    status, side = run()
    assert (status, side["ran"], side["passed"]) == (0, 1, 1)
    del run.answers[CELLS[1]]
    status, side = run()
    assert (status, side["ran"], side["passed"]) == (0, 2, 2)
    assert run.asked == [CELLS[0], CELLS[1], CELLS[1]]


def test_shards_take_each_cell_once_and_are_summed_up_together(run):
    assert run("--shard", "2/2")[1]["ran"] == 1
    assert run("--shard", "1/2")[1]["ran"] == 2
    assert run.asked == [CELLS[1], CELLS[0]]


@pytest.mark.parametrize("cells", [product(), cover(product(), 3)], ids=["whole", "triples"])
def test_parts_hold_each_cell_once_and_those_of_one_computation_together(cells):
    ordered = matrix.in_order(cells)
    assert sorted(map(str, ordered)) == sorted(map(str, cells))
    parts = [matrix.part(ordered, i, 3) for i in (1, 2, 3)]
    assert sorted(str(c) for part in parts for c in part) == sorted(map(str, cells))
    assert max(map(len, parts)) < 1.1 * min(map(len, parts))
    # As CI runs them: halves of a part, side by side.
    halves = matrix.part(ordered, 1, 6) + matrix.part(ordered, 4, 6)
    assert sorted(map(str, halves)) == sorted(map(str, parts[0]))
    rest = set(cells) - set(cover(product(), 3))
    owner = {c: i for i, part in enumerate(parts) for c in part}
    found = collections.defaultdict(set)
    for cell in rest:
        found[cell.family, cell.interaction, cell.score, cell.spec].add(owner[cell])
    assert all(len(owners) == 1 for owners in found.values())


@pytest.fixture
def children(monkeypatch):
    """Every cell in a child of its own."""
    monkeypatch.setattr(matrix, "FIRST", 0)
    monkeypatch.setattr(matrix, "BATCH", 1)


def test_children_run_cells_and_leave_their_outcomes(run, children):
    run.answers[CELLS[1]] = "another value"
    status, side = run()
    assert (status, side["ran"], side["passed"]) == (1, 2, 1)
    assert side["failed"] == {str(CELLS[1]): "another value"}
    # Not in this process.
    assert run.asked == []


def test_an_interrupted_child_ends_the_run_and_the_next_goes_on(run, children):
    run.answers[CELLS[0]] = KeyboardInterrupt
    assert run()[1]["ran"] == 0
    del run.answers[CELLS[0]]
    assert run()[1]["ran"] == 2


def test_a_child_that_dies_is_told(run, children, capfd):
    run.answers[CELLS[1]] = MemoryError
    with pytest.raises(RuntimeError, match="ended with status 1"):
        run()
    assert "MemoryError" in capfd.readouterr().err


@pytest.mark.parametrize(
    "record, wanted",
    [
        (None, 2),
        ({"code": "here", "ran": 2, "passed": 2}, 1),
        ({"code": "other", "ran": 2, "passed": 2}, 2),
        ({"code": "here", "ran": 1, "passed": 1}, 2),
        ({"code": "here", "ran": 2, "passed": 1}, 2),
        ({"code": "here", "ran": 2, "passed": 2, "backend": "inductor"}, 2),
    ],
)
def test_what_is_on_record_for_this_code_is_not_run_again(
    run, record, wanted, tmp_path, monkeypatch
):
    monkeypatch.setattr(matrix, "fingerprint", lambda library: "here")
    monkeypatch.setattr(matrix, "cover", lambda cells, strength: cells[: 4 - strength])
    monkeypatch.setattr(matrix.results, "default_folder", lambda: tmp_path)
    if record is not None:
        data = {"backend": record.get("backend", "aot_eager"), "sides": {"fastprob": record}}
        (tmp_path / "matrix.json").write_text(json.dumps(data))
    assert run.only("--unless-recorded")[1]["ran"] == wanted


def test_the_other_side_stays_as_it_is_on_record_for_the_very_code(run, tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "fingerprint", lambda library: "here")
    monkeypatch.setattr(matrix.results, "default_folder", lambda: tmp_path)
    path = tmp_path / "matrix.json"

    def sides(code):
        other = {"code": code, "ran": 2, "passed": 1, "seconds": 3.0, "by_choice": {}, "failed": {}}
        own = {"code": "here", "ran": 7, "passed": 7}
        record = {"backend": "aot_eager", "environment": {"commit": "before"}}
        path.write_text(json.dumps(record | {"sides": {"upstream": other, "fastprob": own}}))
        run()
        return json.loads((tmp_path / "out" / "matrix.json").read_text())["sides"]

    found = sides("here")
    assert found["upstream"]["passed"] == 1
    assert found["upstream"]["environment"] == {"commit": "before"}
    # This one has run.
    assert found["fastprob"]["ran"] == 2
    assert "commit" in found["fastprob"]["environment"]
    assert set(sides("other")) == {"fastprob"}


def test_no_minutes_sum_up_and_run_nothing(run):
    assert run("--minutes", "0")[1]["ran"] == 0
    assert run.asked == []


def test_a_cell_that_fails_is_named_counted_and_fails_the_command(run):
    run.answers[CELLS[0]] = "values of action: 3 of 12 differ"
    status, side = run()
    assert status == 1
    assert side["failed"] == {str(CELLS[0]): "values of action: 3 of 12 differ"}
    assert list(side["reasons"].values()) == [1]
    assert side["by_choice"]["form"] == {"plain": [0, 1], "sequence": [1, 1]}
    # What is known to fail is not run again.
    assert run()[0] == 1
    assert len(run.asked) == 2


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "1/0"])
def test_a_shard_that_is_none_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        parsed("--shard", text)
    assert "I/N" in capsys.readouterr().err


def test_comments_and_docstrings_are_no_other_code():
    def dump(text):
        return matrix.ast.dump(matrix._without_docstrings(text))

    same = (
        'def f():\n    "Says."\n    return 1\n',
        'def f():\n    "Does."\n    # Why.\n    return 1\n',
    )
    assert dump(same[0]) == dump(same[1])
    assert dump(same[0]) != dump(same[0].replace("1", "2"))


def test_the_order_holds_every_triple_first_and_every_cell_once():
    every = product()
    ordered = matrix.in_order(every)
    triples = cover(every, 3)
    assert ordered[: len(triples)] == triples
    assert len(set(ordered)) == len(every)


# --- operators and Inductor ---


@pytest.mark.parametrize("family", opaque.FAMILIES)
def test_the_operator_has_the_values_and_gradients_of_the_function(family):
    torch._dynamo.reset()
    params = opaque.FAMILIES[family][0](torch.Generator().manual_seed(1), 4, 3)
    given = [v.requires_grad_(v.is_floating_point()) for v in params.values()]
    # The score of a Delta has no gradient.
    call = "mode" if "Delta" in family else "score and entropy"
    plain = opaque.function(family, call, params)
    leaves = [x for x in given if x.requires_grad]
    which = [i for i, x in enumerate(plain(*given)) if x.requires_grad]
    assert which
    run = opaque._only(plain, which)
    operator = opaque.as_operator(f"test_{family}", run, given)
    compiled = torch.compile(operator, backend="aot_eager", fullgraph=True)
    expected = run(*given)
    weights = [torch.randn_like(x) for x in expected]
    grads = torch.autograd.grad(expected, leaves, weights, materialize_grads=True)
    for call in (operator, compiled):
        found = call(*given)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, leaves, weights), grads)
    with torch.no_grad():
        torch.testing.assert_close(operator(*given), run(*given))


@pytest.mark.parametrize(
    ("times", "decision"), [((1.0, 1.2, 0.5), "operator"), ((1.0, 1.05, 0.5), "Inductor")]
)
def test_the_faster_way_is_decided_for_by_its_margin(times, decision, monkeypatch):
    monkeypatch.setattr(opaque, "_all_ways", lambda run, *_: (run, run, run))
    monkeypatch.setattr(opaque, "_in_turns", lambda calls, device: list(times))
    rows = opaque.compare("TanhNormal", "draw and score", 4, 3, "cpu")
    assert [row["pass"] for row in rows] == ["forward", "forward and backward"]
    assert {row["decision"] for row in rows} == {decision}
    assert {row["of_best"] for row in rows} == {0.5}
