import html
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from ood_core import report
from ood_core.errors import DataError, UsageError
from ood_core.metrics import auroc, evaluate_scores, paired_bootstrap
from ood_core.report import charts
from ood_core.report import figures as data
from PIL import Image

VOID = {"meta", "img", "br", "hr", "link", "input"}
HOSTILE = "<script>alert('x')</script> & \"quoted\"\nline \udcff \u202e.png"


class Page(HTMLParser):
    """Every element as (tag, attributes, text) with the check that tags are balanced."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"{tag} has a doubled attribute"
        element = {"tag": tag, "attrs": dict(attrs), "text": "", "inside": [e["tag"] for e in self.open]}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, cls=None):
        classes = [(e, (e["attrs"].get("class") or "").split()) for e in self.elements if e["tag"] == tag]
        return [element for element, names in classes if cls is None or cls in names]

    @property
    def text(self):
        return self.all("body")[0]["text"]


def make_table(detectors=("mcm", "knn"), sets=("near", "far"), n_id=60, n_ood=30, seed=0):
    rng = np.random.default_rng(seed)
    source = ["id"] * n_id + [name for name in sets for _ in range(n_ood)]
    table = pd.DataFrame({"id": [f"{s}/{i}.png" for i, s in enumerate(source)], "source": source})
    table["label"] = np.where(table["source"] == "id", "star", None)
    table["status"] = "ok"
    for name in detectors:
        table[name] = (rng.normal(0, 1, len(table)) + 2 * (table["source"] == "id")).astype(np.float32)
    return table


def make_results(table, bootstrap=0, **data):
    names = [name for name in table if name not in ("id", "source", "label", "status")]
    sets = [name for name in table["source"].unique() if name != "id"]
    detectors = {}
    for name in names:
        good = table[table["status"] == "ok"]
        scores = {source: good.loc[good["source"] == source, name].dropna() for source in ["id", *sets]}
        found = evaluate_scores(scores.pop("id"), scores, bootstrap=bootstrap).to_dict()
        detectors[name] = {"average": found["average"], "per_set": found["per_set"]}
    held = {"id": {"images": 1}, "ood": {name: {"images": 1} for name in sets}, "convention": "standard"}
    return {"schema": 1, "detectors": detectors, "environment": {}, "data": held | data}


def compare(table, names, bootstrap=100):
    """The record of the paired differences to the first of these detectors."""
    parts = {s: {n: table.loc[table["source"] == s, n] for n in names} for s in table["source"].unique()}
    return paired_bootstrap(parts.pop("id"), parts, reference=names[0], bootstrap=bootstrap).to_dict()


def make_page(tmp_path, table, results=None, open_image=None, **options):
    path = report.write_report(tmp_path / "report.html", results or make_results(table), table, open_image, **options)
    text = path.read_text(encoding="utf-8")
    return Page(text), text


def figure_cells(page):
    """{(metric, detector, column): (figure text, bold)} of the results table."""
    table = page.all("table", "figures")[0]
    inside = page.elements[page.elements.index(table) :]
    heads, cells, metric, row = [], {}, None, []
    for element in inside[: [e["tag"] for e in inside].index("section")]:
        scope = element["attrs"].get("scope")
        if scope == "col":
            heads.append(element["text"].removesuffix("30"))  # the set's size under its name
        elif scope == "rowgroup":
            metric = element["text"].split(",")[0]
        elif scope == "row":
            row = [element["text"]]
        elif element["tag"] == "td":
            cells[metric, row[0], heads[len(row)]] = (
                element["text"],
                element["attrs"].get("class") == "best",
            )
            row.append(element)
    return cells


def test_page_is_self_contained_and_names_everything(tmp_path):
    table = make_table(detectors=("mcm", "knn", "vim"), sets=("near", "textures", "noise"))
    results = make_results(table, notes=["Only a toy."], set_kinds={"near": "near"})
    results["environment"] = {"versions": {"torch": "2.9"}, "backbones": [{"fingerprint": "ab12" * 16}]}
    page, text = make_page(tmp_path, table, results, lambda *_: Image.new("RGB", (300, 200), "red"), title="A & B")
    for element in page.elements:
        assert element["tag"] not in ("script", "link", "iframe", "object")
        for key in ("src", "href", "xlink:href", "action", "data"):
            value = element["attrs"].get(key)
            assert value is None or value.startswith(("data:image/jpeg;base64,", "#"))
    outside = ("http:", "https:", "url(", "@import", "//", "<script")
    assert not [word for word in outside if word in re.sub('base64,[^"]*', "", text)]
    for name in (
        "mcm",
        "knn",
        "vim",
        "near",
        "textures",
        "noise",
        "Only a toy.",
        "A & B",
        "2.9",
        "ab12ab12ab12…",
    ):
        assert name in page.text
    targets = {e["attrs"]["id"] for e in page.elements if "id" in e["attrs"]}
    assert {e["attrs"]["href"][1:] for e in page.all("a")} == targets
    assert len(page.all("article")) == 3
    assert len(page.all("polyline")) == 9


def test_figures_and_bold_best(tmp_path):
    table = make_table(detectors=("mcm", "knn", "vim"), sets=("near", "far"))
    results = make_results(table, bootstrap=20)
    for place, name in enumerate(results["detectors"]):
        results["detectors"][name]["accuracy"] = 0.5 + place / 10
    page, _ = make_page(tmp_path, table, results)
    groups = [e["text"] for e in page.all("th") if e["attrs"]["scope"] == "rowgroup"]
    assert groups == ["AUROC, % higher is better", "FPR95, % lower is better"]
    cells = figure_cells(page)
    for metric, key, choose in (("AUROC", "auroc", max), ("FPR95", "fpr95", min)):
        for column in ("Average", "near", "far"):
            figures = {
                name: entry["average"] if column == "Average" else entry["per_set"][column]
                for name, entry in results["detectors"].items()
            }
            top = choose(round(100 * f[key], 1) for f in figures.values())
            for name, own in figures.items():
                shown, bold = cells[metric, name, column]
                low, high = (f"{100 * own[f'{key}_{end}']:.1f}" for end in ("low", "high"))
                assert shown == f"{100 * own[key]:.1f}{low}–{high}"
                assert bold == (round(100 * own[key], 1) == top)
    assert cells["AUROC", "vim", "ID accuracy"] == ("70.0", True)
    assert cells["FPR95", "vim", "ID accuracy"] == ("", False)
    order = [name for metric, name, head in cells if metric == "AUROC" and head == "Average"]
    averages = [results["detectors"][name]["average"]["auroc"] for name in order]
    assert averages == sorted(averages, reverse=True)
    assert order[0] in page.all("p", "lead")[0]["text"]


def test_best_bolds_printed_ties_and_no_lone_figure():
    assert data.best([0.90001, 0.9, 0.8, math.nan], higher=True) == [True, True, False, False]
    assert data.best([0.2, 0.1], higher=False) == [False, True]
    assert data.best([0.9, math.nan], higher=True) == [False, False]


def test_hostile_names_are_escaped(tmp_path):
    # pandas 3 keeps lone surrogates in columns of objects only, and in no column name.
    detector = HOSTILE.replace("\udcff", "")
    table = make_table(detectors=(detector,))
    table["id"] = pd.Series([f"{HOSTILE}{i}" for i in range(len(table))], dtype=object)
    table["label"] = pd.Series([HOSTILE] * len(table), dtype=object)
    table["source"] = pd.Series([HOSTILE if s == "far" else s for s in table["source"]], dtype=object)
    table["status"] = table["status"].astype(object)
    table.loc[3, ["status", detector]] = [HOSTILE, np.nan]
    results = make_results(table, notes=[HOSTILE])
    results["environment"] = {HOSTILE: HOSTILE}
    results["detectors"][detector]["params"] = {HOSTILE: HOSTILE}
    page, text = make_page(tmp_path, table, results, title=HOSTILE)
    assert not page.all("script")
    shown = "<script>alert('x')</script> & \"quoted\"\\nline \\udcff \\u202e.png"
    assert page.all("h1")[0]["text"] == page.all("title")[0]["text"] == shown
    assert page.all("h3")[0]["text"] == shown.replace("\\udcff", "")
    assert page.text.count(shown) > 5
    assert html.escape(shown) in text
    assert not any(bad in text for bad in ("\udcff", "\u202e", "<script"))


def test_mistakes_are_the_extreme_rows(tmp_path):
    table = make_table(n_id=50, n_ood=25)
    table.loc[[0, 60], ["status", "mcm", "knn"]] = ["truncated", np.nan, np.nan]
    table["knn"] = table["knn"].round(1)
    highest, lowest = data.confident_mistakes(table, "knn", 7)
    rows = [row for row in table.itertuples() if row.status == "ok"]
    ood = sorted((row for row in rows if row.source != "id"), key=lambda row: -row.knn)[:7]
    known = sorted((row for row in rows if row.source == "id"), key=lambda row: row.knn)[:7]
    assert list(highest["id"]) == [row.id for row in ood]
    assert list(lowest["id"]) == [row.id for row in known]


def test_thumbnails_belong_to_the_best_detectors_mistakes(tmp_path):
    table = make_table()
    results = make_results(table)
    asked = []

    def open_image(source, image_id):
        asked.append((source, image_id))
        if len(asked) == 2:
            raise OSError("gone")
        return None if len(asked) == 3 else Image.new(("RGBA", "L", "P", "CMYK")[len(asked) % 4], (3000, 8))

    page, _ = make_page(tmp_path, table, results, open_image, mistakes=5)
    name = data.rank_detectors(results["detectors"])[0]
    expected = pd.concat(data.confident_mistakes(table, name, 5))
    assert asked == list(zip(expected["source"], expected["id"], strict=True))
    assert len(page.all("img")) == 8
    assert [e["text"] for e in page.all("div", "none")] == ["no image"] * 2
    for row in expected.itertuples():
        assert row.id in page.text
        assert f"{getattr(row, name):.5g}" in page.text
    known = table.loc[table["source"] == "id", name]
    assert f"above {100 * (known < expected[name].iloc[0]).mean():.1f}\u00a0% of ID" in page.text


@pytest.mark.parametrize(
    "scores",
    [
        np.random.default_rng(0).normal(size=999),
        1e-3 + 1e-4 * np.random.default_rng(1).random(100),
        np.full(17, 0.25),
        np.zeros(3),
        np.array([3.0]),
        np.array([-np.inf, np.inf, 0.5, 0.5]),
        np.array([np.inf]),
        np.array([1.0, 1.0 + 2e-16, 1.0]),
        np.array([-1e308, 1e308, 3e299]),
        np.concatenate([np.ones(999), [0.0]]),
        np.empty(0),
    ],
    ids=[
        "normal",
        "tiny",
        "constant",
        "zeros",
        "one",
        "inf",
        "only-inf",
        "last-bit",
        "huge",
        "saturated",
        "none",
    ],
)
def test_histogram_counts_every_score(scores):
    low, high = data.score_range([scores])
    assert -math.inf < low < high < math.inf
    counts = data.histogram(scores, low, high)
    assert counts.sum() == len(scores)
    inner = np.linspace(low, high, 41)[1:-1]
    assert counts[0] == (scores < inner[0]).sum()
    ticks = [value for value, _ in charts.ticks(low, high, 5)]
    margin = 1e-6 * (high - low)
    assert 1 <= len(ticks) <= 6
    assert low - margin <= min(ticks) <= max(ticks) <= high + margin


def test_ticks_are_round_numbers_with_texts_of_their_value():
    for low, high in [
        (0, 1),
        (-37.2, 12),
        (1e-3, 1.2e-3),
        (3e-9, 8e-9),
        (1e7, 3e7),
        (0.99999, 1),
        (-0.3, 0.4),
    ]:
        found = charts.ticks(low, high, 5)
        steps = np.diff([value for value, _ in found])
        assert len(found) >= 2
        assert np.allclose(steps, steps[0])
        assert all(float(text) == pytest.approx(value, rel=1e-9, abs=1e-20) for value, text in found)
    assert [text for _, text in charts.ticks(-0.3, 0.4, 5)] == ["-0.2", "0.0", "0.2", "0.4"]


def test_histogram_range_survives_outliers_and_small_sets():
    rng = np.random.default_rng(0)
    low, high = data.score_range([np.append(rng.random(10_000), [1e9, -np.inf]), np.full(3, -5.0)])
    assert low == -5
    assert 0.9 < high < 1.1


@pytest.mark.parametrize(("shift", "round_to"), [(1.0, 9), (0.0, 9), (1.0, 0), (99.0, 9), (-99.0, 2)])
def test_roc_polyline(shift, round_to):
    rng = np.random.default_rng(5)
    known, unknown = rng.normal(shift, 1, 3001).round(round_to), rng.normal(0, 1, 1777).round(round_to)
    x, y = data.roc_points(known, unknown)
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert len(x) <= 200
    assert min(np.diff(x).min(), np.diff(y).min()) >= 0
    assert np.trapezoid(y, x) == pytest.approx(auroc(known, unknown), abs=2e-3)
    thresholds = np.concatenate([known, unknown])
    real = {(int((unknown >= t).sum()), int((known >= t).sum())) for t in thresholds} | {(0, 0)}
    counts = {(round(a * len(unknown)), round(b * len(known))) for a, b in zip(x, y, strict=True)}
    assert counts <= real


def test_roc_with_infinite_scores_and_single_images():
    x, y = data.roc_points(np.array([np.inf]), np.array([-np.inf]))
    assert (x.tolist(), y.tolist()) == ([0, 0, 1], [0, 1, 1])
    x, y = data.roc_points(np.array([2.0]), np.array([2.0]))
    assert x.tolist() == y.tolist() == [0, 1]


def test_failures_are_counted_by_reason(tmp_path):
    table = make_table()
    table.loc[[1, 2, 61], ["status", "mcm", "knn"]] = ["truncated file", np.nan, np.nan]
    table.loc[5, "knn"] = np.nan
    assert data.failures(table, ["mcm", "knn", "absent"]) == [
        ("id", "truncated file", 2, "id/1.png"),
        ("near", "truncated file", 1, "near/61.png"),
        ("id", "no score from knn", 1, "id/5.png"),
    ]
    page, _ = make_page(tmp_path, table)
    rows = [e["text"] for e in page.all("tr")]
    assert {"ID2truncated fileid/1.png", "ID1no score from knnid/5.png"} <= set(rows)
    whole, _ = make_page(tmp_path, make_table())
    assert "Every image has a score" in whole.text


def degenerate_tables():
    constant = make_table().assign(mcm=0.5, knn=0.0)
    single = make_table(n_id=1, n_ood=1)
    infinite = make_table()
    infinite.loc[[0, 5, 70], "mcm"] = [np.inf, -np.inf, np.inf]
    tiny = make_table()
    tiny["mcm"] = 1e-3 + 1e-7 * tiny["mcm"]
    lost = make_table()
    lost.loc[lost["source"] == "far", ["mcm", "knn"]] = np.nan
    lost.loc[lost["source"] == "far", "status"] = "unreadable"
    return {"constant": constant, "single": single, "infinite": infinite, "tiny": tiny, "lost": lost}


@pytest.mark.parametrize("case", ["constant", "single", "infinite", "tiny", "lost"])
def test_degenerate_scores(tmp_path, case):
    table = degenerate_tables()[case]
    scored = table[table["status"] == "ok"] if case == "lost" else table
    results = make_results(scored)
    results["detectors"]["mcm"]["threshold"] = 0.5
    page, text = make_page(tmp_path, table, results)
    drawn = [e["attrs"].get(key) or "" for e in page.elements for key in ("d", "points", "x", "y", "transform")]
    assert not re.search("nan|inf", " ".join(drawn))
    assert "nan" not in re.sub("<style>.*</style>", "", text, flags=re.DOTALL)
    assert len(page.all("p", "none")) == (2 if case == "lost" else 0)
    assert len(page.all("polyline")) == (2 if case == "lost" else 4)


def test_results_and_scores_may_have_gaps(tmp_path):
    table = make_table()
    results = make_results(table)
    del results["detectors"]["mcm"]["per_set"]["far"]
    results["detectors"]["ghost"] = {"average": None}
    results["data"] = {}
    page, _ = make_page(tmp_path, table, results)
    cells = figure_cells(page)
    assert cells["AUROC", "mcm", "far"] == ("–", False)
    assert cells["AUROC", "ghost", "Average"] == ("–", False)
    only, _ = make_page(tmp_path, table, {"schema": 1, "detectors": {"ghost": {}}})
    assert "No detector has an average AUROC." in only.text


def test_threshold_line_stands_at_the_threshold(tmp_path):
    table = make_table(detectors=("mcm",), sets=("near",))
    results = make_results(table)
    plain, _ = make_page(tmp_path, table, results)
    results["detectors"]["mcm"]["threshold"] = 1.0
    page, _ = make_page(tmp_path, table, results)
    lines = [e["attrs"]["d"] for e in page.all("path", "threshold")]
    assert len(lines) == 1 + len(plain.all("path", "threshold")) == 2
    low, high = data.score_range(data.scores_by_source(table, "mcm").values())
    left, right = 36, 200 - 10
    assert float(lines[1][1:].split()[0]) == pytest.approx(left + (1 - low) / (high - low) * (right - left), abs=0.06)


@pytest.mark.parametrize("convention", ["standard", "released", "openood", "another"])
def test_convention_is_stated(tmp_path, convention):
    table = make_table()
    page, _ = make_page(tmp_path, table, make_results(table, convention=convention))
    assert f"convention “{convention}”" in page.text


def test_many_detectors_and_rows_stay_small(tmp_path):
    detectors = [f"detector {i}" for i in range(12)]
    table = make_table(detectors, [f"set {i}" for i in range(10)], n_id=10_000, n_ood=5_000)
    figures = {"auroc": 0.9, "fpr95": 0.3, "n": 5000}
    per_set = {f"set {i}": figures for i in range(10)}
    results = {"detectors": {name: {"average": figures, "per_set": per_set} for name in detectors}}
    page, text = make_page(tmp_path, table, results)
    assert len(text) < 1_500_000
    assert len(page.all("polyline")) == 120
    assert max(e["attrs"]["points"].count(",") for e in page.all("polyline")) <= 200
    styles = {(e["attrs"]["class"], e["attrs"].get("stroke-dasharray")) for e in page.all("polyline")}
    assert len(styles) == 10


def separated(**strengths):
    """A table of detectors that see the same noise and separate ID from OOD by so much."""
    table = make_table(detectors=())
    noise = np.random.default_rng(3).normal(size=(2, len(table)))
    for name, strength in strengths.items():
        table[name] = (noise[0] + 0.2 * len(name) * noise[1] + strength * (table["source"] == "id")).astype(np.float32)
    return table


def test_differences_to_the_best_are_told(tmp_path):
    table = separated(best=2.5, even=2.49, bad=0.5)
    results = make_results(table)
    plain, _ = make_page(tmp_path, table, results)
    assert "Not distinguishable" not in plain.text
    results["comparison"] = compare(table, ["best", "even", "bad"])
    page, _ = make_page(tmp_path, table, results)
    assert "Not distinguishable from it on these images: even." in page.all("p", "lead")[0]["text"]
    cells = figure_cells(page)
    rows = results["comparison"]["detectors"]
    assert {name for metric, name, _ in cells if metric == "AUROC minus that of best"} == {"even", "bad"}
    for name in rows:
        for column in ("Average", "near", "far"):
            own = rows[name]["average"] if column == "Average" else rows[name]["per_set"][column]
            text = cells["AUROC minus that of best", name, column][0]
            shown = re.findall(r"[+-]?\d+\.\d", text.split("p =")[0].replace("−", "-"))
            expected = [100 * own[key] for key in ("difference", "low", "high")]
            assert list(map(float, shown)) == pytest.approx(expected, abs=0.0501)
            assert ("≈" in text) == (own["p_value"] > 0.05)
            assert ("p = " in text) == (column == "Average")
    del rows["even"]
    alone, _ = make_page(tmp_path, table, results)
    assert "Every other detector is below it" in alone.all("p", "lead")[0]["text"]


def bar_lists(page):
    """[{name: figure text}] of all lists of bars."""
    lists = []
    for element in page.elements:
        if element["tag"] == "ul" and "bars" in (element["attrs"].get("class") or ""):
            lists.append({})
        elif element["tag"] == "li" and lists:
            name = page.elements[page.elements.index(element) + 1]["attrs"].get("title")
            if name:
                lists[-1][name] = element["text"].removeprefix(name)
    return lists


def test_bars_show_every_figure_of_the_table(tmp_path):
    table = make_table(detectors=("mcm", "knn"), sets=("near", "far"))
    results = make_results(table, bootstrap=20)
    results["detectors"]["mcm"]["per_set"]["far"] |= {"auroc": 0.34, "auroc_low": 0.31}
    page, _ = make_page(tmp_path, table, results)
    rows = [figure_cells(page)]
    for place, column in enumerate(("Average", "near", "far")):
        for name in ("mcm", "knn"):
            assert bar_lists(page)[place][name] == f"{100 * on(results, name, column)['auroc']:.1f}"
            assert rows[0]["AUROC", name, column][0].startswith(bar_lists(page)[place][name])
    # The scale goes from 30 % to 100 %: 50 % lies at 2/7, 34 % and 31 % left of it.
    assert "--guess:28.6%" in page.all("ul", "bars")[0]["attrs"]["style"]
    fills = [e["attrs"]["style"] for e in page.all("i", "fill")]
    assert "left:5.7%;width:22.9%" in fills
    ranges = [e["attrs"]["style"] for e in page.all("i", "range")]
    high = results["detectors"]["mcm"]["per_set"]["far"]["auroc_high"]
    assert f"left:1.4%;width:{100 * (high - 0.31) / 0.7:.1f}%" in ranges


def on(results, name, column):
    entry = results["detectors"][name]
    return entry["average"] if column == "Average" else entry["per_set"][column]


def test_fusions_stand_beside_their_members(tmp_path):
    table = separated(weak=0.4, strong=1.5, fused=2.2, other=1.0)
    results = make_results(table)
    without, _ = make_page(tmp_path, table, results)
    assert "Fusions" not in without.text
    results["detectors"]["fused"]["params"] = {"members": ["weak", "absent", "strong"]}
    results["detectors"]["fused"]["against_members"] = compare(table, ["fused", "weak", "strong"])
    page, _ = make_page(tmp_path, table, results)
    assert [list(names) for names in bar_lists(page)[3:]] == [["fused", "strong", "weak"]] * 3
    gain = on(results, "fused", "Average")["auroc"] - on(results, "strong", "Average")["auroc"]
    own = results["detectors"]["fused"]["against_members"]["detectors"]["strong"]["average"]
    assert own["difference"] == pytest.approx(-gain)
    assert f"is {100 * gain:.1f} points above that of its best member here, strong" in page.text
    assert f"difference +{-100 * own['high']:.1f} to +{-100 * own['low']:.1f}" in page.text
    assert "strong (95 % interval" in page.text
    del results["detectors"]["fused"]["against_members"]
    bare, _ = make_page(tmp_path, table, results)
    assert f"{100 * gain:.1f} points above that of its best member here, strong." in bare.text


def test_calibration_curve_stands_where_the_figures_say(tmp_path):
    table = make_table()
    results = make_results(table)
    assert "Calibration" not in make_page(tmp_path, table, results)[0].text
    curve = {"nominal": [0.25, 0.5, 1.0], "accepted": [0.2, 0.6, 0.9]}
    results["detectors"]["knn"] |= {"acceptance": curve, "tpr": 0.95, "id_accepted": 0.9, "calibration": {"n": 40}}
    page, _ = make_page(tmp_path, table, results)
    (line,) = page.all("polyline", "curve")
    places = [tuple(map(float, pair.split(","))) for pair in line["attrs"]["points"].split()]
    axes = charts.Axes(200, 190, (0.0, 1.0), (0.0, 1.0))
    expected = [(axes.at_x(x), axes.at_y(y)) for x, y in zip(curve["nominal"], curve["accepted"], strict=True)]
    assert places == [pytest.approx(place, abs=0.06) for place in expected]
    assert "90.0\u00a0% accepted at 95.0\u00a0%" in page.text
    band = page.elements[page.elements.index(line) - 2]
    assert band["attrs"]["class"] == "id"
    assert band["attrs"]["d"].count(",") == 6
    results["detectors"]["knn"]["calibration"] = None
    assert len(make_page(tmp_path, table, results)[0].all("polyline", "curve")) == 1


@pytest.mark.parametrize(("known", "test"), [(60, 45), (200, 2000)])
def test_acceptance_band_holds_what_it_says(known, test):
    rng = np.random.default_rng(0)
    nominal = np.array([0.1, 0.5, 0.8, 0.95])
    low, high = data.acceptance_band(nominal, known, test)
    # Scores uniform in (0, 1): a share 1 - t of all images is above t, and their number among the test is binomial.
    calibration = np.sort(rng.random((4000, known)), axis=1)
    thresholds = calibration[:, known - np.ceil(nominal * known - 1e-9).astype(int)]
    accepted = rng.binomial(test, 1 - thresholds) / test
    inside = ((low <= accepted) & (accepted <= high)).mean(axis=0)
    assert np.all((inside > 0.935) & (inside < (0.99 if test < 100 else 0.965)))


def red_box(*_):
    return Image.new("RGB", (1700, 400), "red")


def test_explanations_of_the_first_mistakes(tmp_path):
    table = make_table(detectors=("mcm", "knn", "broken", "none"))
    asked = []

    def explain(detector, image):
        asked.append((detector, image.getpixel((0, 0))))
        if detector == "broken":
            raise OSError("no memory")
        return None if detector == "none" else red_box()

    def open_image(source, image_id):
        return Image.new("RGB", (40, 40), (sum(map(ord, image_id)) % 256, 0, 0))

    results = make_results(table)
    page, _ = make_page(tmp_path, table, results, open_image, mistakes=5, explained=2, explain_image=explain)
    name = data.rank_detectors(results["detectors"])[0]
    highest, lowest = data.confident_mistakes(table, name, 2)
    ids = [highest["id"].iloc[0], lowest["id"].iloc[0], highest["id"].iloc[1], lowest["id"].iloc[1]]
    order = data.rank_detectors(results["detectors"])
    assert asked == [(d, open_image("", image_id).getpixel((0, 0))) for image_id in ids for d in order]
    shown = [d for d in order if d in ("mcm", "knn")]
    images = [e["attrs"] for e in page.all("img")]
    assert len(images) == 10 + 8
    assert [e["alt"] for e in images[10:]] == [f"How {d} came to its score of {i}" for i in ids for d in shown]
    assert {(e["width"], e["height"]) for e in images[10:]} == {("1280", "301")}
    captions = [e["text"] for e in page.all("figcaption") if ": score " in e["text"]]
    scores = table.set_index("id")
    assert captions == [f"{d}: score {scores.loc[i, d]:.5g}" for i in ids for d in shown]
    assert len(page.all("h4")) == 4
    bare, _ = make_page(tmp_path, table, results, open_image, explained=0, explain_image=explain)
    assert not bare.all("h4")
    unopened, _ = make_page(tmp_path, table, results, None, explain_image=explain)
    assert not unopened.all("img")


def test_explanations_do_not_make_the_page_heavy(tmp_path):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (500, 1280, 3), dtype=np.uint8))
    table = make_table(detectors=("mcm", "knn", "vim"))
    page, text = make_page(tmp_path, table, None, lambda *_: red_box(), explain_image=lambda *_: noise)
    assert len(text) < 2_000_000
    assert 1 <= len([e for e in page.all("img") if e["attrs"]["alt"].startswith("How")]) < 12
    assert "Further pictures are left out" in page.text


def test_headings_go_down_one_level_at_a_time(tmp_path):
    table = make_table()
    results = make_results(table, bootstrap=20)
    results["detectors"]["mcm"]["params"] = {"members": ["knn"]}
    page, _ = make_page(tmp_path, table, results, red_box, explain_image=red_box)
    levels = [int(e["tag"][1]) for e in page.elements if re.fullmatch("h[1-6]", e["tag"])]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert max(np.diff(levels)) == 1
    assert set(levels) == {1, 2, 3, 4}
    assert page.all("html")[0]["attrs"]["lang"] == "en"
    assert all(e["attrs"]["alt"] for e in page.all("img"))
    assert all(e["attrs"].get("aria-label") or e["attrs"].get("aria-hidden") for e in page.all("svg"))


def test_wrong_arguments(tmp_path):
    table = make_table()
    results = make_results(table)
    with pytest.raises(UsageError, match="mistakes=-1"):
        report.write_report(tmp_path / "r.html", results, table, mistakes=-1)
    with pytest.raises(UsageError, match="explained=-1"):
        report.write_report(tmp_path / "r.html", results, table, explained=-1)
    with pytest.raises(DataError, match="no detector"):
        report.write_report(tmp_path / "r.html", {"detectors": {}}, table)
    with pytest.raises(DataError, match="status"):
        report.write_report(tmp_path / "r.html", results, table.drop(columns="status"))
    assert list(tmp_path.iterdir()) == []
    page, _ = make_page(tmp_path, table, results, mistakes=0)
    assert "mistakes" not in page.text


def test_report_does_not_import_torch():
    code = "import sys, ood_core.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# In a browser.


def chromium(tmp_path, page, *switches):
    """What chromium prints when it opens a page: (stdout, stderr)."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("chromium is not installed: the page is not rendered")
    common = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    common += "disable-component-update disable-sync hide-scrollbars enable-logging=stderr"
    command = [program, *(f"--{switch}" for switch in common.split()), *switches]
    command += [f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return done.stdout, done.stderr


def full_report(tmp_path):
    """A page with every section, long names, wide tables and pictures."""
    sets = [f"a rather long name of set {i}" for i in range(7)]
    table = make_table(
        detectors=("mcm", "knn", "a detector of a very long name, longer than a phone is wide"), sets=sets
    )
    results = make_results(table, bootstrap=20, notes=["word" * 60])
    names = data.rank_detectors(results["detectors"])
    results["comparison"] = compare(table, names)
    results["detectors"][names[1]] |= {"params": {"members": [names[0], names[2]]}, "calibration": {"n": 50}}
    results["detectors"][names[1]]["acceptance"] = {"nominal": [0.2, 0.6, 1.0], "accepted": [0.1, 0.6, 1.0]}
    results["environment"] = {"versions": {"a package": "1.0" * 50}}

    def picture(*_):
        return Image.new("RGB", (64, 64), "teal")

    return report.write_report(tmp_path / "report.html", results, table, picture, explain_image=red_box)


# A window is never as narrow as a phone, a frame is.
FRAME = """<!DOCTYPE html>
<style>:root { color-scheme: light dark } iframe { border: 0; width: WIDTHpx; height: 900px }</style>
<iframe srcdoc="PAGE"></iframe>
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const [inner, page] = [frame.contentWindow, frame.contentDocument];
  const box = element => element.getBoundingClientRect();
  const beyond = element => box(element).right > inner.innerWidth + 1 && !element.closest(".wide");
  const wide = [...page.querySelectorAll("body *")].filter(beyond);
  const loaded = [...page.images].filter(i => i.complete && i.naturalWidth > 0 && box(i).width > 20);
  document.documentElement.setAttribute("data-found", JSON.stringify({
    width: inner.innerWidth, scroll: page.documentElement.scrollWidth, wide: wide.map(e => e.tagName + e.className),
    images: page.images.length, loaded: loaded.length, paper: inner.getComputedStyle(page.body).backgroundColor}));
};
</script>"""


def measured(tmp_path, width, scheme):
    """What a script finds on the page from outside."""
    page = html.escape(full_report(tmp_path).read_text(encoding="utf-8"))
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.replace("WIDTH", str(width)).replace("PAGE", page), encoding="utf-8")
    dom, _ = chromium(tmp_path, frame, "--dump-dom", f"--blink-settings=preferredColorScheme={scheme}")
    return json.loads(html.unescape(re.search('data-found="([^"]*)"', dom)[1]))


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme", "paper"), [(390, 0, "rgb(21, 24, 28)"), (1200, 1, "rgb(255, 255, 255)")])
def test_page_fits_every_width_and_shows_every_picture(tmp_path, width, scheme, paper):
    found = measured(tmp_path, width, scheme)
    assert (found["width"], found["scroll"], found["wide"]) == (width, width, [])
    assert (found["images"], found["loaded"], found["paper"]) == (16 + 12, 16 + 12, paper)


@pytest.mark.slow
def test_browser_has_nothing_to_complain_about(tmp_path):
    page = full_report(tmp_path)
    shot = f"--screenshot={tmp_path / 'shot.png'}"
    assert "CONSOLE" not in chromium(tmp_path, page, shot)[1]
    # That a complaint would be seen: the page's own policy refuses a script.
    page.write_text(page.read_text(encoding="utf-8") + "<script>1</script>", encoding="utf-8")
    assert "CONSOLE" in chromium(tmp_path, page, shot)[1]


@pytest.mark.slow
def test_chromium_renders_the_page(tmp_path):
    shot = tmp_path / "shot.png"
    chromium(tmp_path, full_report(tmp_path), "--window-size=1200,6000", f"--screenshot={shot}")
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape == (6000, 1200, 3)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    teal = abs(pixels.astype(int) - [0, 128, 128]).max(axis=-1) < 8
    assert teal.sum() > 16 * 100**2
