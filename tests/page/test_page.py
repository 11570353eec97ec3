"""Pages: everything is in the file, what is foreign is escaped, and a real browser shows it."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kvlink import page
from kvlink.errors import ConfigError
from kvlink.eval.rows import Outcome, Row, summarise
from kvlink.page import plots
from kvlink.page.story import Story
from kvlink.quoting import shown, shown_text
from kvlink.receipt import STAGES, Receipt
from kvlink.transport.api import Explanation
from tests import hostile
from tests.limits import HANGS_S

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    None,
)
HOSTILE = "</span><script>document.title='taken'</script><b>"


def outcome(score: float, bits: float) -> Outcome:
    return Outcome("a", "a", score, 0.9, score, True, round(50_000 * bits), bits, 0.01, 100, 50, 0.1, 0.2)


def report() -> dict:
    rows = []
    known = {"model": HOSTILE, "data": "generated", "seed": 1}
    for recipe, bits in (("text", 0.02), ("raw", 16.0), ("int8", 7.7), ("int4", 3.9), ("svd=8 raw", 2.7)):
        rows.append(summarise(recipe, [outcome(0.9, bits)] * 5, table="quantization", **known))
    for amount in (0.75, 0.25):
        for shift in ("same", "paraphrase"):
            for recipe in (f"q2c@{amount} raw", f"q2c@{amount} raw scope=head"):
                rows.append(summarise(recipe, [outcome(0.5, 4)] * 5, shift=shift, table="selection", **known))
    for layer in (0, 1):
        for side in ("keys", "values"):
            more = {"layer": layer, "side": side, "energy_top5": 0.6}
            rows.append(Row(table="spectrum", more=more, **known))
    run = {**known, "n": 5, "context_tokens": 100.0, "f1_full": 0.9, "variant": "plain"}
    return {"table": "all", "rows": [row.to_dict() for row in rows], "runs": [run], "notes": [HOSTILE]}


def story(**more) -> Story:
    told = {
        "question": HOSTILE, "answer": "cello", "sender_answer": "cello", "text": "Rom plays the cello.",
        "receipt": Receipt(
            recipe="q2c@0.5 int4", context_tokens=4, kept_tokens=2, element_count=4096,
            stage_s={"prefill": 0.02, "draft": 0.01, "select": 0.004, "encode": 0.003, "wire": 0.01,
                     "decode": 0.002, "first_token": 0.006, "generate": 0.02},
            bytes={"manifest": 275, "map": 1, "scales": 300, "codes": 2000, "framing": 200, "grpc": 40},
            socket_bytes=3100,
        ),
        "told": Explanation(("Rom", " plays", HOSTILE, " cello"), (0.1, 0.0, 0.2, 0.7), (1.0, 0.0, 0.5, 1.0)),
        "reads_tokens_per_s": 500.0,
    }  # fmt: skip
    return Story(**{**told, **more})


class Reader(HTMLParser):
    """What a page would fetch, what it runs, and its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.scripts = 0
        self.spans: list[tuple[str, str]] = []
        self._span: str | None = None

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.scripts += tag == "script" or any(name.startswith("on") for name in named)
        for name in ("src", "href", "xlink:href", "data", "action"):
            if named.get(name) and not named[name].startswith("#"):
                self.fetched.append(named[name])
        self._span = named.get("class") if tag == "bdi" else None

    def handle_endtag(self, tag):
        self._span = None

    def handle_data(self, data):
        if self._span in ("sent", "dropped", "partly"):
            self.spans.append((self._span, data))


PAGES = {"tables": lambda: page.tables_page(report()), "story": lambda: page.story_page(story())}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_needs_nothing_but_itself_and_runs_nothing(name):
    html = PAGES[name]()
    reader = Reader()
    reader.feed(html)
    assert reader.fetched == []
    assert reader.scripts == 0
    assert not re.search(r"url\((?!#)|@import", html), "styles fetch nothing either"
    assert "Content-Security-Policy" in html
    assert "prefers-color-scheme: dark" in html
    assert html == PAGES[name](), "the same report gives the same page"


def test_the_tables_page_has_all_plots_and_all_rows():
    html = page.tables_page(report())
    assert html.count("<svg") == 5
    assert "#010203" not in html
    assert html.count("<tbody>") == 3
    assert html.count("<tr>") == 3 + len(report()["rows"])
    ids = re.findall(r'\bid="([^"]+)"', html)
    clips = {i for i in ids if i.startswith("p")}
    assert all(f'id="{i}"' in html for i in re.findall(r"url\(#([^)]+)\)", html))
    assert clips


def test_a_report_without_some_tables_has_the_plots_that_it_can():
    few = report()
    few["rows"] = [row for row in few["rows"] if row["table"] == "spectrum"]
    assert page.tables_page(few).count("<svg") == 1


def test_the_story_shades_what_is_needed_and_strikes_out_what_was_not_sent():
    reader = Reader()
    reader.feed(page.story_page(story()))
    assert reader.spans == [("sent", "Rom"), ("dropped", " plays"), ("partly", HOSTILE), ("sent", " cello")]
    html = page.story_page(story())
    shades = [float(x) for x in re.findall(r"--w: ([0-9.]+)", html)]
    assert shades[3] == max(shades)
    assert shades[1] == 0
    assert "3 of 4 tokens were sent" in html
    assert "2,816 bytes" in html
    assert "the socket's own count is 3,100" in html
    assert "above" in html
    assert "Mbit/s" in html


class Texts(HTMLParser):
    """Every text of a page with the elements that it stands in, every element and every attribute."""

    VOID = frozenset({"meta", "br", "path", "use"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[tuple[str, tuple[str, ...]]] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attributes]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attributes]

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        self.texts.append((data, tuple(self.open)))


def hostile_report(text: str) -> dict:
    told = report()
    for row in [*told["rows"], *told["runs"]]:
        row.update(model=text, data=text)
    for row in told["rows"]:
        if row["table"] == "selection":
            row["selection"] = text
        if row["table"] != "spectrum":
            row["recipe"] = text + row["recipe"]
    return {**told, "notes": [text]}


def hostile_story(text: str) -> Story:
    receipt = story().receipt
    told = Explanation(("Rom", text, " cello"), (0.1, 0.2, 0.7), (1.0, 0.5, 1.0))
    return story(
        question=text, answer=text, sender_answer=text, told=told, receipt=replace(receipt, recipe=text)
    )


HOSTILE_PAGES = {
    "tables": lambda text: page.tables_page(hostile_report(text)),
    "story": lambda text: page.story_page(hostile_story(text)),
}
MORE_HOSTILE = {
    **{name: text[:5000] for name, text in hostile.HOSTILE.items()},
    "elements": HOSTILE,
    "attributes": "\"'><img src=x onerror=alert(1)> style=x --w: 1; javascript:alert(1)",
    "entities": "&lt;script&gt; &#x1b;[2J &NewLine;",
    "comments": "<!-- --!> <![CDATA[ ]]> <?x ?>",
    "templates": "{{ 7*7 }} {% raw %} ${x} $\\frac$ $$",
}


@pytest.mark.parametrize("text", MORE_HOSTILE.values(), ids=MORE_HOSTILE)
@pytest.mark.parametrize("name", HOSTILE_PAGES)
def test_a_foreign_text_stays_a_text_and_keeps_to_itself(name, text):
    honest, found = Texts(HOSTILE_PAGES[name]("honest")), Texts(HOSTILE_PAGES[name](text))
    assert found.tags == honest.tags, "it makes no element"
    assert {n for n, _ in found.attributes} == {n for n, _ in honest.attributes}, "and no attribute"
    assert not any(n.startswith("on") or "javascript:" in v for n, v in found.attributes)
    for words, _ in found.texts:
        assert hostile.obeyed(words) == ""
    begins = (shown_text(text)[:20], shown(text)[:20])
    marked = [around for words, around in found.texts if words.startswith(begins)]
    assert marked
    for around in marked:
        assert around[-1] == "bdi" or "svg" in around, "isolated from what stands around it"
    HOSTILE_PAGES[name](text).encode()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1.0, 1e308])
def test_a_story_of_numbers_that_are_none_is_a_page(number):
    told = Explanation(("a", "b"), (number, 0.5), (number, 1.0))
    receipt = replace(story().receipt, stage_s=dict.fromkeys(STAGES, abs(number)), socket_bytes=2**63)
    html = page.story_page(story(told=told, receipt=receipt, reads_tokens_per_s=abs(number)))
    assert html.count("<bdi class=") == 2


def test_the_waterfall_ends_where_the_answer_does():
    places = re.findall(r"margin-left: ([0-9.]+)%; width: ([0-9.]+)%", page.story_page(story()))
    ends = [float(left) + float(width) for left, width in places]
    assert len(places) == 8
    assert ends[-1] == pytest.approx(100, abs=0.1)
    lefts = [float(left) for left, _ in places]
    assert lefts == sorted(lefts)


def test_the_page_knows_every_stage_that_a_receipt_can_have():
    every = Receipt(kept_tokens=2, context_tokens=4, element_count=4096, stage_s=dict.fromkeys(STAGES, 0.01))
    html = page.story_page(story(receipt=every))
    for name in STAGES:
        assert f": {name.replace('_', ' ')}</span>" in html


def test_codecs_have_marks_of_their_own():
    shown = {
        "text": "text", "raw": "raw", "lossless": "raw", "int8": "int8", "int4": "int4", "int2": "int2",
        "int3": "int2", "svd=8 raw": "svd", "transform=1": "transform", "transform=1 basis=own": "transform",
        "q2c@0.5 transform=1": "transform", "q2c@0.5 int8": "int8",
    }  # fmt: skip
    marks = {recipe: plots._mark_of(summarise(recipe, [outcome(0.9, 4)]).to_dict()) for recipe in shown}
    for recipe, kind in shown.items():
        alike = {other for other, its in shown.items() if its == kind}
        assert {other for other, mark in marks.items() if mark == marks[recipe]} == alike, recipe


def test_a_text_transfer_says_that_the_text_was_sent():
    receipt = Receipt(
        recipe="text", context_tokens=4, element_count=4096, stage_s={"read": 0.02}, bytes={"text": 20}
    )
    html = page.story_page(story(receipt=receipt, told=Explanation()))
    assert "The text itself was sent" in html
    assert 'class="context"' not in html


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    assert not page.available()
    with pytest.raises(ConfigError, match=r"pip install 'kvlink\[report\]'"):
        page.tables_page(report())


@pytest.mark.skipif(BROWSER is None, reason="no headless browser: install chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_a_real_browser_shows_the_page(tmp_path, name, scheme):
    file, shot = tmp_path / "page.html", tmp_path / "shot.png"
    file.write_text(PAGES[name](), encoding="utf-8")
    number = {"dark": 0, "light": 1}[scheme]
    options = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=900,1400",
        "--force-device-scale-factor=1", f"--blink-settings=preferredColorScheme={number}",
        f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]  # fmt: skip
    dom = subprocess.run(
        [*options, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=HANGS_S, check=True
    )
    assert "<title>taken" not in dom.stdout
    assert "CONSOLE" not in dom.stderr, dom.stderr
    assert dom.stdout.count("<h2") >= 1
    subprocess.run(
        [*options, f"--screenshot={shot}", file.as_uri()], capture_output=True, timeout=HANGS_S, check=True
    )
    light = _brightness(shot)
    assert light > 0.8 if scheme == "light" else light < 0.35


def _brightness(file: Path) -> float:
    """Mean brightness of a picture, 0 to 1."""
    from matplotlib import image

    return float(image.imread(file)[..., :3].mean())
