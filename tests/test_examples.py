"""Examples run, and documents show what they print."""

from __future__ import annotations

import asyncio
import re
import runpy
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvlink.agent.receiver import Receiver
from kvlink.agent.receiver_service import ReceiverService
from kvlink.agent.sender import Sender
from kvlink.agent.sender_service import SenderService
from kvlink.transport.dial import to_receivers, to_senders
from kvlink.transport.link import added_by_grpc
from kvlink.transport.server import Server

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
_BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```\n(.*?)```\n)?", re.DOTALL)


def shown(text: str) -> str:
    """Output without sizes: what a compressor of another version makes may be a few bytes off."""
    return re.sub(r"[\d.]+ bits", "… bits", re.sub(r"[\d,]+ bytes", "… bytes", text))


def test_the_page_on_transformers_shows_what_its_blocks_print(capsys):
    blocks = _BLOCK.findall((ROOT / "docs" / "transformers.md").read_text(encoding="utf-8"))
    assert len(blocks) == 5 and all(printed for _, printed in blocks)
    names: dict[str, object] = {}
    for code, printed in blocks:
        exec(compile(code, "docs/transformers.md", "exec"), names)
        assert shown(capsys.readouterr().out) == shown(printed)


def test_both_ends_in_transformers(capsys):
    runpy.run_path(str(EXAMPLES / "transformers_generate.py"), run_name="__main__")
    out = shown(capsys.readouterr().out)
    for recipe in ("raw", "auto"):
        answers = "cello\n  Where was Rom Tecil born? Naklo\n  Where was Mira Dosh born? Tavik"
        assert f"{recipe}: 80 tokens in … bytes\n  What instrument does Jand Faris play? {answers}" in out
    assert "transform=1: 80 tokens in … bytes\n  What instrument does Jand Faris play? cello\n" in out
    assert (EXAMPLES / "transformers_generate.py").read_text().count("\n") <= 60


@pytest.fixture
def agents(tiny) -> Iterator[tuple[str, str]]:
    """A sender and a receiver, on an event loop of their own; their addresses."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def started() -> tuple[list[Server], list[int]]:
        made = [
            Server(
                "127.0.0.1:0",
                sender=SenderService(Sender(tiny, added_bytes=added_by_grpc), dial=to_receivers()),
            ),
            Server("127.0.0.1:0", receiver=ReceiverService(Receiver(tiny), dial=to_senders())),
        ]
        return made, [await server.start() for server in made]

    servers, ports = asyncio.run_coroutine_threadsafe(started(), loop).result()
    yield f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}"
    for server in servers:
        asyncio.run_coroutine_threadsafe(server.stop(0), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


ADDRESSES = ("127.0.0.1:50051", "127.0.0.1:50052")


def at(source: str, agents: tuple[str, str]) -> str:
    """The source with the addresses of these agents."""
    for default, address in zip(ADDRESSES, agents, strict=True):
        source = source.replace(default, address)
    return source


def test_the_readme_shows_what_its_blocks_print(agents, capsys):
    blocks = _BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(blocks) == 3 and all(printed for _, printed in blocks)
    for code, printed in blocks:
        exec(compile(at(code, agents), "README.md", "exec"), {})
        assert shown(capsys.readouterr().out) == shown(printed)


def test_the_readme_shows_the_example_of_two_agents():
    source = (EXAMPLES / "two_agents.py").read_text()
    assert source.partition("import asyncio\n")[2] in (ROOT / "README.md").read_text()
