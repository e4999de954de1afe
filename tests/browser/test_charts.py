"""Charts respond to mouse, keyboard and fingers: the value under the pointer, and a zoom that all of them share."""

import pytest

LINE = "figure.chart path.line"


def drag(page, chart: int, start: float, end: float) -> None:
    """With the mouse, over shares of a chart's width."""
    area = page.locator(".area").nth(chart)
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    page.mouse.move(box["x"] + start * box["width"], box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + end * box["width"], box["y"] + 70, steps=5)
    page.mouse.up()


def point(page, chart: int, share: float) -> None:
    """The mouse at a share of a chart's width."""
    area = page.locator(".area").nth(chart)
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    page.mouse.move(box["x"] + share * box["width"], box["y"] + 20)


def curve(page, chart: int = 0) -> str:
    return page.locator(".area").nth(chart).locator("path.line").first.get_attribute("d")


def shown_steps(page, chart: int = 0) -> list[str]:
    return page.locator("figure.chart").nth(chart).locator(".x span").all_inner_texts()


def zoomed(page) -> bool:
    return page.locator(".zoomed").is_visible()


def test_the_pointer_reads_every_chart_at_one_step(opened, pages):
    page = opened(pages["whole"]).page
    point(page, 0, 0.5)
    said = page.locator(".read:visible").all_inner_texts()
    assert len(said) == page.locator(".area").count() - 1, "all but the one over layers"
    assert said[0].startswith("step 200\n") and "train 3" in said[0] and "held-out" in said[0]
    page.mouse.move(1, 1)
    assert page.locator(".read:visible").count() == 0


def test_a_drag_zooms_all_charts_and_a_button_returns(opened, pages):
    page = opened(pages["whole"]).page
    charts = page.locator("figure.chart").count()
    before = [curve(page, chart) for chart in range(charts)]
    labels = [shown_steps(page, chart) for chart in range(charts)]
    assert not zoomed(page)
    drag(page, 0, 0.25, 0.5)
    assert zoomed(page) and page.locator(".zoomed span").inner_text() == "Steps 100 – 200"
    after = [curve(page, chart) for chart in range(charts)]
    assert [one for one, other in zip(before, after, strict=True) if one == other] == [before[-1]], "but over layers"
    assert {tuple(shown_steps(page, chart)) for chart in range(charts - 1)} == {("120", "140", "160", "180")}
    page.get_by_role("button", name="Whole run").click()
    assert not zoomed(page)
    assert [curve(page, chart) for chart in range(charts)] == before
    assert [shown_steps(page, chart) for chart in range(charts)] == labels


def test_a_double_click_returns_and_a_click_does_nothing(opened, pages):
    page = opened(pages["whole"]).page
    page.locator(".area").nth(1).click(position={"x": 50, "y": 50})
    assert not zoomed(page)
    drag(page, 1, 0.8, 0.3)
    assert zoomed(page), "from right to left, too"
    page.locator(".area").nth(2).dblclick(position={"x": 40, "y": 40})
    assert not zoomed(page)


def test_a_zoom_into_a_zoom_and_to_where_nothing_was_logged(opened, pages):
    shown = opened(pages["whole"])
    for _ in range(8):
        drag(shown.page, 0, 0.4, 0.6)
    low, high = shown.page.evaluate("shared.range")
    assert 1.9 < high - low < 3 and shown.said == []
    shown.page.locator(".area").first.hover()
    inside = shown.page.evaluate("[...document.querySelectorAll('figure.chart .plot')].map((e) => e.innerHTML).join()")
    assert "NaN" not in inside and "Infinity" not in inside


def test_keys_read_and_zoom(opened, pages):
    page = opened(pages["whole"]).page
    area = page.locator(".area").first
    area.focus()
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("Loss: train from")
    page.keyboard.press("ArrowRight")
    first = page.locator(".read:visible").first.inner_text()
    assert first.startswith("step 200\n")
    page.keyboard.press("ArrowRight")
    assert page.locator(".read:visible").first.inner_text().startswith("step 202\n")
    page.keyboard.press("Shift+ArrowLeft")
    assert page.locator(".read:visible").first.inner_text().startswith("step 182\n")
    page.keyboard.press("+")
    low, high = page.evaluate("shared.range")
    assert high - low == pytest.approx(200) and low < 182 < high
    page.keyboard.press("End")
    assert page.evaluate("shared.at") == pytest.approx(high, abs=2)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("shared.range[1]") > high, "the zoom follows the cursor"
    page.keyboard.press("-")
    page.keyboard.press("-")
    assert page.evaluate("shared.range") is None
    page.keyboard.press("+")
    page.keyboard.press("0")
    assert not zoomed(page)
    page.keyboard.press("Tab")
    assert page.locator(".read:visible").count() == 0 and page.evaluate("document.activeElement.className") == "area"


def touches(client, kind: str, *points: tuple[float, float]) -> None:
    found = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(points)]
    client.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": found})


def test_fingers_mark_and_pinch_and_the_page_still_scrolls(opened, pages):
    page = opened(pages["whole"], 375).page
    client = page.context.new_cdp_session(page)
    area = page.locator(".area").first
    area.scroll_into_view_if_needed()
    page.evaluate("window.scrollBy(0, 200)")
    box = area.bounding_box()
    x, y, width = box["x"], box["y"] + 60, box["width"]
    touches(client, "touchStart", (x + 0.25 * width, y))
    for share in (0.3, 0.4, 0.5):
        touches(client, "touchMove", (x + share * width, y))
    touches(client, "touchEnd")
    low, high = page.evaluate("shared.range")
    assert low == pytest.approx(100, abs=6) and high == pytest.approx(200, abs=6)
    for _ in range(10):  # a touch while the swipe's fling goes on stops that, and is no tap
        page.wait_for_timeout(400)
        page.get_by_role("button", name="Whole run").tap()
        if page.evaluate("shared.range") is None:
            break
    page.locator(".zoomed").wait_for(state="hidden")
    touches(client, "touchStart", (x + 0.4 * width, y), (x + 0.6 * width, y))
    for apart in (0.12, 0.2, 0.3):
        touches(client, "touchMove", (x + (0.5 - apart) * width, y), (x + (0.5 + apart) * width, y))
    touches(client, "touchEnd")
    low, high = page.evaluate("shared.range")
    assert high - low == pytest.approx(400 / 3, rel=0.1) and (low + high) / 2 == pytest.approx(200, abs=10)
    before = page.evaluate("[scrollY, shared.range.join()]")
    touches(client, "touchStart", (x + 100, y))
    for down in range(10, 160, 10):
        touches(client, "touchMove", (x + 100, y - down))
    touches(client, "touchEnd")
    page.wait_for_timeout(500)
    after = page.evaluate("[scrollY, shared.range.join()]")
    assert after[0] > before[0] + 100 and after[1] == before[1], "up and down moves the page, not the zoom"


def test_what_replaces_the_page_keeps_the_zoom(opened, pages):
    """As a page of a running run does it: new content, then start()."""
    shown = opened(pages["whole"])
    page = shown.page
    drag(page, 0, 0.25, 0.5)
    before = curve(page)
    page.evaluate(
        """text => { const main = new DOMParser().parseFromString(text, "text/html").querySelector("main");
        document.querySelector("main").innerHTML = main.innerHTML; start(); }""",
        pages["whole"].read_text(),
    )
    assert zoomed(page) and curve(page) == before and page.locator(".hint").count() == 1
    assert page.locator(".zoomed").count() == 1
    page.evaluate("start(); start();")
    point(page, 0, 0.1)
    assert page.locator(".area").first.locator(".read").count() == 1, "bound once"
    page.keyboard.press("Tab")
    page.get_by_role("button", name="Whole run").click()
    assert not zoomed(page) and shown.said == []


def test_ten_thousand_steps_are_small_and_detailed(opened, long):
    assert long.stat().st_size < 1e6
    shown = opened(long)
    shown.page.wait_for_selector(".hint")
    page = shown.page
    assert shown.said == []
    drawn = curve(page).count("L")
    assert 250 < drawn < 300
    drag(page, 0, 0.1, 0.9)
    assert zoomed(page) and 300 < curve(page).count("L") <= 402, "thinned anew"
    assert page.locator(".area").first.locator("path.band.t1").count() == 1
    page.get_by_role("button", name="Whole run").click()
    drag(page, 0, 0.5, 0.6)
    assert curve(page).count("L") > 3 * drawn / 10, "more of these steps than before"
    drag(page, 0, 0.2, 0.8)
    assert zoomed(page) and curve(page).count("L") > 100
    assert shown.said == []
