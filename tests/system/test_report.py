"""The report in a browser."""

import base64
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import decoded, segmented_subject, write_log
from matplotlib.colors import to_rgb
from reports import HOSTILE, PROVENANCE, report_of, scores_of

from scripts.report.page import render, report_subject
from scripts.results.pictures import DISAGREEMENT_COLOR, TISSUE_COLORS
from scripts.results.tables import write_csv
from scripts.synthesis.contrast import T1_CONTRAST, T2_CONTRAST, six_month_image
from scripts.synthesis.phantom_brains import label_map
from scripts.tissues import Tissue


@pytest.mark.slow
def test_thirteen_subjects_of_full_size_stay_below_ten_megabytes_and_ten_seconds_each():
    rng = np.random.default_rng(3)
    label = label_map(rng)
    brain = {
        "label": label,
        "T1": six_month_image(label, T1_CONTRAST, rng),
        "T2": six_month_image(label, T2_CONTRAST, rng),
    }
    # the worst of both: a label to compare with, and uncertainty that is noise
    item = segmented_subject(brain, labeled=True, uncertain=True)
    item["uncertainty"] *= torch.rand(item["uncertainty"].shape)
    before = os.times()
    subject = report_subject(item)
    after = os.times()
    assert sum(after[:2]) - sum(before[:2]) < 10  # of a CPU; 1 to 2 are usual
    assert not subject.warnings
    subjects = [SimpleNamespace(**{**vars(subject), "subject": str(n)}) for n in range(13)]
    page = render(subjects, PROVENANCE, {subject.subject: scores_of(0.8) for subject in subjects}, {})
    assert len(page.encode()) < 10e6


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def slow_in_browser(test: Any) -> Any:
    return pytest.mark.slow(pytest.mark.skipif(BROWSER is None, reason="no browser: apt install chromium")(test))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # as root the sandbox doesn't start
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(brains, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("report")
    items = [segmented_subject(brains[n % 2], f"{n} {HOSTILE}", labeled=True, uncertain=True) for n in range(3)]
    write_csv(output / "metrics.csv", [{"subject": item["subject"]} | scores_of(0.8) for item in items])
    write_log(output, range(1, 5), 1)
    report_of(items, output, scored=True)
    return output / "report.html"


@pytest.fixture
def page(browser, report) -> Iterator[Any]:
    """The report as it is opened, its first viewer in sight; it must say nothing and fetch nothing."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    page.locator(".viewer").first.scroll_into_view_if_needed()
    page.wait_for_selector(".viewer.loaded")
    yield page
    page.close()
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]


def canvas(plane: int, scan: str) -> str:
    return f'canvas[data-plane="{plane}"][data-scan="{scan}"]'


CANVASES = [canvas(plane, scan) for plane in range(3) for scan in ("t1", "t2")]


def pixels(viewer: Any, selector: str) -> np.ndarray:
    """Those of the first canvas that fits in a page or a subject of it, (rows, columns, RGB)."""
    uri = viewer.locator(selector).first.evaluate("canvas => canvas.toDataURL()")
    return decoded(base64.b64decode(uri.removeprefix("data:image/png;base64,")))


def is_color(image: np.ndarray, color: str) -> np.ndarray:
    return (np.abs(image / 255 - np.array(to_rgb(color))) < 0.02).all(-1)


@slow_in_browser
def test_pictures_are_not_blank_and_have_outlines(page):
    for selector in CANVASES:
        image = pixels(page, selector)
        assert len(np.unique(image)) > 100
        assert all(is_color(image, color).any() for color in TISSUE_COLORS.values())
    assert page.locator("img.plot").count() == 3
    widths = page.locator("img.plot").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert min(widths) > 300


@slow_in_browser
def test_arrow_keys_move_the_slices_of_one_plane(page):
    for plane in range(3):
        before = [pixels(page, selector) for selector in CANVASES]
        slider = page.locator(".viewer").first.locator("input[type=range]").nth(plane)
        place = int(slider.input_value())
        slider.focus()
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        assert int(slider.input_value()) == place + 3
        changed = [not np.array_equal(pixels(page, s), image) for s, image in zip(CANVASES, before, strict=True)]
        assert changed == [number // 2 == plane for number in range(6)]
        for end in ("Home", "End"):
            page.keyboard.press(end)
            assert not is_color(pixels(page, canvas(plane, "t1")), TISSUE_COLORS[Tissue.WM]).any()


@slow_in_browser
def test_layers_come_and_go(page):
    boxes = page.locator(".viewer").first.locator("input[type=checkbox]")
    names = boxes.evaluate_all("boxes => boxes.map(box => box.name)")
    assert names == ["segmentation", "label", "errors", "uncertainty", "position"]
    for number, name in enumerate(names):
        before = [pixels(page, selector) for selector in CANVASES]
        boxes.nth(number).click()
        for selector, image in zip(CANVASES, before, strict=True):
            assert not np.array_equal(pixels(page, selector), image), name
        boxes.nth(number).click()
        for selector, image in zip(CANVASES, before, strict=True):
            np.testing.assert_array_equal(pixels(page, selector), image)


@slow_in_browser
def test_the_subjects_right_is_on_the_left(page):
    viewer = page.locator(".viewer").first
    viewer.locator("input[name=segmentation]").uncheck()
    viewer.locator("input[name=errors]").check()
    slider = viewer.locator("input[type=range]").nth(1)
    slider.evaluate("slider => { slider.value = 25; slider.dispatchEvent(new Event('input')); }")
    for plane in (0, 1):
        wrong = is_color(pixels(page, canvas(plane, "t1")), DISAGREEMENT_COLOR)
        left, right = wrong[:, : wrong.shape[1] // 2], wrong[:, wrong.shape[1] // 2 :]
        assert left.sum() > 500
        assert not right.any()


@slow_in_browser
def test_a_click_brings_the_other_planes_there(page):
    sliders = page.locator(".viewer").first.locator("input[type=range]")
    before = [int(sliders.nth(plane).input_value()) for plane in range(3)]
    target = page.locator(canvas(0, "t2")).first
    box = target.bounding_box()
    # a quarter from the left, which is the subject's right, and a quarter from the top, which is the front
    target.click(position={"x": box["width"] / 4, "y": box["height"] / 4})
    after = [int(sliders.nth(plane).input_value()) for plane in range(3)]
    sizes = [int(sliders.nth(plane).get_attribute("max")) for plane in range(3)]
    assert after[0] == before[0]
    assert [after[1] / sizes[1], after[2] / sizes[2]] == pytest.approx([0.75, 0.75], abs=0.03)


@slow_in_browser
def test_a_viewer_out_of_sight_is_loaded_when_it_comes_into_it(page):
    from playwright.sync_api import expect

    last = page.locator(".viewer").last
    assert "loaded" not in last.get_attribute("class")
    last.scroll_into_view_if_needed()
    expect(last).to_have_class("viewer loaded")
    assert len(np.unique(pixels(last, canvas(0, "t1")))) > 100


@slow_in_browser
def test_a_viewer_that_goes_out_of_sight_while_it_loads_stays_unloaded(page):
    layers = """async leave => {
        const viewer = [...viewers.values()].at(-1);
        const loading = viewer.load();
        if (leave) viewer.unload();
        await loading;
        return viewer.layers && Object.keys(viewer.layers);
    }"""
    assert page.evaluate(layers, True) is None
    assert page.evaluate(layers, False) == ["t1", "t2", "labels", "uncertainty"]


@slow_in_browser
def test_uncertainty_is_shown_where_the_segmentation_is_background(browser, brains, tmp_path):
    item = segmented_subject(brains[0], uncertain=True)
    missed = item["pred"][:, :, 30:34]
    missed[:] = 0
    report_of([item], tmp_path)
    page = browser.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    page.locator(".viewer").scroll_into_view_if_needed()
    page.wait_for_selector(".viewer.loaded")
    slider = page.locator("input[type=range]").nth(1)
    slider.evaluate("slider => { slider.value = 25; slider.dispatchEvent(new Event('input')); }")
    page.locator("input[name=uncertainty]").check()
    image = pixels(page, canvas(1, "t1")).astype(int)
    colorful = (np.ptp(image, axis=-1) > 50).mean()
    page.close()
    assert colorful > 0.2


@slow_in_browser
def test_hostile_names_are_shown_as_they_are(page):
    assert page.locator("h2").nth(1).inner_text() == f"Subject 0 {HOSTILE}"


@slow_in_browser
def test_nothing_sticks_out_of_a_window(page):
    for width in (360, 800, 1600):
        page.set_viewport_size({"width": width, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@slow_in_browser
def test_print_has_a_static_picture_of_each_subject(page):
    page.emulate_media(media="print")
    assert page.locator("img.static:visible").count() == 3
    assert not page.locator("canvas:visible").count()
    assert page.locator("img.plot:visible").count() == 3
    assert page.locator("img:visible").count() == 6


@slow_in_browser
def test_without_javascript_there_are_static_pictures(browser, report):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.locator("img.static:visible").count() == 3
    assert not page.locator("canvas:visible").count()
    context.close()
