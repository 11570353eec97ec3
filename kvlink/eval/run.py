"""A run: many questions over worker processes, written down one line a question, resumable.

The record is JSON lines: a header that says what is measured, a line a question, a last line once
all of them are there. A record that ends early is continued where the header is the same.

Does not know: how a question is measured, what a table shows. Place on the path: around `measure`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from blake3 import blake3

from kvlink._release import RELEASE
from kvlink.defaults import ATTENTION, DEVICE, DTYPE, STUDY_SEED
from kvlink.errors import ConfigError, ContextError, KvlinkError
from kvlink.eval import record as records
from kvlink.eval.biased import biased
from kvlink.eval.items import Item
from kvlink.eval.measure import Bench
from kvlink.eval.questions import distractors, padded
from kvlink.eval.record import Record
from kvlink.eval.tables import Case
from kvlink.model.loading import LanguageModel, load
from kvlink.model.template import plain_template


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run measures, and with what. `pad_to`: tokens that every context has at least.

    `prompt`: `auto` (the model's chat template where it has one) or `plain`. `workers` 0: one a
    core, one in all on a GPU. `variant`: `plain`, or `biased` with the key biases of `eval.biased`.
    """

    model: str
    data: str
    seed: int = STUDY_SEED
    pad_to: int = 0
    prompt: str = "auto"
    device: str = DEVICE
    dtype: str = DTYPE
    attention: str = ATTENTION
    workers: int = 0
    variant: str = "plain"

    def __post_init__(self) -> None:
        if self.prompt not in ("auto", "plain"):
            raise ConfigError(f"prompt must be auto or plain, got {self.prompt!r}")
        if self.workers < 0 or self.pad_to < 0:
            raise ConfigError("workers and pad-to must not be negative")


def open_model(settings: Settings) -> LanguageModel:
    """The model of a run, with the prompt that it asks for."""
    lm = load(settings.model, device=settings.device, dtype=settings.dtype, attention=settings.attention)
    lm = replace(lm, template=plain_template()) if settings.prompt == "plain" else lm
    return biased(lm) if settings.variant == "biased" else lm


def run(
    settings: Settings,
    items: Sequence[Item],
    cases: Sequence[Case],
    file: Path,
    *,
    fresh: bool = False,
    on_start: Callable[[int], object],
    on_item: Callable[[], object],
) -> Record:
    """Measure all `cases` on every item, and write `file` as they come.

    A `file` of the same run that ended early is continued; another run's file is refused with
    ConfigError, unless `fresh` throws it away. The model is loaded here first, so that a model that
    cannot serve is refused before a worker starts.
    """
    lm = open_model(settings)
    if settings.pad_to >= lm.window:
        raise ContextError(f"cannot pad to {settings.pad_to} tokens: the model's window is {lm.window}")
    header = _header(settings, lm, items, cases)
    record = Record(header, {} if fresh else _continue(file, header))
    on_start(len(record.lines))
    open_items = [index for index in range(len(items)) if index not in record.lines]
    workers = settings.workers or (1 if settings.device != "cpu" else os.cpu_count() or 1)
    del lm
    others = distractors(settings.data, settings.seed) if settings.pad_to else []
    records.begin(file, record)
    jobs = [(settings, index, items[index], others, cases) for index in open_items]
    for line in _results(settings, jobs, min(workers, max(1, len(jobs)))):
        record.lines[line["item"]] = line
        records.add(file, line)
        on_item()
    records.add(file, {"finished": len(record.lines)})
    if not record.measured():
        raise ContextError(f"no question could be measured: {next(iter(record.skipped.values()))}")
    return record


def _header(
    settings: Settings, lm: LanguageModel, items: Sequence[Item], cases: Sequence[Case]
) -> dict[str, Any]:
    """What makes a run this run: settings, identities of model and data, cases."""
    told = asdict(settings)
    del told["workers"]
    data = json.dumps([asdict(item) for item in items])
    return {
        **told,
        "release": RELEASE,
        "weights": lm.fingerprint.weights.hex(),
        "dtype": lm.dtype,
        "items": len(items),
        "data_digest": blake3(data.encode()).hexdigest(length=16),
        "cases": [case.key for case in cases],
    }


def _continue(file: Path, header: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Lines of an unfinished run of the same header; nothing of a finished one, which runs again."""
    if not file.exists():
        return {}
    found = records.read(file)
    if found.header != header:
        differing = [name for name in header if found.header.get(name) != header[name]]
        raise ConfigError(
            f"{file} is the record of another run ({', '.join(differing)} differ); "
            "choose another --out, or throw it away with --fresh"
        )
    return {} if len(found.lines) == header["items"] else found.lines


_Job = tuple[Settings, int, Item, Sequence[str], Sequence[Case]]
"""The arguments of `_work`."""

_bench: Bench | None = None


def _start_worker(settings: Settings) -> None:
    """In a worker: the model once, one thread, and no word of its own to the terminal."""
    global _bench
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops, and stops its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    _bench = Bench(open_model(settings))


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(
    settings: Settings, index: int, item: Item, others: Sequence[str], cases: Sequence[Case]
) -> dict[str, Any]:
    """In a worker: one question."""
    if _bench is None:
        raise ConfigError("the worker has no model")
    try:
        if settings.pad_to:
            lm = _bench.lm
            item = padded(item, others, lambda text: len(lm.context_ids(text)), settings.pad_to, index)
        return {"item": index, **_bench.measure(item, cases)}
    except ContextError as error:  # this question does not fit this model; the others may
        return {"item": index, "skipped": str(error)}


def _results(settings: Settings, jobs: Sequence[_Job], workers: int) -> Iterator[dict[str, Any]]:
    """Lines as they are ready. No more jobs than workers are out, so that a stop loses little."""
    spawn = multiprocessing.get_context("spawn")  # a fork would copy torch's threads in mid-air
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    pool = ProcessPoolExecutor(workers, spawn, _start_worker, (settings,))
    try:
        waiting = list(reversed(jobs))
        running: set[Future[dict[str, Any]]] = set()
        while waiting or running:
            while waiting and len(running) < workers:
                running.add(pool.submit(_work, *waiting.pop()))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise KvlinkError(
            f"a worker process died ({error}); the record so far is kept, run the same command again"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads
