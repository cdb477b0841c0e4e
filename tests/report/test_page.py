"""The page in a real browser without a network: all is drawn, nothing hostile runs, what is missing is said."""

import base64
import io
import math
import re
from contextlib import ExitStack, contextmanager

import pytest
from PIL import Image
from playwright.sync_api import sync_playwright

from gapprobe.errors import DataError, OutputError
from gapprobe.report.page import checked_image, render_report, write_report
from tests.browser import find_browser
from tests.report import synthetic

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
ALL_DRAWN = "[...document.querySelectorAll('.drawing')].every((place) => place.dataset.drawn === 'yes')"

pytestmark = pytest.mark.xdist_group("browser")


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def visit(chromium, results, folder, width=1400):
    """Open the report of `results` without a network; complaints and requests to the outside fail at the end."""
    complaints, requests = [], []
    context = chromium.new_context(viewport={"width": width, "height": 900}, offline=True)
    shown = context.new_page()
    shown.on("console", lambda message: complaints.append(message.text))
    shown.on("pageerror", lambda error: complaints.append(str(error)))
    shown.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    shown.on("request", lambda request: requests.append(request.url))
    shown.goto(write_report(results, folder / "report.html").as_uri(), timeout=60_000)
    shown.wait_for_function(ALL_DRAWN, timeout=60_000)
    yield shown
    context.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []


@pytest.fixture(scope="module")
def both(chromium, tmp_path_factory):
    """The report of two families on a wide screen."""
    with visit(chromium, synthetic.results(), tmp_path_factory.mktemp("both")) as shown:
        yield shown


@pytest.fixture(scope="module")
def phone(chromium, tmp_path_factory):
    """The same on a phone."""
    with visit(chromium, synthetic.results(), tmp_path_factory.mktemp("phone"), width=420) as shown:
        yield shown


@pytest.fixture
def opened(chromium, tmp_path):
    """Return a function from results to an open page."""
    with ExitStack() as stack:
        yield lambda results: stack.enter_context(visit(chromium, results, tmp_path))


@pytest.mark.parametrize("screen", ["both", "phone"])
def test_draws_every_figure_of_both_families_offline(screen, request):
    shown = request.getfixturevalue(screen)
    assert shown.locator(".drawing").count() == 18
    assert shown.locator(".drawing .main-svg:first-child").count() == 18
    assert shown.locator(".drawing[role=img][aria-label]").count() == 18
    for panel, lines in {"lens-0": 4, "probe-1": 4, "splits-0": 4, "cosine-1": 2, "risk-0": 3}.items():
        assert shown.locator(f"#{panel} .scatterlayer .js-line").count() == lines
    assert shown.locator("#gap-0 .barlayer .point").count() == 7
    assert synthetic.results()["headline"] in shown.inner_text(".headline")
    assert [shown.locator("h3", has_text=name).count() > 0 for name in ("LLaVA", "InstructBLIP")] == [True, True]
    assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert shown.locator(".gallery img.tiny").count() == 12
    assert shown.evaluate("[...document.querySelectorAll('.gallery img')].every((image) => image.naturalWidth === 28)")


def test_what_the_browser_drew_is_what_the_results_say(both):
    lens = synthetic.results()["families"]["instructblip"]["lens"]
    drawn = both.evaluate("Object.fromEntries(document.getElementById('lens-1').data.map((t) => [t.name, t.y]))")
    assert drawn["text only"] == lens["text"]
    assert drawn["visual · wrong"] == lens["visual_failure"]


def test_says_what_the_probe_may_claim_beneath_its_figure(both):
    for place, family in enumerate(synthetic.results()["families"].values()):
        verdicts = both.locator(".verdicts").nth(place)
        said = verdicts.locator("li p").all_inner_texts()
        assert said == [verdict["sentence"] for verdict in family["probe"]["verdict"].values()]
        beaten = [verdict["beats"] for verdict in family["probe"]["verdict"].values()]
        assert verdicts.locator(".mark.beats").count() == sum(beaten)
        assert both.locator(f"figure:has(#probe-{place}) + .verdicts").count() == 1


def test_more_than_two_families_have_a_column_each(opened):
    shown = opened(synthetic.results(("llava", "instructblip", "mine")))
    assert shown.locator(".drawing").count() == 27
    assert shown.locator("#gap h3").all_inner_texts() == ["LLaVA", "InstructBLIP", "mine"]
    assert shown.locator("#lens-2").evaluate("(place) => place.data.find((t) => t.name === 'visual').y.length") == 33


def test_hostile_strings_stay_text(opened):
    shown = opened(synthetic.hostile())
    assert shown.evaluate("window.pwned") is None
    assert shown.locator("img[src=x], [onerror], script[src], a[href^='javascript'], b:text-is('bold')").count() == 0
    assert shown.locator("script").count() == 18 + 2
    assert synthetic.HOSTILE[:60] in shown.inner_text(".headline")
    assert "<img src=x" in shown.inner_text("#gallery")
    assert shown.locator(".gallery .noimage").count() == 3
    assert "</script>" in shown.evaluate("document.getElementById('relation-1').textContent")
    assert shown.locator(".drawing text a").count() == 0


def test_details_of_the_gap_the_recipe_and_the_selection_are_shown_as_they_are(opened):
    shown = opened(synthetic.with_details())
    gap, probe, selective = (" ".join(shown.inner_text(f"#{part}").split()) for part in ("gap", "probe", "selective"))
    assert "321 trials are right only when the entity is named, 12 only when it is shown" in gap
    assert "p < 0.0001" in gap
    assert "resampled: [41.0, 71.0]; only questions: [42.0, 72.0]" in gap
    assert "gpt-4o/mnist: text only 100 %, visual 68 %, a gap of 32 %" in gap
    assert "sound 900 90.0 %" in gap
    assert "published 850 90.0 %" in gap
    assert "31 of 3000 answers, 1 to read" in gap
    assert "77 questions asked with 4 options" in gap
    assert "letters are no tokens of this model" in gap
    assert "foresees 81.0 %" in probe
    assert "With no question on both sides 56.0 % are left: leakage by question is worth 25.0 points" in probe
    assert "leakage by entity is worth 25.0 points [19.0, 31.0]. n = 900." in probe
    assert "stacked" in selective
    shown.evaluate("document.querySelectorAll('details').forEach((part) => part.open = true)")
    assert "Answer nothing, two." in shown.inner_text("#selective")
    row = shown.locator("#selective tr", has=shown.locator("th", has_text="ece")).inner_text()
    assert row.count("not computed") == 4
    disagreement = " ".join(shown.locator("#gap tr", has_text="qtwo").inner_text().split())
    assert disagreement == "qtwo visual two 12 wrong right"


def test_what_a_model_said_stays_text_there_too(opened):
    shown = opened(synthetic.with_details(synthetic.HOSTILE))
    assert shown.evaluate("window.pwned") is None
    assert shown.locator("img[src=x], [onerror], b:text-is('bold')").count() == 0
    shown.evaluate("document.querySelectorAll('details').forEach((part) => part.open = true)")
    # A question, an answer, a reason and a promise.
    assert shown.inner_text("main").count("<img src=x") == 4


def test_policy_stops_a_script_that_slipped_in(chromium, tmp_path):
    page_text = render_report(synthetic.results(("llava",)))
    smuggled = page_text.replace("</main>", "<script>window.pwned = 1</script></main>")
    (tmp_path / "smuggled.html").write_text(smuggled)
    context = chromium.new_context(offline=True)
    shown = context.new_page()
    shown.goto((tmp_path / "smuggled.html").as_uri())
    shown.wait_for_function(ALL_DRAWN)
    assert shown.evaluate("window.pwned") is None
    context.close()


def test_nulls_are_explained_in_words(opened):
    shown = opened(synthetic.with_nulls())
    text = shown.inner_text("body")
    assert re.search(r"\b(None|nan|NaN|null|undefined)\b", text.replace("None of 5600", "")) is None
    assert "AUC of the probe and its controls by layer could not be computed. No probe was fitted" in text
    assert "Cosine similarity by layer could not be computed. There were no rows for it" in text
    assert "No linking failure to show" in text
    assert "A line that is missing has no rows" in text
    assert shown.locator(".key dd.words", has_text="not computed").count() == 5
    assert shown.locator(".drawing").count() == 6
    assert shown.locator("h3", has_text="LLaVA").count() == 0  # one family needs no heading


def test_failed_calls_are_counted_with_their_reasons(opened):
    text = opened(synthetic.with_failures()).inner_text("#rows")
    assert "15 of 5600 calls could not be run" in text
    assert "images/7_03.png is empty (0 bytes)" in text
    assert "None of 5600" in text  # the other family


def test_prints_on_paper(phone, tmp_path):
    phone.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")


def test_same_results_give_the_same_bytes_below_7_megabytes(tmp_path):
    first, second = (write_report(synthetic.results(), tmp_path / name) for name in ("a.html", "b.html"))
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size < 7e6
    assert first.read_bytes().count(b"plotly.js v") == 1


def test_no_figure_can_end_the_script_element_it_stands_in():
    blocks = re.findall(r"data-figure=\"[^\"]+\">(.*?)</script>", render_report(synthetic.hostile()), flags=re.DOTALL)
    assert len(blocks) == 18
    assert [block for block in blocks if re.search("[<>&\u2028]", block)] == []


def test_page_asks_for_nothing_from_outside():
    text = render_report(synthetic.results())
    without_plotly = text[: text.index("plotly.js v")]
    assert re.findall(r"(?:src|href)=\"(?!#|data:)[^\"]*\"", without_plotly) == []
    assert "default-src 'none'" in without_plotly
    assert "unsafe-eval" not in without_plotly
    assert "script-src 'unsafe-inline'" not in without_plotly


def test_refuses_numbers_that_json_cannot_hold(tmp_path):
    broken = synthetic.results()
    broken["families"]["llava"]["lens"]["text"][0] = math.nan
    with pytest.raises(DataError, match="null"):
        write_report(broken, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_says_where_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"report\.html"):
        write_report(synthetic.results(("llava",)), tmp_path / "file" / "report.html")


def jpeg(side):
    stream = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(stream, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def test_only_real_png_and_jpeg_are_shown():
    assert checked_image(synthetic.digit_image(1)) == {"uri": synthetic.digit_image(1), "tiny": True}
    assert checked_image(jpeg(400)) == {"uri": jpeg(400), "tiny": False}
    assert checked_image(jpeg(8).replace("image/jpeg", "image/png")) is None
    kinds = ("image/svg+xml", "image/png", "image/jpeg", "text/html")
    for uri in (*(f"data:{kind};base64,AAAA" for kind in kinds), "x.png", ""):
        assert checked_image(uri) is None
    assert checked_image(synthetic.digit_image(1) + '" onload="x') is None
