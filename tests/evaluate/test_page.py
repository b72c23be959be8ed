"""The HTML pages in a real browser: they open without an error, load nothing, and can be used, also by keyboard.

These tests need Playwright and Chromium, Chrome or Edge; without them they are skipped.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.inputs import write_split
from tests.helpers.scripts import run_script
from tests.helpers.tables import MANY, table_of
from utils import compare
from utils.data.classes import BDD100K, ClassTable
from utils.data.datasets import NpyFolder
from utils.evaluate.gallery import LABEL_MAPS, ScoredImage, encode_labels, report_cards, save_label_maps
from utils.evaluate.metrics import count_pixels
from utils.evaluate.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge")
ROAD, POLE, SKY, CAR = 0, 5, 10, 13
# Names that would run, break out of a tag, hide text or end a line. A manifest can have those that no file can.
HOSTILE = [
    "<script>hacked=1</script>",
    '"><img src=x onerror=hacked=1>',
    "</script><script>hacked=1</script>",
    "' onclick='hacked=1",
    "{{ 7 * 7 }}{% raw %}",
    "two\nlines",
    "not text \udcff",
    "turned \u202egpj.exe",
    "javascript:hacked=1",
    "plain",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """A function that opens a file in a new window. At the end no page may have failed or asked for another file."""
    contexts: list[Any] = []
    troubles: list[str] = []
    requests: list[str] = []

    def open_page(path: Path, **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == [] and all(url.startswith(("file:", "data:")) for url in requests)
    assert {url for url in requests if url.startswith("file:")} == {url for url in requests if url.endswith(".html")}


def evaluate(
    folder: Path, data: Path, seed: int, names: list[str] | None = None, classes: ClassTable = BDD100K
) -> list[np.ndarray]:
    """Write an evaluation of random predictions; returns the images' confusion matrices."""
    rng = np.random.default_rng(seed)
    source = NpyFolder(data)
    scored = []
    for index in range(len(source.items)):
        target = source.read_labels(index)
        prediction = target.copy()
        wrong = rng.random(target.shape) < 0.05 * (1 + index)
        prediction[wrong] = ROAD
        counts = count_pixels(torch.from_numpy(prediction), torch.from_numpy(target), len(classes)).numpy()
        scored.append(ScoredImage(index, counts, encode_labels(prediction, source, index)))
    folder.mkdir(exist_ok=True)
    names = names or [item.name for item in source.items]
    write_report(
        folder,
        {name: torch.from_numpy(image.counts) for name, image in zip(names, scored)},
        classes=classes,
        model="<b>model</b>",
        data=str(data),
        box_source="oracle",
        eval_size="frame",
        map_rule="argmax",
        cards=lambda: report_cards(source, scored, 8, classes),
    )
    save_label_maps(folder / LABEL_MAPS, scored)
    return [image.counts for image in scored]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "val", BDD100K)


def write_data(folder: Path, classes: ClassTable) -> Path:
    """Ten images of 48 x 64 with road and sky; every second one has a pole, none has a car."""
    rng = np.random.default_rng(0)
    items = {}
    for index in range(len(HOSTILE)):
        labels = np.full((48, 64), ROAD, np.uint8)
        labels[:20] = SKY
        labels[44:] = 255
        if index % 2:
            labels[:40, 30:34] = POLE
        items[f"image-{index}"] = (rng.integers(0, 256, (48, 64, 3), dtype=np.uint8), labels)
    return write_split(folder, items, classes)


@pytest.fixture(scope="module")
def counts_of_report(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[np.ndarray]]:
    folder = tmp_path_factory.mktemp("report")
    counts = evaluate(folder, data, seed=1, names=HOSTILE)
    return folder / "report.html", counts


@pytest.fixture(scope="module")
def report(counts_of_report: tuple[Path, list[np.ndarray]]) -> Path:
    return counts_of_report[0]


@pytest.fixture(scope="module")
def comparison(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three evaluations in folders whose names HTML, matplotlib and fonts could stumble over."""
    root = tmp_path_factory.mktemp("comparison")
    folders = [root / name for name in ("_before", "<img src=x onerror=hacked=1>", "later 语义 $x_{")]
    for seed, folder in enumerate(folders):
        evaluate(folder, data, seed)
    run_script(compare, *folders, "--html", root / "comparison.html")
    return root / "comparison.html"


def shown_names(page: Any) -> list[str]:
    return page.locator("#cards .card:not([hidden]) .name").all_inner_texts()


def luminance(color: str) -> float:
    """The relative luminance of a CSS colour, as WCAG defines it."""
    channels = [int(channel) / 255 for channel in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, two: str) -> float:
    low, high = sorted(map(luminance, (one, two)))
    return (high + 0.05) / (low + 0.05)


def style(page: Any, selector: str, name: str) -> str:
    return page.locator(selector).first.evaluate(f"element => getComputedStyle(element).{name}")


# Without a browser.


def test_the_policy_allows_the_pages_own_script_and_style_alone(report: Path, comparison: Path) -> None:
    for path in (report, comparison):
        html = path.read_text()
        policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
        assert policy is not None
        directives = dict(part.split(" ", 1) for part in policy[1].replace("&#39;", "'").split("; "))
        assert directives["default-src"] == "'none'" and directives["img-src"] == "data:"
        for tag in ("style", "script"):
            (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            assert directives[f"{tag}-src"] == f"'sha256-{digest}'"
        assert "style=" not in html and "http://" not in html.replace("http://www.w3.org/", "")
        assert not re.search(r"https?://(?!www\.w3\.org/)", html)


def test_what_classes_are_taken_for(tmp_path: Path) -> None:
    """Most of a class's wrong pixels: a share that rounds to nothing is told as such, and 1 % as 1 %."""
    matrix = torch.zeros(19, 20, dtype=torch.int64)
    matrix[0, 0], matrix[0, 1], matrix[1, 1], matrix[1, 19], matrix[2, 2] = 996, 4, 990, 10, 7
    flags: dict[str, Any] = {"model": "m", "data": "d", "box_source": "none", "eval_size": "frame"}
    write_report(tmp_path, {"x": matrix}, classes=BDD100K, map_rule="argmax", **flags)
    cells = re.findall(r'<td class="text">(.*?)</td>', (tmp_path / "report.html").read_text())
    assert cells[:3] == ["sidewalk (under 1% of its pixels)", "no class (1% of its pixels)", ""]


def test_the_data_in_the_page_cannot_end_its_script(report: Path) -> None:
    (content,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', report.read_text(), re.DOTALL)
    assert not set(content) & set("<>&")
    names = [row["name"] for row in json.loads(content)["rows"]]
    assert names[:2] == HOSTILE[:2] and names[5:8] == ["two\\nlines", "not text \\udcff", "turned \\u202egpj.exe"]


# With one.


@pytest.mark.slow
@pytest.mark.parametrize("classes", [table_of("道路", *(f"类别{i}" for i in range(1, 11))), MANY], ids=len)
def test_pages_of_other_classes_filter_by_them(
    classes: ClassTable, open_page: Callable[..., Any], tmp_path: Path
) -> None:
    data = write_data(tmp_path / "val", classes)
    folders = [tmp_path / name for name in ("a", "b")]
    for seed, folder in enumerate(folders):
        evaluate(folder, data, seed, classes=classes)
    run_script(compare, *folders, "--html", tmp_path / "comparison.html")
    pole = classes.names[POLE]
    for path in (folders[0] / "report.html", tmp_path / "comparison.html"):
        page = open_page(path)
        assert page.locator("#class option").all_inner_texts() == ["all classes", *classes.names]
        page.locator("details.legend summary").click()
        legend = page.locator("details.legend li").all_inner_texts()
        assert legend[: len(classes)] == list(classes.names) and "not labelled" in legend[len(classes)]
        for c in (classes.classes[0], classes.classes[POLE], classes.classes[-1]):
            assert style(page, f".legend .c{c.id}", "backgroundColor") == f"rgb{c.color}"
        every = len(shown_names(page))
        page.locator("#class").select_option(label=pole)
        assert 0 < len(shown_names(page)) < every
        assert page.locator("#status").inner_text().endswith(f"those with {pole}")
        assert pole in page.locator("#value-title").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # wide tables scroll by themselves
    matrix = open_page(folders[0] / "report.html").locator("table.matrix")
    assert matrix.locator("thead span").all_inner_texts() == [*classes.names, "no class"]
    assert matrix.locator("tbody tr").count() == len(classes)
    header = matrix.locator("thead span").first  # Chinese lies on its side like other names, not on its head
    assert header.evaluate("element => getComputedStyle(element).textOrientation") == "sideways"


@pytest.mark.slow
def test_hostile_names_are_shown_and_do_nothing(open_page: Callable[..., Any], report: Path, comparison: Path) -> None:
    page = open_page(report)
    page.wait_for_load_state("networkidle")
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.title().endswith("<b>model</b>")
    names = page.locator("#scores tbody td:first-child").all_inner_texts()
    assert sorted(names) == sorted(
        [*HOSTILE[:5], "two\\nlines", "not text \\udcff", "turned \\u202egpj.exe", *HOSTILE[8:]]
    )
    assert page.locator("script").count() == 2 and page.locator("img[onerror], [onclick]").count() == 0
    page = open_page(comparison)
    assert page.evaluate("typeof hacked") == "undefined"
    assert "<img src=x onerror=hacked=1>" in page.inner_text("#evaluations ~ .scroll")


@pytest.mark.slow
def test_what_is_added_to_the_page_is_blocked(browser: Any, report: Path) -> None:
    page = browser.new_page()
    page.goto(report.as_uri())
    blocked = page.evaluate(
        """async () => {
            const blocked = [];
            document.addEventListener("securitypolicyviolation", (event) => blocked.push(event.effectiveDirective));
            const image = document.createElement("img");
            image.src = "http://127.0.0.1:9/x.png";
            document.body.append(image);
            const style = document.createElement("style");
            style.textContent = "body { display: none }";
            document.body.append(style);
            try { document.body.insertAdjacentHTML("beforeend", "<p>") } catch (error) { blocked.push(error.name) }
            try { await fetch("http://127.0.0.1:9/") } catch (error) { }
            await new Promise((resolve) => setTimeout(resolve, 100));
            return blocked;
        }"""
    )
    assert {"img-src", "style-src-elem", "connect-src", "TypeError"} <= set(blocked)
    assert style(page, "body", "display") == "block"
    page.close()


@pytest.mark.slow
def test_images_are_filtered_by_class_and_name_and_sorted(
    open_page: Callable[..., Any], counts_of_report: tuple[Path, list[np.ndarray]]
) -> None:
    path, counts = counts_of_report
    page = open_page(path)
    shown = shown_names(page)
    assert len(shown) == 8 and page.inner_text("#status") == "8 of 8 images shown"

    def expected(key: Callable[[np.ndarray], float], of: Callable[[int], bool] = lambda index: True) -> list[str]:
        order = sorted(filter(of, range(len(counts))), key=lambda index: key(counts[index]))
        return [name for name in (HOSTILE[index] for index in order) if name in shown]

    def miou(matrix: np.ndarray) -> float:
        hits, truth = np.diag(matrix), matrix.sum(axis=1)
        with np.errstate(invalid="ignore"):
            return float(np.nanmean(np.where(truth > 0, hits / (truth + matrix[:, :19].sum(axis=0) - hits), np.nan)))

    readable = [name for name in shown if "\\" not in name]  # the others are escaped
    assert [name for name in shown if name in readable] == [n for n in expected(miou) if n in readable]
    page.select_option("#order", "high")
    assert shown_names(page) == shown[::-1]
    page.select_option("#order", "name")
    assert shown_names(page) == sorted(shown)

    page.select_option("#class", "pole")
    page.select_option("#order", "wrong")
    poles = shown_names(page)
    assert [name for name in poles if name in readable] == [
        name
        for name in expected(lambda m: -(m[POLE].sum() + m[:, POLE].sum() - 2 * m[POLE, POLE]), lambda i: i % 2 == 1)
        if name in readable
    ]
    assert len(poles) == page.locator("#cards .card:not([hidden])").count() < 8
    assert page.inner_text("#status") == f"{len(poles)} of 8 images shown: those with pole"
    assert "IoU of pole" in page.locator("#cards .card:not([hidden]) .value").first.inner_text()
    assert page.locator("#scores tbody tr").count() == 5  # of all ten images
    page.select_option("#class", "car")
    assert shown_names(page) == [] and page.inner_text("#status") == "0 of 8 images shown: those with car"

    page.select_option("#class", "")
    page.fill("#search", "SCRIPT")
    assert shown_names(page) and all("script" in name for name in shown_names(page))


@pytest.mark.slow
def test_the_table_of_classes_is_sorted(open_page: Callable[..., Any], report: Path) -> None:
    page = open_page(report)
    ious = page.locator("#class-table tbody tr td:nth-child(2)")
    click = page.get_by_role("button", name="IoU", exact=True).click
    click()
    upward = [text.split()[0] for text in ious.all_inner_texts()]
    click()
    downward = [text.split()[0] for text in ious.all_inner_texts()]
    assert upward[3:] == downward[3:] == ["–"] * 16  # classes without pixels stay last
    assert upward[:3] == sorted(upward[:3]) == downward[:3][::-1] and len(set(upward[:3])) == 3
    assert page.locator("#class-table th[aria-sort]").get_attribute("aria-sort") == "descending"


@pytest.mark.slow
def test_layers_are_switched_and_faded(open_page: Callable[..., Any], report: Path) -> None:
    page = open_page(report)

    def visible() -> set[str | None]:
        layers = page.locator("#cards .layer")
        return {layers.nth(i).get_attribute("data-layer") for i in range(layers.count()) if layers.nth(i).is_visible()}

    assert visible() == {"2"}
    assert all(page.evaluate("[...document.images].map(image => image.complete && image.naturalWidth)"))
    for label, layer in (("Ground truth", "0"), ("Prediction", "1")):
        page.get_by_label(label).check()
        assert visible() == {layer}
    page.get_by_label("Picture", exact=False).first.check()
    assert visible() == set()
    page.keyboard.press("3")
    assert visible() == {"2"} and page.get_by_label("Errors").is_checked()
    assert style(page, "#cards .layer[data-layer='2']", "opacity") == "0.7"
    page.locator("#opacity").focus()
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
    assert style(page, "#cards .layer[data-layer='2']", "opacity") == "0.5"
    assert page.inner_text("#opacity-value") == "50 %"
    page.locator("#search").press("1")  # what is typed there switches no layer
    assert visible() == {"2"} and page.locator("#search").input_value() == "1"


@pytest.mark.slow
def test_a_picture_is_enlarged_by_keyboard(open_page: Callable[..., Any], report: Path) -> None:
    page = open_page(report)
    names = shown_names(page)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    first = page.locator("#cards .card:not([hidden]) button").first
    for _ in range(100):
        page.keyboard.press("Tab")
        if first.evaluate("element => element === document.activeElement"):
            break
    page.keyboard.press("Enter")
    enlarged = page.locator("#viewer .name")
    assert enlarged.inner_text() == names[0]
    page.keyboard.press("ArrowRight")
    assert enlarged.inner_text() == names[1]
    page.keyboard.press("2")
    assert page.locator("#viewer .layer:visible").get_attribute("data-layer") == "1"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")  # none is before the first
    assert enlarged.inner_text() == names[0]
    page.keyboard.press("Escape")
    assert not page.locator("#viewer").is_visible()
    assert first.evaluate("element => element === document.activeElement")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_chart_can_be_read_in_light_and_dark(
    scheme: str, open_page: Callable[..., Any], report: Path, comparison: Path
) -> None:
    for path in (report, comparison):
        page = open_page(path, color_scheme=scheme)
        paper = style(page, "body", "backgroundColor")
        assert (luminance(paper) > 0.5) == (scheme == "light")
        for selector in ("body", "p", "nav a", "figcaption .reason", "thead th"):
            assert contrast(paper, style(page, selector, "color")) >= 4.5, selector
        for selector in ("svg.chart text", "svg.chart text tspan"):
            if page.locator(selector).count():
                assert contrast(paper, style(page, selector, "fill")) >= 4.5
    cells = open_page(report, color_scheme=scheme).locator(".matrix td.hit").all()
    assert len({cell.evaluate("element => getComputedStyle(element).backgroundColor") for cell in cells}) > 2


@pytest.mark.slow
@pytest.mark.parametrize(("width", "columns"), [(360, 1), (1600, 4)])
def test_narrow_and_wide_windows(
    width: int, columns: int, open_page: Callable[..., Any], report: Path, comparison: Path
) -> None:
    for path in (report, comparison):
        page = open_page(path, viewport={"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert len(style(page, "#cards", "gridTemplateColumns").split()) == columns


@pytest.mark.slow
def test_without_javascript_pictures_are_shown(open_page: Callable[..., Any], report: Path) -> None:
    page = open_page(report, java_script_enabled=False)
    assert page.locator("#cards .card").count() == 8
    assert page.locator("#cards .layer[data-layer='2']").first.is_visible()


@pytest.mark.slow
def test_a_comparison_shows_the_changes_to_each_evaluation(open_page: Callable[..., Any], comparison: Path) -> None:
    page = open_page(comparison)
    legend = page.locator("svg.chart").first.text_content()
    assert all(name in legend for name in ("_before", "<img src=x onerror=hacked=1>", "later 语义 $x_{"))
    values = page.locator("#cards .value")
    assert re.fullmatch(r"change of mIoU [+−]\d\.\d{3}", values.first.inner_text())
    before = values.all_inner_texts()
    page.select_option("#order", "low")

    def changes() -> list[float]:
        return [float(text.split()[-1].replace("−", "-")) for text in values.all_inner_texts()]

    assert changes() == sorted(changes())
    page.select_option("#order", "change")
    page.select_option("#column", "1")
    assert values.all_inner_texts() != before
    assert [abs(value) for value in changes()] == sorted(map(abs, changes()), reverse=True)
    assert page.get_by_role("radio", name="_before to later 语义 $x_{").is_checked()  # the layer goes with the column
    assert page.locator("#cards .layer:visible").first.get_attribute("data-layer") == "5"
