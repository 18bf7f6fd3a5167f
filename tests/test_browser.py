"""The report in headless Chromium: nothing in the console, nothing beyond the window, and the viewer by mouse and by keyboard."""

import math
import re

import browser as chromium
import pytest
import run_directories
from run_directories import annotated, make

from opd_jax.analysis import report

pytestmark = [pytest.mark.slow, pytest.mark.skipif(chromium.BINARY is None, reason=chromium.MISSING)]

HOSTILE = (
    "<script>alert(1); window.hacked = 1</script>",
    "\"><img src=x onerror='window.hacked = 1; alert(2)'>",
    "</script><script>window.hacked = 1</script><!--",
    "'; window.hacked = 1; //",
    "\u2028\u2029\u202egnp.exe\u0000\u0007",
    "javascript:alert(3)",
    "x" * 400,
    "\u0300" * 200,
)
TOKENS, RATIOS = ["good", " bad", "東", "", "\n", "<eos>"], [1.5, -2.0, -9.1, 0.0, -0.5, 0.25]


@pytest.fixture(scope="module")
def browser():
    tab = chromium.Browser()
    yield tab
    tab.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """On-policy runs of two seeds, one without a teacher, one of old lines, one whose texts are hostile."""
    folder = tmp_path_factory.mktemp("report")
    top = [(" the", 0.5), ("<b>", 0.25), ("\n", 0.125), (" ", 0.0625), ("<eos>", 1e-5)]
    samples = [annotated(TOKENS[:3], [0.0, 0.0, 0.0], step=1), annotated(TOKENS, RATIOS, step=3, special=[5], top=top)]
    attacks = [annotated(HOSTILE, [-1.0] * len(HOSTILE), prompt=" ".join(HOSTILE), top=[(text, 0.1) for text in HOSTILE[:5]])]
    long_names = {"task__path": "/a/very/long/path/" + "without/any/space" * 20, "student__path": HOSTILE[1]}
    paths = [
        make(folder / "opd_0", samples=samples),
        make(folder / "opd_1", samples=samples, seed=1, accuracy=0.8),
        make(folder / "sft", samples=[annotated(TOKENS, None, special=[5])], rollout__source="dataset", signal__divergence="nll"),
        make(folder / "old", completion=HOSTILE[0], task__level=3),
        make(folder / "hostile <i>&amp;", samples=attacks, **long_names),
    ]
    report.write(paths, folder / "report.html")
    return folder / "report.html"


def beyond_the_window(browser):
    """What a reader would have to scroll the page sideways for: its width, then elements outside the scrolling boxes of tables."""
    return browser.run(
        """(() => {
        const wide = document.documentElement.clientWidth;
        const out = [...document.querySelectorAll("body *")].filter((e) => !e.closest(".scroll, svg, #tip[hidden]"))
          .filter((e) => e.getClientRects().length && (e.getBoundingClientRect().right > wide + 1 || e.getBoundingClientRect().left < -1));
        const page = document.documentElement.scrollWidth > wide ? ["page"] : [];
        return [...page, ...out.map((e) => e.tagName + "." + e.className)];
        })()"""
    )


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_goes_wrong_and_nothing_is_wider_than_the_window(browser, page, width, dark):
    browser.open(page, width=width, dark=dark)
    for run in range(5):
        choose_run(browser, run)
        assert beyond_the_window(browser) == []
    assert browser.run("[...document.querySelectorAll('details')].forEach((e) => (e.open = true))") is None
    assert beyond_the_window(browser) == []
    ground = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 200) == dark
    assert browser.problems == []


def test_what_goes_wrong_would_be_seen(browser, page, tmp_path):
    browser.open(page)
    browser.run("console.error('planted')")
    browser.run("new Promise((done) => setTimeout(() => { setTimeout(done); throw new Error('planted too'); }))")
    browser.run("document.body.insertAdjacentHTML('beforeend', '<div class=planted style=\"width: 3000px\">x</div>')")
    assert beyond_the_window(browser) == ["page", "DIV.planted"]
    assert [problem.split(":")[0] for problem in browser.problems] == ["console.error", "exception"]
    planted = page.read_text().replace(
        "</header>", "<script>alert(1)</script><img src='http://127.0.0.1:9/x.png'><b onclick='alert(2)'>x</b>"
    )
    (tmp_path / "planted.html").write_text(planted)
    browser.open(tmp_path / "planted.html")  # what escapes every escape meets the policy of the page
    browser.run("document.querySelector('b[onclick]').click()")
    refused = [problem for problem in browser.problems if "Content Security Policy" in problem]
    assert len(refused) == 3 and not any(problem.startswith("dialog") for problem in browser.problems), browser.problems


def choose_run(browser, number):
    browser.run(
        f"(() => {{ const s = document.querySelector('#viewer select'); s.value = {number}; s.dispatchEvent(new Event('change')); }})()"
    )


def tip(browser):
    """The note beside a token as lines of text, or None."""
    return browser.run("(() => { const t = document.getElementById('tip'); return t.hidden ? null : t.innerText; })()")


def numbers_of(text):
    return {name: value for name, value in re.findall(r"^(student.*|teacher \w+|log-ratio.*)\t(.*)$", text, re.MULTILINE)}


def last_step(browser):
    browser.run("document.querySelector('[aria-label=\"later step\"]').click()")


def test_hovering_shows_what_was_logged(browser, page):
    browser.open(page)
    assert tip(browser) is None
    last_step(browser)
    browser.point(".token", 1)
    text = tip(browser)
    assert text.startswith("␣bad · token 2")
    assert numbers_of(text) == {
        "student probability": "0.250",
        "teacher probability": f"{0.25 * math.exp(-2):.3f}",
        "log-ratio, log q − log π": "−2.00 nats",
        "student entropy": "1.25 nats",
        "teacher entropy": "0.75 nats",
    }
    top = text.split("most probable tokens")[1].split()
    assert top == ["␣the", "0.500", "<b>", "0.250", "⏎", "0.125", "␣", "0.063", "<eos>", "1.0e−5"]
    browser.point("h2", 0)
    assert tip(browser) is None and browser.problems == []


def test_the_keyboard_reaches_every_token(browser, page):
    browser.open(page)
    last_step(browser)
    browser.run("document.querySelector('[aria-label=\"earlier step\"]').focus()")
    for _ in range(2):  # the slider, then the first token: of each sample one is in the order of Tab
        browser.press("Tab")
    seen = [tip(browser).splitlines()[0]]
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft", "End", "ArrowRight", "Home"):
        browser.press(key)
        seen.append(tip(browser).splitlines()[0])
    parts = ("good · token 1", "␣bad · token 2", "東 · token 3", "(part of a character) · token 4", "東 · token 3")
    assert seen == [*parts, "<eos> (special) · token 6", "<eos> (special) · token 6", "good · token 1"]
    assert browser.run("document.activeElement.getAttribute('aria-describedby')") == "tip"
    assert browser.run("document.activeElement.getAttribute('aria-label')") == "token good, log-ratio 1.50 nats"
    browser.press("Escape")
    assert tip(browser) is None
    browser.press("ArrowRight")
    assert tip(browser).startswith("␣bad")
    browser.press("Tab")
    assert tip(browser) is None and browser.problems == []


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (1280, 460), (400, 700)])
def test_the_note_is_in_the_window_and_beside_its_token(browser, page, width, height):
    browser.open(page, width=width, height=height)
    last_step(browser)
    for place in ("start", "center", "end"):
        for number in (0, 5):
            browser.run(f"document.querySelectorAll('.token')[{number}].scrollIntoView({{block: '{place}'}})")
            browser.run(f"document.querySelectorAll('.token')[{number}].focus({{preventScroll: true}})")
            note, token = box(browser, "#tip"), box(browser, ".token:focus")
            assert note["left"] >= 0 and note["top"] >= 0 and note["right"] <= width and note["bottom"] <= height
            sideways = note["right"] <= token["left"] or token["right"] <= note["left"]
            assert sideways or note["bottom"] <= token["top"] or token["bottom"] <= note["top"]
            assert beyond_the_window(browser) == []


def box(browser, selector):
    return browser.run(f"document.querySelector('{selector}').getBoundingClientRect().toJSON()")


def test_steps_and_runs_are_chosen(browser, page):
    browser.open(page)
    label = "document.querySelector('output').textContent"
    assert browser.run(label) == "step 1 (1 of 2)" and browser.run("document.querySelectorAll('.token').length") == 3
    browser.run("(() => { const s = document.querySelector('[type=range]'); s.value = 1; s.dispatchEvent(new Event('input')); })()")
    assert browser.run(label) == "step 3 (2 of 2)" and browser.run("document.querySelectorAll('.token').length") == 6
    assert browser.run("document.querySelector('[aria-label=\"later step\"]').disabled")
    about = browser.run("document.querySelector('#viewer .about').textContent")
    assert about == f"sample 1: 6 tokens, stopped, mean log-ratio −{-sum(RATIOS) / 6:.2f} nats per token"
    names = browser.run("[...document.querySelectorAll('option')].map((o) => o.textContent)")
    assert names == ["opd_0", "opd_1", "sft", "old", "hostile <i>&amp;"]
    browser.run("document.querySelector('[aria-label=\"earlier step\"]').click()")
    assert browser.run(label) == "step 1 (1 of 2)"


def test_colours_say_sign_and_size_of_the_log_ratio(browser, page):
    browser.open(page)
    last_step(browser)
    found = browser.run(
        "[...document.querySelectorAll('.token')].map((e) => [e.classList.contains('less'), getComputedStyle(e).backgroundColor])"
    )
    assert [less for less, _ in found] == [ratio < 0 for ratio in RATIOS]
    channels = [[float(x) for x in re.findall(r"[\d.]+", colour)] for _, colour in found]
    strength = [c[3] if len(c) == 4 else 1.0 for c in channels]
    assert strength == pytest.approx([min(abs(ratio) / 3, 1) for ratio in RATIOS], abs=0.01)
    assert all((c[0] > c[2]) == (ratio < 0) for c, ratio, a in zip(channels, RATIOS, strength, strict=True) if a)
    assert "−3+3more likely" in browser.run("document.querySelector('.legend').textContent")


def test_without_a_teacher_colours_are_the_students_and_old_lines_are_plain(browser, page):
    browser.open(page)
    legend = "document.querySelector('.legend').textContent"
    choose_run(browser, 2)
    assert browser.run(legend).startswith("No teacher scored these tokens. Colour: the student's own log-probability")
    assert browser.run("[document.querySelectorAll('.token.alone').length, document.querySelectorAll('.token.less').length]") == [6, 0]
    browser.point(".token", 0)
    assert numbers_of(tip(browser)) == {"student probability": "0.250", "student entropy": "1.25 nats"}
    choose_run(browser, 3)
    assert browser.run(legend) == "No values were logged for these tokens: plain text."
    assert HOSTILE[0] in browser.run("document.querySelector('#viewer .sample').textContent") and browser.problems == []


def test_what_models_write_is_shown_and_never_run(browser, page):
    browser.open(page)
    choose_run(browser, 4)
    shown = browser.run("[...document.querySelectorAll('.token')].map((e) => e.textContent)")
    expected = [*HOSTILE[:4], "⟨U+2028⟩⟨U+2029⟩⟨U+202E⟩gnp.exe␀␇", *HOSTILE[5:7], "◌" + HOSTILE[7]]
    assert shown == expected
    for number in range(len(HOSTILE)):
        browser.point(".token", number)
        assert (number, (tip(browser) or "").count("0.100")) == (number, 5)
    assert browser.run("[window.hacked === undefined, document.images.length, document.scripts.length]") == [True, 0, 2]
    assert browser.run("document.body.innerText.includes('\\u202e')") is False
    assert browser.problems == []


def test_without_javascript_text_and_curves_are_there(browser, page):
    browser.open(page, script=False, width=400)
    text = browser.run("document.body.innerText")
    for words in ("Greedy accuracy rose from 0.30", "Tokens that the teacher finds least likely", "good bad東", HOSTILE[0]):
        assert words in text
    assert browser.run("document.querySelectorAll('figure svg').length") >= 5
    assert browser.run("document.getElementById('viewer').getClientRects().length") == 0
    assert beyond_the_window(browser) == []


def test_a_page_of_one_run_without_samples(browser, tmp_path):
    path = make(tmp_path / "new", samples=[], session=run_directories.SESSION)
    report.write([path], tmp_path / "r.html")
    browser.open(tmp_path / "r.html", width=400)
    assert "No samples were logged" in browser.run("document.body.innerText")
    assert browser.problems == [] and beyond_the_window(browser) == []
