"""The HTML report: what it says of a document, what a hostile name can't do, and what a real browser makes of it."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from llmfast.bench.webpage.charts import draw_all
from llmfast.bench.webpage.page import to_html, write_html
from llmfast.errors import OutputExistsError

HOSTILE = "<script>window.owned = 1</script><img src=x onerror='window.owned = 1'>\x1b[31m=cmd()"


def _row(name: str, speed: float, kld: float, megabytes: float, **facts: Any) -> dict[str, Any]:
    ratio = speed / 100
    latencies = [1 / speed * (1 + step / 100) for step in range(-5, 6)]
    layers = [
        {"graph": "model", "name": f"model.layers.{block}.{role}", "role": role, "weights": "4 bit",
         "num_parameters": 1000, "bytes": int(megabytes * 1e5), "damage": 0.01 * (block + 1)}
        for block in range(3) for role in ("q_proj", "down_proj")
    ]  # fmt: skip
    parts = [{"name": f"Operator{index}", "seconds": 1e-3 / (index + 1), "calls": 2} for index in range(12)]
    phase = {"phase": "decode", "unit": "token", "seconds": 0.01, "operators": parts, "roles": [], "outside_s": 1e-4}
    return {
        "bundle": name,
        "task": "text-generation",
        "model_sha256": {"model.onnx": "0" * 64},
        "size_bytes": int(megabytes * 1e6),
        "bits_per_weight": 4.5,
        "decode_tokens_per_s": speed,
        "decode_tokens_per_s_ratio": ratio,
        "decode_tokens_per_s_ratio_spread": [ratio * 0.98, ratio * 1.02],
        "kld": kld,
        "verdict": {"decode_tokens_per_s": "better" if ratio > 1 else "equal"},
        "samples": {},
        "latencies": {"tpot_s": latencies},
        "layers": layers,
        "profile": {"phases": [phase], "findings": []},
        **facts,
    }


def _document(name: str = "int4") -> dict[str, Any]:
    machine = {"cpu": "CPU", "isa": ["avx2"], "cores": 2, "load_average": 0.1, "onnxruntime": "1.30", "threads": 2}
    settings = {
        "prompt_tokens": [128], "output_tokens": 32, "shapes": ["1x128"], "rounds": 9, "provider": ["cpu"],
        "threads": [2], "data": None, "precision": 0.02,
    }  # fmt: skip
    gate = {"bundle": name, "figure": "kld", "limit": 0.1, "value": 0.25, "kind": "max", "spread": None}
    return {
        "schema_version": 3,
        "machine": machine,
        "settings": settings,
        "warnings": [f"`{name}` is noisy"],
        "baseline": "fp32",
        "rows": [_row("fp32", 100, 0.0, 500), _row("slow", 90, 0.3, 400), _row(name, 250, 0.25, 100)],
        "verdict": [gate | {"verdict": "missed", "passed": False}],
    }


def _charts(document: dict[str, Any]) -> dict[str, Any]:
    return {chart.name: chart for chart in draw_all(document)}


def test_every_figure_of_the_document_has_its_chart_and_its_table() -> None:
    charts = _charts(_document())
    assert list(charts) == [
        "trade-off", "ratios", "latencies-tpot-s", "time-decode", "size",
        "sensitivity-fp32", "sensitivity-slow", "sensitivity-int4",
    ]  # fmt: skip
    assert ["int4", "2.50", "0.25", "100.0", "yes"] in charts["trade-off"].rows
    assert ["decode tokens/s", "int4", "2.500", "2.450 - 2.550", "better"] in charts["ratios"].rows
    assert charts["latencies-tpot-s"].rows[2][:3] == ["int4", "11", "4.000"]
    assert len(charts["time-decode"].rows) == 13  # the table has what the bars lump together
    assert len(charts["time-decode"].traces) == 9


def test_what_another_bundle_beats_is_off_the_line() -> None:
    line, *_ = _charts(_document())["trade-off"].traces
    assert line["x"] == [1.0, 2.5]
    assert [row[-1] for row in _charts(_document())["trade-off"].rows] == ["yes", "no", "yes"]


def test_bars_add_up_to_what_was_measured() -> None:
    chart = _charts(_document())["time-decode"]
    total = sum(1e3 * part["seconds"] for part in _document()["rows"][0]["profile"]["phases"][0]["operators"])
    assert sum(trace["x"][0] for trace in chart.traces) == pytest.approx(total + 0.1)


def test_a_bundle_that_failed_has_no_charts_but_a_row() -> None:
    document = _document()
    error = {"kind": "NativeCrashError", "message": "the process died", "hint": "", "exit_code": 9}
    document["rows"][2] = {"bundle": "int4", "error": error, "verdict": {}, "samples": {}, "model_sha256": {}}
    page = to_html(document)
    assert "sensitivity-int4" not in page
    assert "int4 (failed)" in page
    assert "the process died" in page


def test_one_bundle_alone_is_reported_too() -> None:
    document = _document() | {"verdict": [], "warnings": []}
    document["rows"] = document["rows"][:1]
    assert "trade-off" not in _charts(document)
    assert "no gates" in to_html(document)


def test_hostile_names_stay_names() -> None:
    page = to_html(_document(HOSTILE))
    assert HOSTILE not in page
    assert "<script>window.owned" not in page
    assert "<img" not in re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert "\x1b" not in page
    figures = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert figures is not None
    drawn = json.dumps(json.loads(figures.group(1)))
    assert "<" not in drawn  # Plotly would read it as markup
    assert html.escape("<script>window") in drawn


def test_only_the_two_scripts_of_the_page_may_run() -> None:
    page = to_html(_document())
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    directives = html.unescape(policy.group(1)).split("; ")
    assert "default-src 'none'" in directives
    scripts = next(one for one in directives if one.startswith("script-src"))
    assert re.fullmatch(r"script-src( 'sha256-[A-Za-z0-9+/=]+'){2}", scripts)
    assert not re.search(r'(src|href)="(?!data:)', page.partition("<script")[0])


def test_report_replaces_an_older_file_but_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write_html(_document(), path)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputExistsError):
        write_html(_document(), tmp_path / "folder")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["folder", "report.html"]


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["int4", HOSTILE], ids=["plain", "hostile"])
def test_a_browser_draws_every_chart_without_complaint(name: str, width: int, browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    document = _document(name)
    write_html(document, path)
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(path.as_uri())
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('.chart')].map((one) => {"
        "  const box = one.querySelector('svg.main-svg').getBoundingClientRect();"
        "  return [one.id, box.left, box.right, one.querySelectorAll('.trace, .heatmaplayer image').length];});"
    )
    assert [one[0] for one in drawn] == [chart.name for chart in draw_all(document)]
    assert all(left >= 0 and right <= width and traces for _, left, right, traces in drawn)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return window.owned") is None
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def test_dark_readers_get_light_letters(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_html(_document(), path)
    colours = {}
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get(path.as_uri())
        colours[scheme] = browser.execute_script(
            "return [getComputedStyle(document.body).backgroundColor,"
            "        getComputedStyle(document.querySelector('.xtick text')).fill]"
        )
    assert colours["light"] == ["rgb(255, 255, 255)", "rgb(28, 28, 30)"]
    assert colours["dark"] == ["rgb(22, 22, 26)", "rgb(236, 236, 241)"]
