"""How the process of an agent ends: at any moment, with its peers told, whatever hangs."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from kvlink.agent.sender import Sender
from kvlink.errors import ConfigError, StoppingError
from kvlink.observe import Observer
from kvlink.transport.api import Ask
from kvlink.transport.client import ReceiverClient
from tests.command import CONTEXT, QUESTION, free_address, listening, start


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("kind", ["receiver", "sender"])
def test_sigterm_ends_an_agent_while_its_model_loads(kind):
    """Inherited as ignored the signal looks like that of a container's first process."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        process = start(kind, "--listen", free_address())
    finally:
        signal.signal(signal.SIGTERM, before)
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "libtorch" not in maps.read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert "listens" not in out
    assert process.returncode == 143, err
    assert err.strip() == "kvlink: stopped before it served"


INTERRUPTED = """
import runpy, sys
class Interrupt:
    def find_spec(name, path=None, target=None):
        if name not in ("kvlink", "kvlink._release", "kvlink.__main__") and name.split(".")[0] == "kvlink":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt)
sys.argv = sys.argv[1:]
(runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module)(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("start_of", ["kvlink", "services/sender.py", "services/receiver.py"])
def test_ctrl_c_in_the_first_moment_ends_a_command_without_a_word(start_of):
    """While the very first module after the command's own is imported."""
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(root / start_of) if "/" in start_of else start_of],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


async def test_an_agent_under_load_tells_its_callers_and_ends(tiny):
    sender = Sender(tiny)
    frames = sender.pack(sender.read(CONTEXT), QUESTION, "int8").frames
    process = start("receiver", "--listen", "127.0.0.1:0", "--stop-s", "2")
    try:
        async with ReceiverClient(await asyncio.to_thread(listening, process)) as peer:
            async for item in peer.push(frames):
                cache_id = "" if isinstance(item, int) else item.cache_id
            endless = Ask(cache_id, QUESTION, max_new_tokens=1024, temperature=10.0)

            async def ask(ask_for: Ask, begun: asyncio.Event) -> None:
                while True:
                    async for _ in peer.generate(ask_for):
                        begun.set()

            events = [asyncio.Event() for _ in range(4)]
            asking = [asyncio.create_task(ask(endless, event)) for event in events]
            waiting = asyncio.gather(*(event.wait() for event in events))
            await asyncio.wait({waiting, *asking}, return_when=asyncio.FIRST_COMPLETED)
            assert waiting.done(), [task.exception() for task in asking if task.done()]
            process.send_signal(signal.SIGTERM)
            for task in asking:
                with pytest.raises(StoppingError) as caught:
                    await task
                assert caught.value.retry_after_s > 0
        assert await asyncio.to_thread(process.wait) == 0
    finally:
        process.kill()


def test_a_process_ends_whatever_its_threads_do():
    code = (
        "import logging, threading; logging.basicConfig()\n"
        "from kvlink.cli.ending import end_within\n"
        "threading.Thread(target=threading.Event().wait).start()\n"
        "end_within(0.05)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "work that did not end within 0.05 s is left" in done.stderr


@pytest.mark.parametrize("how", ["nobody there", "takes and never answers"])
def test_a_dead_collector_costs_spans_and_a_line(how, caplog):
    with socket.create_server(("127.0.0.1", 0)) as hole:
        address = free_address() if how == "nobody there" else f"127.0.0.1:{hole.getsockname()[1]}"
        observer = Observer("receiver", trace_to=f"http://{address}/v1/traces")
        with observer.span("receive"):
            pass
        observer.close()
    (line,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "lost" in line.message
    assert address in line.message
    assert line.exc_info is None


def test_spans_go_where_the_operator_said_whatever_the_environment_says(monkeypatch):
    taken: list[str] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            taken.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return None

    server = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.setenv(name, f"http://{free_address()}/elsewhere")
    observer = Observer("receiver", trace_to=f"http://127.0.0.1:{server.server_port}/v1/traces")
    with observer.span("receive"):
        pass
    observer.close()
    server.shutdown()
    assert taken == ["/v1/traces"]


@pytest.mark.parametrize("url", ["collector:4318", "ftp://collector/x", "http://", "/v1/traces"])
def test_what_is_no_url_of_a_collector_is_refused(url):
    with pytest.raises(ConfigError, match="URL of a collector"):
        Observer("receiver", trace_to=url)
