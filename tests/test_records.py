"""What is recorded in run folders: every line once, none half, whatever is torn or damaged."""

import json
import os
import sys
import time
from typing import Any

import pytest
import torch
from running import start_python

from dl7cli import __version__, runs
from dl7cli.errors import UserError
from dl7cli.recipe import resolve

SEQ2SEQ = resolve("seq2seq").recipe

pytestmark = pytest.mark.usefixtures("work")


def test_records_come_back_in_order() -> None:
    run = runs.create(SEQ2SEQ, "seq2seq", None)
    assert runs.metrics(run) == []
    records = [{"step": step, "loss": 1 / (step + 1), "text": "ü\n\u2028"} for step in range(50)]
    for record in records:
        runs.append_metrics(run, record)
    assert runs.metrics(run) == records
    assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == 50


def test_a_line_torn_anywhere_costs_that_line_only() -> None:
    run = runs.create(SEQ2SEQ, "seq2seq", None)
    path = run.folder / "metrics.jsonl"
    runs.append_metrics(run, {"step": 1})
    whole = path.read_bytes()
    runs.append_metrics(run, {"step": 2, "scores": {"bleu": 20.5}, "text": "größer"})
    content = path.read_bytes()
    for length in range(len(whole), len(content) - 1):
        path.write_bytes(content[:length])
        assert runs.metrics(run) == [{"step": 1}]
        runs.append_metrics(run, {"step": 3})
        assert runs.metrics(run) == [{"step": 1}, {"step": 3}]


@pytest.mark.parametrize("line", [b"", b"null", b"[1]", b"{", b"\xff", b"nonsense", b"[" * 100_000, bytes(50)])
def test_damaged_lines_are_passed_over(line: bytes) -> None:
    run = runs.create(SEQ2SEQ, "seq2seq", None)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        (run.folder / name).write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    (run.folder / "result.json").write_bytes(line)
    assert runs.metrics(run) == runs.evaluations(run) == [{"step": 1}, {"step": 2}]
    assert [summary.state for summary in runs.listing()] == ["empty"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_json_does_not_know_is_never_written(value: float) -> None:
    run = runs.create(SEQ2SEQ, "seq2seq", None)
    for write in (runs.append_metrics, runs.append_evaluation, runs.write_result, runs.write_environment):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write(run, {"loss": value})
    assert os.listdir(run.folder) == ["recipe.toml"]


def test_resuming_drops_what_comes_after_the_step() -> None:
    run = runs.create(SEQ2SEQ, "seq2seq", None)
    runs.trim_metrics(run, 5, 9)
    assert not (run.folder / "metrics.jsonl").exists()
    for step in range(1, 9):
        runs.append_metrics(run, {"step": step, "loss": step / 3})
    with (run.folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 9, "lo')
    runs.trim_metrics(run, 5, 9)
    expected = [{"step": step, "loss": step / 3} for step in range(1, 6)]
    assert runs.metrics(run) == expected
    runs.append_metrics(run, {"step": 6})
    assert runs.metrics(run) == [*expected, {"step": 6}]
    runs.trim_metrics(run, 0, 9)
    assert runs.metrics(run) == []
    assert sorted(os.listdir(run.folder)) == ["metrics.jsonl", "recipe.toml"]


def test_lines_of_two_processes_do_not_mix() -> None:
    run = runs.create(SEQ2SEQ, "seq2seq", None)
    code = """
        import sys
        from pathlib import Path
        from dl7cli import runs
        run = runs.Run(Path(sys.argv[1]))
        for number in range(200):
            runs.append_evaluation(run, {"who": sys.argv[2], "number": number, "text": sys.argv[2] * 20_000})
    """
    with start_python(code, str(run.folder), "a") as first, start_python(code, str(run.folder), "b") as second:
        pass
    assert first.returncode == second.returncode == 0
    records = runs.evaluations(run)
    assert len(records) == 400
    for who in "ab":
        mine = [record for record in records if record["who"] == who]
        assert [record["number"] for record in mine] == list(range(200))
        assert {record["text"] for record in mine} == {who * 20_000}


def test_evaluations_carry_their_time() -> None:
    run = runs.create(SEQ2SEQ, "seq2seq", None)
    before = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
    runs.append_evaluation(run, {"split": "test", "scores": {"bleu": 30.0}})
    after = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
    [record] = runs.evaluations(run)
    assert before + "+00:00" <= record.pop("time") <= after + "+00:00"
    assert record == {"split": "test", "scores": {"bleu": 30.0}}


def test_the_environment_says_what_ran_where() -> None:
    run = runs.create(SEQ2SEQ, "seq2seq", None)

    def written() -> Any:
        return json.loads((run.folder / "environment.json").read_text())

    runs.write_environment(run, {"device": "cpu", "precision": "fp32"})
    first = written()
    assert first["dl7"] == __version__
    assert first["python"] == ".".join(map(str, sys.version_info[:3]))
    assert first["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert first["command"] == sys.argv
    assert first["device"] == "cpu"
    assert first["cpu"]
    assert "earlier" not in first
    for device in ("cuda:0", "cuda:1"):
        runs.write_environment(run, {"device": device})
    assert [entry["device"] for entry in written()["earlier"]] == ["cpu", "cuda:0"]
    assert written()["earlier"][0] == first


def test_a_command_line_that_is_not_utf8_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    run = runs.create(SEQ2SEQ, "seq2seq", None)
    monkeypatch.setattr(sys, "argv", ["dl7", os.fsdecode(b"caf\xe9")])
    runs.write_environment(run, {})
    command = json.loads((run.folder / "environment.json").read_bytes())["command"]
    assert os.fsencode(command[1]) == b"caf\xe9"


def test_a_damaged_environment_is_not_taken_for_none() -> None:
    """Resuming would go on in another precision than the run began with."""
    run = runs.create(SEQ2SEQ, "seq2seq", None)
    assert runs.environment(run) == {}
    runs.write_environment(run, {"precision": "bf16"})
    path = run.folder / "environment.json"
    content = path.read_bytes()
    for damaged in (b"", content[:-3], bytes(len(content)), b"[]"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"`runs/seq2seq-1/environment.json` is damaged") as caught:
            runs.environment(run)
        assert "--precision" in str(caught.value.hint)
