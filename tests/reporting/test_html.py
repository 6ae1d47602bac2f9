"""The page as a file, and as a browser shows it."""

import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import normrewrite as nr
from normrewrite.api.bench import bench
from normrewrite.data import Batch, Data
from normrewrite.provenance import history, manifest
from normrewrite.reporting import html
from normrewrite.reporting.document import Document
from normrewrite.reporting.facts import gather
from tests import browser
from tests.reporting.networks import EVIL, ResNet, Twice, images, networks, prepared


class Reader(HTMLParser):
    """Elements, their attributes, and whether each is closed."""

    VOID = ("meta", "br", "hr", "img", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def document(model: Any = None, name: str = "twin.pt", **options: Any) -> Document:
    """A report with everything in it."""
    torch.manual_seed(0)
    original = prepared(ResNet()) if model is None else model
    if model is None:
        original.stages[1][1].bn2 = Twice(4).eval()
    rules = {"norm": "keep", "stages.0.0.*": "topk:3"} if model is None else None
    twin, report = nr.plan(original, rules=rules).apply()
    x = images()
    data = Data(Batch({options.get("input", "x"): x}, torch.zeros(len(x), dtype=torch.long)))
    came = history.History({"file": name, "sha256": "0" * 64}, None, (), ({"command": ["convert", name], "seed": 0},))
    record = manifest.seal(manifest.describe(twin, report), twin.state_dict(), came)
    facts = gather(twin, original, data, record=record, batch_size=20)
    facts.bench = bench(original, twin, x[:1], rounds=4)
    facts.notes.append(name)
    file = {"file": name, "bytes": 3, "sha256": "1" * 64}
    return Document(facts, file, file, file, record, ["report", name])


@pytest.fixture(scope="module")
def page() -> str:
    return html.page(document()).decode()


def harmless(text: str) -> Reader:
    """Well formed; no script, no handler, nothing that would be fetched."""
    read = Reader(text)
    assert read.open == [] and not {"script", "img", "link", "iframe", "object", "base", "form"} & set(read.tags)
    assert not [name for name, _ in read.attributes if name.startswith("on")]
    assert all(value.startswith("#") for name, value in read.attributes if name in ("href", "src", "xlink:href"))
    assert "url(" not in text and "@import" not in text
    return read


def test_page_is_whole_and_asks_for_nothing(page: str) -> None:
    read = harmless(page)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    assert ("content", policy) in read.attributes
    links = {value[1:] for name, value in read.attributes if name == "href"}
    assert links and links <= {value for name, value in read.attributes if name == "id"}


def test_page_tells_everything(page: str) -> None:
    words = " ".join(Reader(page).text)
    for told in (
        *("Same function", "7 of 9", "topk:3", "left as it was (1 site)", "refused (1 site)"),
        *(
            "Twice overrides forward",
            "bits of headroom",
            "× σ",
            "2-norm by channel",
            "signal to noise",
            "dB",
            "top-1",
            " ms",
        ),
        *("normrewrite convert twin.pt", "normrewrite report twin.pt", "SHA-256", "normrewrite verify --manifest"),
    ):
        assert told in words, told


def test_names_do_no_harm() -> None:
    """In module names, file names, the manifest and its commands."""
    text = html.page(document(networks()["evil"](), f"{EVIL}.pt", input="input")).decode()
    assert "&lt;script&gt;" in text
    read = harmless(text)
    assert f"{EVIL}.pt" in "".join(read.text)  # and they are told as they are


def test_half_a_character_in_a_name() -> None:
    assert b"\\udcff" in html.page(document(name="odd\udcff.pt"))


def test_missing_jinja_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(nr.NormRewriteError, match=r"pip install normrewrite\[report\]"):
        html.page(document())


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Browser]:
    if browser.found() is None:
        pytest.skip(f"no headless Chromium is here ({', '.join(browser.NAMES)})")
    with browser.Browser() as started:
        yield started


@pytest.fixture(scope="module")
def evil_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "evil.html"
    path.write_bytes(html.page(document(networks()["evil"](), f"{EVIL}{'very-long-' * 12}.pt", input="input")))
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, page: str) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page)
    return path


@pytest.mark.parametrize("width", [320, 390, 768, 1200])
@pytest.mark.parametrize("which", ["file", "evil_file"])
def test_browser_shows_it_in_any_width(
    chromium: browser.Browser, which: str, width: int, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(which)
    page = chromium.open(path, width)
    assert page.complaints == [] and page.requests == [path.resolve().as_uri()]
    assert page.value("document.title") != "ran"
    assert page.value("document.documentElement.scrollWidth") <= width
    boxes = "[...document.querySelectorAll('.scroll')].map(b => getComputedStyle(b).overflowX).join()"
    assert set(page.value(boxes).split(",")) == {"auto"}
    outside = (
        "[...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().right > innerWidth + 1).length"
    )
    assert page.value(outside) == 0


def test_browser_finds_what_would_be_wrong(chromium: browser.Browser, file: Path, tmp_path: Path) -> None:
    """The checks above, on a page that fails each."""
    bad = tmp_path / "bad.html"
    wide = "<div style='width:3000px'>wide</div><img src='http://127.0.0.1:9/x.png'><script>alert(1)</script>"
    bad.write_text(file.read_text().replace("<main>", f"<main>{wide}"))
    page = chromium.open(bad, 390)
    assert page.complaints and page.value("document.documentElement.scrollWidth") > 390


def test_browser_in_the_dark_and_on_paper(chromium: browser.Browser, file: Path, tmp_path: Path) -> None:
    colours = [
        chromium.open(file, 390, dark=dark).value("getComputedStyle(document.body).backgroundColor")
        for dark in (False, True)
    ]
    assert colours == ["rgb(251, 250, 248)", "rgb(20, 23, 27)"]
    page = chromium.open(file, 1200)
    page.pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    assert page.complaints == []
