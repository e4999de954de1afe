"""Every page opens without complaint at desktop and phone width, light and dark: nothing overlaps, nothing is empty."""

import pytest

NAMES = ("whole", "begun", "tuned", "tokenizer", "compared")
LOOKS = [(1280, "light"), (1280, "dark"), (375, "light"), (375, "dark")]

# Pairs of texts of one chart or card that lie on each other, and boxes that something sticks out of.
CLASHES = """() => {
  const found = [], boxes = (root, pick) => [...root.querySelectorAll(pick)]
    .filter((e) => e.offsetParent && e.textContent.trim()).map((e) => [e, e.getBoundingClientRect()]);
  const named = (e) => `${e.tagName}.${e.className} "${e.textContent.trim().slice(0, 40)}"`;
  const within = (root, pick) => {
    const all = boxes(root, pick);
    for (const [i, [one, a]] of all.entries()) for (const [two, b] of all.slice(i + 1)) {
      if (one.contains(two) || two.contains(one)) continue;
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (wide > 1 && high > 2) found.push(`${named(one)} on ${named(two)}`);
    }
  };
  for (const chart of document.querySelectorAll("figure.chart"))
    within(chart, "h3, .legend li, .y span, .x span, .xname span, .xname b");
  for (const card of document.querySelectorAll(".card"))
    within(card, "dt, dd, h3, h4, .about b, .about span, .row span");
  within(document, "main > *");
  within(document, ".card, figure.chart");
  for (const box of document.querySelectorAll(".card, figure.chart"))
    if (box.scrollWidth > box.clientWidth + 1) found.push(`${named(box)} is wider inside than outside`);
  const right = document.documentElement.clientWidth;
  for (const [one, a] of boxes(document, "main p, main h2, .card, figure.chart, .legend li, .x span"))
    if (a.left < -1 || a.right > right + 1) found.push(`${named(one)} sticks out of the page`);
  return found;
}"""

EMPTY = """() => {
  const found = [];
  for (const part of document.querySelectorAll("main > *"))
    if (part.textContent.trim().length < 10) found.push(`section ${part.id} says nothing`);
  for (const chart of document.querySelectorAll("figure.chart")) {
    const drawn = [...chart.querySelectorAll("path.line, path.dots")].filter((path) => path.getBBox().width > 0
      || path.getAttribute("d").includes("h0"));
    if (!drawn.length) found.push(`chart ${chart.querySelector("h3").textContent} is empty`);
  }
  for (const image of document.images)
    if (!image.complete || !image.naturalWidth) found.push(`image ${image.alt} is not decoded`);
  return found;
}"""


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
@pytest.mark.parametrize("name", NAMES)
def test_a_page_opens_whole(opened, pages, name, width, scheme):
    shown = opened(pages[name], width, scheme)
    assert shown.said == []
    assert [url for url in shown.asked if not url.startswith("data:")] == [pages[name].as_uri()]
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    assert shown.page.evaluate(CLASHES) == []
    assert shown.page.evaluate(EMPTY) == []
    shown.page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= width, "what unfolds scrolls sideways"
    assert pages[name].stat().st_size < 5e6


def test_what_a_whole_page_has(opened, pages):
    """Every kind of line and every kind of image comes out as something."""
    page = opened(pages["whole"]).page
    sections = page.evaluate("[...document.querySelectorAll('main > *')].map((part) => part.id).filter(Boolean)")
    wanted = ["head", "numbers", "curves", "gaps", "survey", "images", "attention", "neighbours", "what-ran", "footer"]
    assert sections == wanted
    titles = page.evaluate("[...document.querySelectorAll('figure h3')].map((title) => title.textContent)")
    for title in ("Loss nats", "Memory GiB", "What being new costs nats", "k-NN accuracy", "Attention distance px"):
        assert title in titles
    assert page.locator(".strip .track .running").count() == 2 and page.locator(".track .return").count() == 2
    assert page.evaluate("document.images.length") == 8 * 5 + 4 * 5 + 6 * 11


def test_light_and_dark_differ_and_can_be_read(opened, pages):
    """Text on what is behind it, at least 4.5 to 1 (WCAG 2.1, 1.4.3)."""
    contrast = """() => {
      const numbers = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
      const light = (rgb) => rgb.map((c) => c / 255).map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
      const behind = (e) => { for (; e; e = e.parentElement) { const colour = getComputedStyle(e).backgroundColor;
        if (!/, 0\\)|transparent/.test(colour)) return colour; } };
      const pick = "h1, .lead, .section, .hint, dt, dd, .legend li, .y span, .row span, .status";
      return [...document.querySelectorAll(pick)]
        .filter((e) => e.offsetParent).map((e) => {
          const [a, b] = [getComputedStyle(e).color, behind(e)].map((c) => light(numbers(c))).sort((x, y) => y - x);
          return [(a + 0.05) / (b + 0.05), e.className + " " + e.textContent.slice(0, 20)];
        }).filter(([ratio]) => ratio < 4.5);
    }"""
    back = "getComputedStyle(document.body).backgroundColor"
    light, dark = (opened(pages["whole"], scheme=scheme).page for scheme in ("light", "dark"))
    assert light.evaluate(back) != dark.evaluate(back)
    assert light.evaluate(contrast) == [] and dark.evaluate(contrast) == []


def test_without_its_script_a_page_is_complete(opened, pages):
    page = opened(pages["whole"], script=False).page
    assert page.locator("figure.chart path.line").count() >= 12 and page.locator(".hint").count() == 0
    assert page.locator("figure.chart").first.bounding_box()["height"] > 150
