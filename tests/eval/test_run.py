"""Runs over processes: whatever stops them, the table is that of an uninterrupted run."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kvlink.errors import ConfigError, ContextError, ModelError
from kvlink.eval.questions import Item, generated
from kvlink.eval.record import read as read_record
from kvlink.eval.results import rows_of
from kvlink.eval.run import Settings, open_model, run
from kvlink.eval.tables import Case

CASES = [Case("raw"), Case("int4"), Case("q2c@0.5 raw", "paraphrase")]
TABLES = {"quantization": CASES}


def nobody(*_: object) -> None:
    """Watches nothing."""


def items(count: int) -> list[Item]:
    return list(itertools.islice(generated(2, (5, 8)), count))


def settings(**more) -> Settings:
    return replace(Settings("kvlink-tiny", "generated:2", workers=1), **more)


def table(record) -> list[dict]:
    """The rows without what a clock says."""
    return [{k: v for k, v in row.to_dict().items() if k != "ttft_s"} for row in rows_of(record, TABLES)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The record of an uninterrupted run of five questions."""
    file = tmp_path_factory.mktemp("whole") / "run.jsonl"
    run(settings(), items(5), CASES, file, on_start=nobody, on_item=nobody)
    return file


def test_a_record_has_a_header_a_line_a_question_and_an_end(whole):
    lines = [json.loads(line) for line in whole.read_text().splitlines()]
    assert lines[0]["header"]["cases"] == [case.key for case in CASES]
    assert sorted(line["item"] for line in lines[1:-1]) == [0, 1, 2, 3, 4]
    assert lines[-1] == {"finished": 5}


@pytest.mark.parametrize("cut", [0.15, 0.5, 0.97])
def test_a_run_that_was_cut_anywhere_goes_on_to_the_same_table(whole, tmp_path, cut):
    data = whole.read_bytes()
    header = data.index(b"\n") + 1
    file = tmp_path / "run.jsonl"
    file.write_bytes(data[: header + int(cut * (len(data) - header))])
    had = len(read_record(file).lines)
    steps, started = [], []
    record = run(settings(), items(5), CASES, file, on_start=started.append, on_item=lambda: steps.append(1))
    assert started == [had]
    assert len(steps) == 5 - had
    assert table(record) == table(read_record(whole))


def test_two_workers_find_what_one_finds(whole, tmp_path):
    record = run(
        settings(workers=2), items(5), CASES, tmp_path / "two.jsonl", on_start=nobody, on_item=nobody
    )
    assert table(record) == table(read_record(whole))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"settings": settings(pad_to=50)}, "pad_to"),
        ({"items": items(4)}, "items, data_digest"),
        ({"cases": CASES[:2]}, "cases"),
    ],
)
def test_another_runs_record_is_refused_and_kept(whole, tmp_path, change, names):
    file = tmp_path / "run.jsonl"
    file.write_bytes(whole.read_bytes())
    given = {"settings": settings(), "items": items(5), "cases": CASES, **change}
    with pytest.raises(ConfigError, match=rf"record of another run \({names} differ\).*--fresh"):
        run(given["settings"], given["items"], given["cases"], file, on_start=nobody, on_item=nobody)
    assert file.read_bytes() == whole.read_bytes()


def test_a_finished_run_runs_again(whole, tmp_path):
    file = tmp_path / "run.jsonl"
    file.write_bytes(whole.read_bytes())
    steps: list[int] = []
    run(settings(), items(5), CASES, file, on_start=nobody, on_item=lambda: steps.append(1))
    assert len(steps) == 5


def test_questions_that_do_not_fit_are_left_out_and_named(tmp_path):
    given = [*items(1), Item("word " * 9000, "Q?", ("a",))]
    record = run(settings(), given, CASES, tmp_path / "run.jsonl", on_start=nobody, on_item=nobody)
    assert list(record.skipped) == [1]
    assert "the model's window" in record.skipped[1]
    assert {row.n for row in rows_of(record, TABLES)} == {1}
    with pytest.raises(ContextError, match="no question could be measured: the context has"):
        run(settings(), given[1:], CASES, tmp_path / "none.jsonl", on_start=nobody, on_item=nobody)


def test_padding_makes_contexts_at_least_so_long(tmp_path):
    record = run(
        settings(pad_to=700), items(6), CASES[:1], tmp_path / "run.jsonl", on_start=nobody, on_item=nobody
    )
    assert all(line["context_tokens"] >= 700 for line in record.measured())


def test_the_prompt_can_be_chosen(checkpoint):
    model = str(checkpoint("qwen2", "bfloat16"))
    assert open_model(settings(model=model, prompt="plain")).template.template_id == "plain/1"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "/no/such/model"}, ModelError, "no directory and no GGUF file '/no/such/model'"),
        ({"pad_to": 99_999}, ContextError, "cannot pad to 99999 tokens: the model's window is 2048"),
    ],
)
def test_what_cannot_run_is_refused_before_a_worker_starts(tmp_path, change, error, message):
    file = tmp_path / "run.jsonl"
    with pytest.raises(error, match=message):
        run(settings(**change), items(2), CASES, file, on_start=nobody, on_item=nobody)
    assert not file.exists()


@pytest.mark.parametrize("change", [{"prompt": "chatty"}, {"workers": -1}, {"pad_to": -5}])
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(ConfigError):
        settings(**change)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}\n",
        "not json\n{}\n",
        '[1]\n{"item": 0}\n',
        '{"header": 7}\n',
        '{"header": {}}\n',
        "[" * 99_999 + "\n{}\n",
    ],
)
def test_what_is_no_record_is_refused(tmp_path, content):
    file = tmp_path / "run.jsonl"
    file.write_text(content)
    with pytest.raises(ContextError, match="run.jsonl"):
        read_record(file)


ODD_LINES = [
    7, [], {}, {"item": "0", "skipped": "x"}, {"item": 0}, {"item": 0, "skipped": 7},
    {"context_tokens": "x"}, {"outcomes": 7}, {"outcomes": {"a": 7}}, {"outcomes": {"a": {}}},
]  # fmt: skip
ODD_OUTCOMES = [
    {"f1": "x"}, {"f1": None}, {"answer": 7}, {"wire_bytes": 1.5}, {"kl": "x"}, {"more": 7}, {"more": {"a": "x"}},
    {"context_tokens": 10**400}, {"surprise": 1},
]  # fmt: skip


def test_a_record_that_is_not_quite_one_is_refused_by_its_line(whole, tmp_path):
    lines = whole.read_text().splitlines()
    good = json.loads(lines[1])
    odd = [
        {**good, **line} if line and "item" not in line else line
        for line in ODD_LINES
        if isinstance(line, dict)
    ]
    odd += [line for line in ODD_LINES if not isinstance(line, dict)]
    case = next(iter(good["outcomes"]))
    odd += [{**good, "outcomes": {case: {**good["outcomes"][case], **change}}} for change in ODD_OUTCOMES]
    for line in odd:
        file = tmp_path / "odd.record.jsonl"
        file.write_text("\n".join([lines[0], json.dumps(line), *lines[2:]]))
        with pytest.raises(ContextError, match=r"odd.record.jsonl, line 2: "):
            read_record(file)
    for name in ("model", "cases", "items", "variant"):
        header = json.loads(lines[0])
        del header["header"][name]
        file.write_text("\n".join([json.dumps(header), *lines[1:]]))
        with pytest.raises(ContextError, match=f"its header has no {name}"):
            read_record(file)


def eval_command(folder: Path) -> list[str]:
    words = "eval recipes --recipe int4 --recipe raw --n 12 --seed 5 --workers 2 --json --out".split()
    return [sys.executable, "-m", "kvlink", *words, str(folder)]


def children(pid: int) -> set[int]:
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False
    )
    return {int(word) for word in found.stdout.split()}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_command_given_again_prints_the_same_table(tmp_path, blow):
    process = subprocess.Popen(
        eval_command(tmp_path / "a"), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # Whoever runs the tests in the background has told their children to ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while sum(1 for f in (tmp_path / "a").glob("*.record.jsonl") for _ in f.open()) < 4:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = children(process.pid)
    process.send_signal(blow)
    process.wait(60)
    assert process.returncode != 0
    (file,) = (tmp_path / "a").glob("*.record.jsonl")
    had = len(read_record(file).lines)
    assert 3 <= had < 12, "it was stopped in the middle"
    end = time.monotonic() + 20
    while any(alive(pid) for pid in workers) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in workers), "no worker outlives its parent"

    tables = []
    for folder in ("a", "b"):
        done = subprocess.run(
            eval_command(tmp_path / folder), capture_output=True, check=True, env=dict(os.environ)
        )
        rows = json.loads(done.stdout)["rows"]
        tables.append([{k: v for k, v in row.items() if k != "ttft_s"} for row in rows])
    assert tables[0] == tables[1]
    assert tables[0][0]["n"] == 12
