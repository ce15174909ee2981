"""The report as a reader sees it: opened in headless Chromium at a laptop's and a phone's width."""

import stat
import struct
import time
import zlib
from pathlib import Path

import pytest
from chromium import Chromium
from page_audit import WIDTHS, look_at, png_size
from test_report import make_evaluation, make_histogram, make_inputs, make_readout, make_selection

from couponflow.campaign.pages import report
from couponflow.campaign.pages.report import ReportInputs

SOUND = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width"><title>Sound</title></head>'
    '<body style="background:#fff;color:#222"><h1>Sound</h1>{}</body></html>'
)
DOT = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
TEXT = '<text x="{}" y="40" font-size="14">{}</text>'
CHART = '<svg role="img" aria-label="A chart" width="200" height="60"><rect width="9" height="9"/>{}</svg>'


def make_large() -> ReportInputs:
    """A shop of forty million users, with long names wherever a name may be long."""
    selection = make_selection(
        num_users=40_000_000,
        mailed_users=12_345_678,
        control_users=1_234_567,
        budget_amount=123_456_789.5,
        expected_cost_amount=123_456_000.25,
        expected_conversions=2_345_678.9,
        expected_profit_amount=-98_765_432.1,
        version="2017-10-30-" + "a" * 60,
    )
    for step in selection["waterfall"]:
        step["remaining"], step["excluded"] = step["remaining"] * 16_200, step["excluded"] * 16_200
    histogram = make_histogram()
    for name in ("counts", "selected_counts"):
        histogram[name] = [16_200 * count for count in histogram[name]]
    evaluation = make_evaluation()
    evaluation["models"]["dien_with_a_name_of_fifty_characters_and_no_blank_at_all"] = evaluation[
        "models"
    ].pop("blend")
    campaign = {"campaign_id": "autumn-2017-" + "north-" * 8, "num_coupons": 1, "categories": ["X" * 70]}
    return make_inputs(
        selection=selection, evaluation=evaluation, campaign=campaign, score_histogram=histogram
    )


def make_holes() -> ReportInputs:
    """One model with two metrics that do not exist, and nothing else of an evaluation."""
    evaluation = make_evaluation(comparisons=[], gate={}, training={}, attention={}, backtest={})
    evaluation["models"] = {
        "dien": {"model_version": "dien-1", "metrics": {"auc": float("nan"), "ece": None}}
    }
    return make_inputs(evaluation=evaluation, score_histogram={}, stages=(), conservation=(), verdicts=())


CASES = {
    "full": lambda: make_inputs(readout=make_readout()),
    "large": make_large,
    "holes": make_holes,
    "empty": ReportInputs,
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("case", CASES)
def test_the_report_is_sound_at_any_width(
    browser: Chromium, tmp_path: Path, case: str, width: int, scheme: str
) -> None:
    file = tmp_path / "report.html"
    file.write_text(report.render(CASES[case]()))
    look = look_at(browser, file, width, scheme)
    look.keep(f"report-{case}-{width}-{scheme}")
    assert look.faults == []
    sizes = [png_size(picture) for picture in look.pictures]
    assert {wide for wide, _ in sizes} == {width}
    assert sum(high for _, high in sizes) > WIDTHS[width]


@pytest.mark.parametrize(
    ("kinds", "body"),
    [
        (set(), f'<h2>Next</h2><img alt="a dot" src="{DOT}">' + CHART.format(TEXT.format(5, "text"))),
        ({"console error"}, '<script>console.error("lost")</script>'),
        ({"console warning"}, '<script>console.warn("old")</script>'),
        ({"exception"}, "<script>nothing.there()</script>"),
        ({"broken image"}, '<img alt="a dot" src="data:image/gif;base64,R0lGOD" width="9" height="9">'),
        ({"broken image"}, CHART.format('<image href="data:image/gif;base64,R0lGOD"/>')),
        ({"no words"}, f'<img src="{DOT}">'),
        ({"no words"}, CHART.format("").replace("aria-label", "data-label")),
        (
            {"request", "failed request", "log error"},
            '<link rel="stylesheet" href="http://report.invalid/a.css">',
        ),
        ({"too wide"}, '<div style="width:700px">a wide table</div>'),
        ({"heading"}, "<h3>Two levels down</h3>"),
        ({"empty"}, '<section style="margin:9px"></section>'),
        ({"empty"}, CHART.format("").replace('<rect width="9" height="9"/>', "")),
        ({"cut"}, '<p style="width:60px;overflow:hidden;white-space:nowrap">longer than its box</p>'),
        ({"cut"}, '<p style="width:60px;overflow-wrap:anywhere">12,345,678</p>'),
        ({"cut"}, CHART.format(TEXT.format(180, "beyond the edge"))),
        (
            {"cut"},
            '<div style="overflow-x:auto;width:99px"><table style="width:400px"><caption>what the table below'
            " holds, in words</caption><tr><td>1</td></tr></table></div>",
        ),
        ({"overlap"}, CHART.format(TEXT.format(5, "one label") + TEXT.format(20, "another"))),
        ({"small"}, '<p style="font-size:7px">a chart\'s tick</p>'),
        ({"contrast"}, '<p style="color:#999">pale</p>'),
    ],
)
def test_each_fault_is_caught_and_nothing_else(
    browser: Chromium, tmp_path: Path, kinds: set[str], body: str
) -> None:
    file = tmp_path / "page.html"
    file.write_text(SOUND.format(body))
    faults = look_at(browser, file, 390, has_schemes=False).faults
    assert {fault.partition(":")[0] for fault in faults} == kinds, faults


def test_a_page_that_ignores_the_wish_for_dark_is_caught(browser: Chromium, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(SOUND.format(""))
    assert [fault.partition(":")[0] for fault in look_at(browser, file, 390, "dark").faults] == ["scheme"]


def test_a_picture_that_is_cut_or_spoiled_is_no_picture() -> None:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 3, 8, 2, 0, 0, 0))
    whole = head + chunk(b"IDAT", zlib.compress(bytes(3 * 7))) + chunk(b"IEND", b"")
    assert png_size(whole) == (2, 3)
    short = head + chunk(b"IDAT", zlib.compress(bytes(2 * 7))) + chunk(b"IEND", b"")
    for wrong in (b"", b"GIF89a", whole[:-1], whole[:-12], whole.replace(b"IDAT", b"IDAX"), short):
        with pytest.raises(ValueError, match="no PNG"):
            png_size(wrong)


@pytest.mark.parametrize(
    ("script", "timeout_s", "error", "words"),
    [
        ("sleep 60", 0.5, TimeoutError, r"did not answer Page\.enable in 0\.5 s; its last words: none"),
        (
            "echo 'libnss3.so: not found' >&2; exit 127",
            30,
            ConnectionError,
            r"ended .*libnss3\.so: not found",
        ),
    ],
)
def test_a_browser_that_hangs_or_dies_is_named_and_ended(
    tmp_path: Path, script: str, timeout_s: float, error: type[Exception], words: str
) -> None:
    program = tmp_path / "chromium"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    began = time.monotonic()
    with pytest.raises(error, match=words), Chromium(str(program), tmp_path, timeout_s) as browser:
        browser.call("Page.enable")
    assert time.monotonic() - began < 30  # it sleeps longer
    assert not (Path("/proc") / str(browser.pid)).exists()
