import html
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
from ood_core.metrics import auroc, evaluate_scores
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
        results["detectors"][name]["id_accuracy"] = 0.5 + place / 10
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
    assert report.best([0.90001, 0.9, 0.8, math.nan], higher=True) == [True, True, False, False]
    assert report.best([0.2, 0.1], higher=False) == [False, True]
    assert report.best([0.9, math.nan], higher=True) == [False, False]


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
    highest, lowest = report.confident_mistakes(table, "knn", 7)
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
    name = report.rank_detectors(results["detectors"])[0]
    expected = pd.concat(report.confident_mistakes(table, name, 5))
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
    low, high = report.score_range([scores])
    assert -math.inf < low < high < math.inf
    counts = report.histogram(scores, low, high)
    assert counts.sum() == len(scores)
    inner = np.linspace(low, high, 41)[1:-1]
    assert counts[0] == (scores < inner[0]).sum()
    ticks = [value for value, _ in report.ticks(low, high, 5)]
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
        found = report.ticks(low, high, 5)
        steps = np.diff([value for value, _ in found])
        assert len(found) >= 2
        assert np.allclose(steps, steps[0])
        assert all(float(text) == pytest.approx(value, rel=1e-9, abs=1e-20) for value, text in found)
    assert [text for _, text in report.ticks(-0.3, 0.4, 5)] == ["-0.2", "0.0", "0.2", "0.4"]


def test_histogram_range_survives_outliers_and_small_sets():
    rng = np.random.default_rng(0)
    low, high = report.score_range([np.append(rng.random(10_000), [1e9, -np.inf]), np.full(3, -5.0)])
    assert low == -5
    assert 0.9 < high < 1.1


@pytest.mark.parametrize(("shift", "round_to"), [(1.0, 9), (0.0, 9), (1.0, 0), (99.0, 9), (-99.0, 2)])
def test_roc_polyline(shift, round_to):
    rng = np.random.default_rng(5)
    known, unknown = rng.normal(shift, 1, 3001).round(round_to), rng.normal(0, 1, 1777).round(round_to)
    x, y = report.roc_points(known, unknown)
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert len(x) <= 200
    assert min(np.diff(x).min(), np.diff(y).min()) >= 0
    assert np.trapezoid(y, x) == pytest.approx(auroc(known, unknown), abs=2e-3)
    thresholds = np.concatenate([known, unknown])
    real = {(int((unknown >= t).sum()), int((known >= t).sum())) for t in thresholds} | {(0, 0)}
    counts = {(round(a * len(unknown)), round(b * len(known))) for a, b in zip(x, y, strict=True)}
    assert counts <= real


def test_roc_with_infinite_scores_and_single_images():
    x, y = report.roc_points(np.array([np.inf]), np.array([-np.inf]))
    assert (x.tolist(), y.tolist()) == ([0, 0, 1], [0, 1, 1])
    x, y = report.roc_points(np.array([2.0]), np.array([2.0]))
    assert x.tolist() == y.tolist() == [0, 1]


def test_failures_are_counted_by_reason(tmp_path):
    table = make_table()
    table.loc[[1, 2, 61], ["status", "mcm", "knn"]] = ["truncated file", np.nan, np.nan]
    table.loc[5, "knn"] = np.nan
    assert report.failures(table, ["mcm", "knn", "absent"]) == [
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
    low, high = report.score_range(report.scores_by_source(table, "mcm").values())
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


def test_wrong_arguments(tmp_path):
    table = make_table()
    results = make_results(table)
    with pytest.raises(UsageError, match="mistakes=-1"):
        report.write_report(tmp_path / "r.html", results, table, mistakes=-1)
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


@pytest.mark.slow
def test_chromium_renders_the_page(tmp_path):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed: the page is not rendered")
    table = make_table()
    path = report.write_report(
        tmp_path / "report.html", make_results(table), table, lambda *_: Image.new("RGB", (64, 64), "teal")
    )
    shot = tmp_path / "shot.png"
    switches = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    switches += "disable-component-update disable-sync hide-scrollbars window-size=1200,3000"
    command = [chromium, *(f"--{switch}" for switch in switches.split())]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", path.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape == (3000, 1200, 3)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    teal = abs(pixels.astype(int) - [0, 128, 128]).max(axis=-1) < 8
    assert teal.sum() > 16 * 100**2
