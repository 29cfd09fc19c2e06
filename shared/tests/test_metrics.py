import doctest
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from ood_core import metrics
from ood_core.metrics import (
    CONVENTIONS,
    aupr_in,
    aupr_out,
    auroc,
    evaluate_scores,
    fpr_at_tpr,
    paired_bootstrap,
    paired_difference,
)
from sklearn.metrics import average_precision_score, roc_auc_score

GOLDEN = Path(__file__).parent / "golden"
VOC_SETS = ["iNaturalist", "Sun", "Places", "Texture", "ImageNet22K", "COCO"]
VOC_RUNS = ["Vanilla_MCM/mcm_score", "Vanilla_GL_MCM/gl_mcm_score", "SeTAR/mcm_score", "SeTAR/gl_mcm_score"]
TPRS = [Fraction(19, 20), Fraction(1, 2), Fraction(4, 5), Fraction(1, 3), Fraction(1), Fraction(1, 50)]


def random_scores(seed, *, most=12):
    """Small ID and OOD arrays of random sizes; most seeds give ties within and across them."""
    rng = np.random.default_rng(seed)
    n_id, n_ood = rng.integers(1, most, 2)
    levels = rng.integers(1, 3 * most)
    return rng.integers(2, 2 + levels, n_id) / 7, rng.integers(0, levels, n_ood) / 7


def normal_scores(n_id, n_ood, *, seed=0, shift=1.0):
    rng = np.random.default_rng(seed)
    return rng.normal(shift, 1, n_id), rng.normal(0, 1, n_ood)


def share(condition):
    return np.mean(condition)


def brute_auroc(known, unknown):
    """Every pair compared."""
    difference = np.asarray(known)[:, None] - np.asarray(unknown)[None]
    return share(difference > 0) + share(difference == 0) / 2


def brute_standard(known, unknown, tpr):
    """Thresholds tried from the highest down, in exact arithmetic."""
    for threshold in sorted(known, reverse=True):
        if Fraction(int((known >= threshold).sum()), len(known)) >= tpr:
            return share(unknown >= threshold)
    raise AssertionError("unreachable: the smallest ID score accepts all of ID")


def brute_released(known, unknown, tpr):
    """The released curve point by point: distinct scores of both kinds, from some ID accepted to all."""
    candidates = [t for t in set(known) | set(unknown) if min(known) <= t <= max(known)]

    def preference(threshold):
        recall = Fraction(int((known >= threshold).sum()), len(known))
        return abs(recall - tpr), -recall, threshold

    return share(unknown >= min(candidates, key=preference))


def closed_released(known, unknown, tpr):
    """The closed form: nearest ID value a, then everything above the next lower distinct ID value."""
    a = min(known, key=lambda t: (abs(Fraction(int((known >= t).sum()), len(known)) - tpr), t))
    lower = known[known < a]
    return share(unknown > lower.max()) if len(lower) else share(unknown >= a)


def brute_openood(known, unknown, tpr):
    """OOD positive: thresholds tried from the lowest up."""
    for threshold in sorted(unknown):
        if Fraction(int((unknown <= threshold).sum()), len(unknown)) >= tpr:
            return share(known <= threshold)
    raise AssertionError("unreachable: the largest OOD score accepts all of OOD")


BRUTE = {"standard": brute_standard, "released": brute_released, "openood": brute_openood}


def labelled(known, unknown):
    return np.repeat([1, 0], [len(known), len(unknown)]), np.concatenate([known, unknown])


@pytest.mark.parametrize("seed", range(60))
def test_areas_agree_with_scikit_learn(seed):
    known, unknown = random_scores(seed, most=12 if seed % 2 else 300)
    label, score = labelled(known, unknown)
    assert auroc(known, unknown) == pytest.approx(roc_auc_score(label, score), abs=1e-12)
    assert auroc(known, unknown) == pytest.approx(brute_auroc(known, unknown), abs=1e-12)
    assert aupr_in(known, unknown) == pytest.approx(average_precision_score(label, score), abs=1e-12)
    assert aupr_out(known, unknown) == pytest.approx(average_precision_score(1 - label, -score), abs=1e-12)


def test_areas_of_continuous_scores_agree_with_scikit_learn():
    known, unknown = normal_scores(3001, 1999)
    label, score = labelled(known, unknown)
    assert auroc(known, unknown) == pytest.approx(roc_auc_score(label, score), abs=1e-12)
    assert aupr_in(known, unknown) == pytest.approx(average_precision_score(label, score), abs=1e-12)
    assert aupr_out(known, unknown) == pytest.approx(average_precision_score(1 - label, -score), abs=1e-12)


@pytest.mark.parametrize(
    ("known", "unknown", "expected"),
    [
        ([1.0], [0.0], (1.0, 1.0, 1.0, 0.0)),
        ([0.0], [1.0], (0.0, 0.5, 0.5, 1.0)),
        ([2.0], [2.0], (0.5, 0.5, 0.5, 1.0)),
        ([2.0, 2.0, 2.0], [2.0], (0.5, 0.75, 0.25, 1.0)),
    ],
)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_one_element_and_constant_scores_by_hand(known, unknown, expected, convention):
    fpr = fpr_at_tpr(known, unknown, convention=convention)
    assert (auroc(known, unknown), aupr_in(known, unknown), aupr_out(known, unknown), fpr) == expected


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("tpr", TPRS, ids=str)
def test_fpr_agrees_with_the_definition_of_its_convention(convention, tpr):
    for seed in range(150):
        known, unknown = random_scores(seed, most=8 if seed % 2 else 45)
        got = fpr_at_tpr(known, unknown, tpr=float(tpr), convention=convention)
        assert got == BRUTE[convention](known, unknown, tpr), f"seed {seed}"


@pytest.mark.parametrize("tpr", TPRS, ids=str)
def test_released_fpr_agrees_with_its_closed_form(tpr):
    for seed in range(150):
        known, unknown = random_scores(seed, most=8 if seed % 2 else 45)
        got = fpr_at_tpr(known, unknown, tpr=float(tpr), convention="released")
        assert got == closed_released(known, unknown, tpr), f"seed {seed}"


@pytest.mark.parametrize(
    ("n", "tpr", "accepted"),
    [
        (20, 0.95, 19),
        (100, 0.95, 95),
        (10, 0.7, 7),
        (100, 0.07, 7),
        (10, 0.1 * 3, 3),
        (3, 1 / 3, 1),
        (21, 0.95, 20),
    ],
)
def test_number_of_accepted_images_is_exact(n, tpr, accepted):
    # One OOD score just above the threshold, one just below: an ID image more or less changes the FPR.
    known = np.arange(n, 0, -1.0)
    unknown = [known[accepted - 1] + 0.5, known[accepted - 1] - 0.5]
    assert fpr_at_tpr(known, unknown, tpr=tpr) == 0.5


def test_conventions_differ_on_a_case_by_hand():
    known = np.arange(100.0)  # threshold 5 accepts 95; the next lower ID score is 4
    unknown = [4.0, 4.5, 5.0, 98.5]
    assert fpr_at_tpr(known, unknown) == 0.5
    assert fpr_at_tpr(known, unknown, convention="released") == 0.75
    assert fpr_at_tpr(known, unknown, convention="openood") == 0.99


def test_released_takes_the_larger_share_when_two_are_equally_near():
    known = np.arange(10.0)  # shares .9 (threshold 1) and 1 (threshold 0) are both .05 from .95
    assert fpr_at_tpr(known, [0.5, -1.0], convention="released") == 0.5
    assert fpr_at_tpr(known, [0.0, -1.0], convention="released") == 0.5


def test_released_may_accept_less_than_the_rate():
    known = np.arange(21.0)  # 19.95 of 21 asked for: 20 is nearest
    assert fpr_at_tpr(known, [0.5, 0.0], convention="released") == 0.5
    known = np.arange(7.0)  # 3.5 of 7 at a rate of .45 -> 3.15 asked for: 3 is nearest, standard takes 4
    assert fpr_at_tpr(known, [3.5, 2.5], tpr=0.45, convention="released") == 0.5
    assert fpr_at_tpr(known, [3.0, 2.5], tpr=0.45, convention="released") == 0.0
    assert fpr_at_tpr(known, [3.0, 2.5], tpr=0.45) == 0.5


@pytest.mark.parametrize("case", ["sep", "ties", "small", "f32"])
def test_golden_metric_cases(case):
    with np.load(GOLDEN / "metrics.npz") as golden:
        known, unknown = golden[f"{case}/id"], golden[f"{case}/ood"]
        expected = golden[f"{case}/auroc_aupr_fpr95"]
    got = [auroc(known, unknown), aupr_in(known, unknown)]
    for convention in ("released", "standard"):
        fpr = fpr_at_tpr(known, unknown, convention=convention)
        np.testing.assert_allclose([*got, fpr], expected, rtol=0, atol=1e-9)


@pytest.fixture(scope="module")
def voc_published():
    return json.loads((GOLDEN / "voc_published.json").read_text())


@pytest.fixture(scope="module")
def voc_scores():
    """Higher = more ID; stored, for size, as steps between the bit patterns of the sorted float32 scores."""
    with np.load(GOLDEN / "voc_steps.npz") as steps:
        return {key: np.cumsum(steps[key], dtype=np.uint32).view(np.float32) for key in steps.files}


def evaluate_voc(voc_scores, run, convention):
    sets = {name: voc_scores[f"{run}/{name}"] for name in VOC_SETS}
    return evaluate_scores(voc_scores[f"{run}/id"], sets, convention=convention)


@pytest.mark.parametrize("run", VOC_RUNS)
def test_released_convention_gives_every_published_voc_number(voc_scores, voc_published, run):
    result = evaluate_voc(voc_scores, run, "released")
    for name, row in {**result.per_set, "Avg": result.mean}.items():
        published = voc_published[run][name]
        got = [100 * row.fpr95, 100 * row.auroc, 100 * row.aupr_in]
        expected = [published["FPR95"], published["AUROC"], published["AUPR"]]
        np.testing.assert_allclose(got, expected, rtol=0, atol=0.005 + 1e-9, err_msg=name)


@pytest.mark.parametrize("run", VOC_RUNS)
def test_standard_convention_gives_the_ordinary_fpr_of_voc(voc_scores, voc_published, run):
    result = evaluate_voc(voc_scores, run, "standard")
    assert list(result.per_set) == VOC_SETS
    for name, row in result.per_set.items():
        expected = voc_published[run][name]["fpr95_first_ge_95"]
        assert 100 * row.fpr95 == pytest.approx(expected, rel=0, abs=1e-9), name


def every_metric(known, unknown):
    rates = [fpr_at_tpr(known, unknown, tpr=t, convention=c) for c in CONVENTIONS for t in (0.95, 0.5)]
    return [auroc(known, unknown), aupr_in(known, unknown), aupr_out(known, unknown), *rates]


@pytest.mark.parametrize("transform", [np.exp, np.arctan, lambda x: 1e200 * x, lambda x: 3 * x - 100])
@pytest.mark.parametrize("seed", range(4))
def test_strictly_increasing_transforms_change_nothing(transform, seed):
    known, unknown = random_scores(seed, most=60)
    assert every_metric(transform(known), transform(unknown)) == every_metric(known, unknown)


@pytest.mark.parametrize("seed", range(8))
def test_order_of_images_changes_nothing(seed):
    known, unknown = random_scores(seed, most=60)
    rng = np.random.default_rng(seed)
    assert every_metric(rng.permutation(known), rng.permutation(unknown)) == every_metric(known, unknown)


@pytest.mark.parametrize("seed", range(8))
def test_swapping_the_roles(seed):
    known, unknown = random_scores(seed, most=60)
    assert auroc(unknown, known) == pytest.approx(1 - auroc(known, unknown), abs=1e-15)
    assert auroc(-unknown, -known) == auroc(known, unknown)
    assert aupr_in(-unknown, -known) == aupr_out(known, unknown)
    assert fpr_at_tpr(-unknown, -known) == fpr_at_tpr(known, unknown, convention="openood")


@pytest.mark.parametrize("seed", range(8))
def test_infinite_scores_are_only_the_largest_and_smallest(seed):
    known, unknown = random_scores(seed, most=30)
    high, low = max(*known, *unknown), min(*known, *unknown)

    def stretch(x):
        return np.where(x == high, np.inf, np.where(x == low, -np.inf, x))

    if high > low:
        assert every_metric(stretch(known), stretch(unknown)) == every_metric(known, unknown)
    bootstrapped = evaluate_scores(stretch(known), {"x": stretch(unknown)}, bootstrap=20).mean
    assert all(math.isfinite(value) for value in bootstrapped.to_dict().values())


NUMBERS = np.array([[5, 9], [3, 9], [4, 9], [3, 9], [1, 9]])[:, 0]
READERS = {
    "list": list,
    "tuple": tuple,
    "strided": lambda x: x,
    "reversed": lambda x: x[::-1],
    **{dtype: lambda x, dtype=dtype: x.astype(dtype) for dtype in ("uint8", "int64", "float16", "float32", ">f8")},
    "tensor int": torch.tensor,
    **{
        str(dtype): lambda x, dtype=dtype: torch.tensor(x).to(dtype)
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8)
    },
    "tensor with gradient": lambda x: torch.tensor(x, dtype=torch.float32, requires_grad=True) * 1.0,
    "tensor not contiguous": lambda x: torch.tensor(np.stack([x, x], axis=1))[:, 1],
}


@pytest.mark.parametrize("kind", READERS)
def test_every_kind_of_input_gives_the_same(kind):
    expected = every_metric([5.0, 3.0, 4.0, 3.0, 1.0], [3.5, 3.0, 0.0])
    assert every_metric(READERS[kind](NUMBERS), [3.5, 3.0, 0.0]) == expected
    assert auroc([3.5, 3.0, 0.0], READERS[kind](NUMBERS)) == pytest.approx(1 - expected[0], abs=1e-15)


def test_inputs_are_left_as_they_are():
    known, unknown = normal_scores(20, 10)
    before = known.copy(), unknown.copy()
    evaluate_scores(known, {"x": unknown}, bootstrap=5)
    np.testing.assert_array_equal(known, before[0])
    np.testing.assert_array_equal(unknown, before[1])


def test_differences_below_single_precision_count():
    assert auroc([1 + 1e-12], [1.0]) == 1.0
    assert auroc(torch.tensor([1 + 1e-12], dtype=torch.float64), [1.0]) == 1.0


BAD_SCORES = [
    ([], ValueError, "is empty"),
    ([0.5, math.nan], ValueError, r"holds NaN \(1 of 2 values\)"),
    (torch.tensor([math.nan] * 3), ValueError, r"holds NaN \(3 of 3 values\)"),
    (np.zeros((2, 3)), ValueError, r"shape \[N\], one score per image, got \[2, 3\]"),
    (torch.zeros(2, 1), ValueError, r"got \[2, 1\]"),
    (0.5, ValueError, r"got \[\]"),
    (["a", "b"], TypeError, "must hold numbers, got <U1"),
    ([None, 1.0], TypeError, "must hold numbers, got object"),
    ([True, False], TypeError, "must hold numbers, got bool"),
    (torch.tensor([True]), TypeError, "must hold numbers, got bool"),
    (np.array([1j]), TypeError, "must hold numbers, got complex128"),
    ({"a": 1.0}, TypeError, "must hold numbers"),
    ([[1.0], [1.0, 2.0]], TypeError, "cannot be read as a list of numbers"),
]


@pytest.mark.parametrize(("scores", "error", "sentence"), BAD_SCORES)
def test_bad_scores_are_refused_with_a_sentence(scores, error, sentence):
    for metric in (auroc, aupr_in, aupr_out, fpr_at_tpr):
        with pytest.raises(error, match="^id_scores .*" + sentence):
            metric(scores, [0.5])
        with pytest.raises(error, match="^ood_scores .*" + sentence):
            metric([0.5], scores)
    with pytest.raises(error, match=r"^ood_scores\['far'\] .*" + sentence):
        evaluate_scores([0.5], {"near": [0.1], "far": scores})
    with pytest.raises(error, match="^ood_b .*" + sentence):
        paired_difference([0.5], [0.1], [0.5], scores)


@pytest.mark.parametrize("tpr", [0, -0.5, 1.01, 95, math.nan, math.inf])
def test_rate_outside_its_range_is_refused(tpr):
    with pytest.raises(ValueError, match=rf"tpr={tpr} must lie in \(0, 1\]"):
        fpr_at_tpr([1.0], [0.0], tpr=tpr)


@pytest.mark.parametrize("tpr", ["0.95", None, True, [0.95]])
def test_rate_that_is_no_number_is_refused(tpr):
    with pytest.raises(TypeError, match="tpr must be a number"):
        fpr_at_tpr([1.0], [0.0], tpr=tpr)


def test_unknown_convention_is_refused_with_the_nearest():
    message = "Unknown convention 'realeased'. Did you mean 'released'"
    with pytest.raises(ValueError, match=message):
        fpr_at_tpr([1.0], [0.0], convention="realeased")
    with pytest.raises(ValueError, match=message):
        evaluate_scores([1.0], {"x": [0.0]}, convention="realeased")
    with pytest.raises(ValueError, match=message):
        paired_difference([1.0], [0.0], [1.0], [0.0], convention="realeased")


@pytest.mark.parametrize(
    ("ood", "options", "error", "sentence"),
    [
        ({}, {}, ValueError, "no OOD set"),
        ([0.5], {}, TypeError, "must map names to scores, .* got list"),
        ({3: [0.5]}, {}, TypeError, "must be a string, got 3"),
        ({"mean": [0.5]}, {}, ValueError, "named 'mean'"),
        ({"x": [0.5]}, {"bootstrap": -1}, ValueError, "bootstrap=-1 must be at least 0"),
        ({"x": [0.5]}, {"bootstrap": 10.0}, TypeError, "bootstrap must be an integer, got 10.0"),
        ({"x": [0.5]}, {"bootstrap": True}, TypeError, "bootstrap must be an integer, got True"),
        ({"x": [0.5]}, {"seed": -3}, ValueError, "seed=-3 must be at least 0"),
    ],
)
def test_bad_evaluations_are_refused(ood, options, error, sentence):
    with pytest.raises(error, match=sentence):
        evaluate_scores([1.0], ood, **options)


def test_bad_comparisons_are_refused():
    with pytest.raises(ValueError, match=r"id_a has 2 scores and id_b has 1.* same images"):
        paired_difference([1.0, 2.0], [0.0], [1.0], [0.0])
    with pytest.raises(ValueError, match=r"ood_a has 1 scores and ood_b has 2.* same images"):
        paired_difference([1.0], [0.0], [1.0], [0.0, 1.0])
    with pytest.raises(ValueError, match=r"Unknown metric 'aurok'. Did you mean 'auroc'"):
        paired_difference([1.0], [0.0], [1.0], [0.0], metric="aurok")
    with pytest.raises(ValueError, match="bootstrap=0 must be at least 1"):
        paired_difference([1.0], [0.0], [1.0], [0.0], bootstrap=0)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_evaluation_holds_each_metric_and_their_plain_mean(convention):
    known, near = normal_scores(50, 31)
    far = near[:7] - 2
    result = evaluate_scores(known, {"near": near, "far": far}, convention=convention)
    for name, scores in (("near", near), ("far", far)):
        row = result.per_set[name]
        fpr = fpr_at_tpr(known, scores, convention=convention)
        expected = (auroc(known, scores), aupr_in(known, scores), aupr_out(known, scores), fpr, len(scores))
        assert (row.auroc, row.aupr_in, row.aupr_out, row.fpr95, row.n) == expected
        assert row.auroc_low is row.auroc_high is row.fpr95_low is row.fpr95_high is None
    for metric in ("auroc", "aupr_in", "aupr_out", "fpr95"):
        values = [getattr(row, metric) for row in result.per_set.values()]
        assert getattr(result.mean, metric) == pytest.approx(sum(values) / 2, abs=1e-15)
    assert (result.n_id, result.mean.n) == (50, 38)


@pytest.mark.parametrize("bootstrap", [0, 25])
def test_frame_and_dictionary_agree(bootstrap):
    known, near = normal_scores(40, 31)
    sets = {"near": near, "far": near - 1}
    result = evaluate_scores(known, sets, convention="released", bootstrap=bootstrap, seed=7)
    plain = json.loads(json.dumps(result.to_dict()))
    assert {key: plain[key] for key in ("convention", "n_id", "bootstrap", "seed")} == {
        "convention": "released",
        "n_id": 40,
        "bootstrap": bootstrap,
        "seed": 7,
    }
    frame = result.to_frame()
    assert list(frame.index) == ["near", "far", "mean"]
    intervals = ["auroc_low", "auroc_high", "fpr95_low", "fpr95_high"] if bootstrap else []
    assert list(frame.columns) == ["auroc", "aupr_in", "aupr_out", "fpr95", "n", *intervals]
    assert frame.to_dict("index") == {**plain["per_set"], "mean": plain["average"]}
    assert "released" in str(result)
    assert f"{result.mean.auroc:.6f}" in str(result)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("seed", range(10))
def test_replicates_are_the_metrics_of_the_resampled_images(convention, seed):
    known, unknown = random_scores(seed, most=25)
    rng = np.random.default_rng(seed)
    id_draws = rng.integers(0, len(known), (30, len(known)))
    ood_draws = rng.integers(0, len(unknown), (30, len(unknown)))
    tally = metrics._Ranking.of(known, unknown).resampled(id_draws, ood_draws)
    resampled = [(known[i], unknown[o]) for i, o in zip(id_draws, ood_draws, strict=True)]
    assert tally.auroc().tolist() == [auroc(*pair) for pair in resampled]
    for tpr in (0.95, 0.5):
        expected = [fpr_at_tpr(*pair, tpr=tpr, convention=convention) for pair in resampled]
        assert tally.fpr(tpr, convention).tolist() == expected


def naive_replicates(known, sets, replicates, rng):
    """(AUROC, standard FPR95) of each set: [replicates, sets, 2], the sets sharing the ID resample."""

    def one(sample, unknown):
        other = rng.choice(unknown, len(unknown))
        threshold = np.sort(sample)[::-1][math.ceil(0.95 * len(sample) - 1e-9) - 1]
        return brute_auroc(sample, other), share(other >= threshold)

    samples = [rng.choice(known, len(known)) for _ in range(replicates)]
    return np.array([[one(sample, unknown) for unknown in sets] for sample in samples])


def test_intervals_agree_with_a_naive_loop():
    known, near = normal_scores(40, 100)
    sets = {"near": near, "far": near - 0.7, "shifted": near - 0.3}
    result = evaluate_scores(known, sets, bootstrap=6000)
    naive = naive_replicates(known, list(sets.values()), 2500, np.random.default_rng(1))
    rows = {row: naive[:, i] for i, row in enumerate(result.per_set.values())} | {result.mean: naive.mean(1)}
    for row, expected in rows.items():
        low, high = np.quantile(expected, [0.025, 0.975], axis=0)
        got = np.array([[row.auroc_low, row.fpr95_low], [row.auroc_high, row.fpr95_high]])
        assert np.all(np.abs(got - [low, high]) < 0.2 * expected.std(axis=0))


def test_intervals_are_those_of_the_convention():
    known = np.arange(100.0)
    sets = {"between": known - 0.5, "low": np.repeat([4.0, 4.5, 5.0, 98.5], 25)}
    rows = {c: evaluate_scores(known, sets, convention=c, bootstrap=200).per_set for c in CONVENTIONS}
    # Nearly every replicate has an OOD image in the gap that only the released threshold slides down.
    assert rows["released"]["between"].fpr95_low > rows["standard"]["between"].fpr95_low
    assert rows["openood"]["low"].fpr95_low > 0.95
    assert rows["standard"]["low"].fpr95_low < 0.5


def test_comparison_intervals_are_those_of_the_convention():
    known, unknown = np.arange(100.0), np.repeat([4.0, 4.5, 5.0, 98.5], 25)
    pair = known, unknown, known, unknown[::-1]
    standard = paired_difference(*pair, metric="fpr95", bootstrap=200)
    openood = paired_difference(*pair, metric="fpr95", convention="openood", bootstrap=200)
    assert standard.high - standard.low > 5 * (openood.high - openood.low)


def test_interval_of_the_mean_shares_the_id_resample():
    # Few ID images, many OOD images: nearly all variance is that of ID, so averaging sets removes little.
    known, unknown = normal_scores(25, 600)
    sets = {name: np.random.default_rng(i).permutation(unknown) for i, name in enumerate("abcdef")}
    result = evaluate_scores(known, sets, bootstrap=1000)
    width = result.mean.auroc_high - result.mean.auroc_low
    single = result.per_set["a"].auroc_high - result.per_set["a"].auroc_low
    assert 0.8 * single < width < single


def test_intervals_cover_the_true_auroc():
    truth = 0.5 * (1 + math.erf(0.5))  # of two unit normals one apart
    covered = 0
    for seed in range(200):
        known, unknown = normal_scores(60, 60, seed=seed)
        row = evaluate_scores(known, {"x": unknown}, bootstrap=300, seed=seed).mean
        covered += row.auroc_low <= truth <= row.auroc_high
    assert 0.9 <= covered / 200 <= 0.985


def test_intervals_follow_the_seed_alone():
    known, unknown = normal_scores(50, 30)
    first, same, other = (evaluate_scores(known, {"x": unknown}, bootstrap=50, seed=s) for s in (3, 3, 4))
    assert first == same
    assert first.mean.auroc_low != other.mean.auroc_low
    assert first.mean.auroc == other.mean.auroc


def test_intervals_do_not_depend_on_the_size_of_a_chunk(monkeypatch):
    known, unknown = normal_scores(51, 33)
    sets = {"x": unknown, "y": unknown[:9]}
    whole = evaluate_scores(known, sets, bootstrap=101)
    monkeypatch.setattr(metrics, "_CHUNK", 600)
    assert evaluate_scores(known, sets, bootstrap=101) == whole


def test_further_sets_leave_the_intervals_of_the_others():
    known, unknown = normal_scores(50, 30)
    alone = evaluate_scores(known, {"x": unknown}, bootstrap=50)
    both = evaluate_scores(known, {"x": unknown, "y": unknown - 1}, bootstrap=50)
    assert both.per_set["x"] == alone.per_set["x"]


def two_detectors(n_id=80, n_ood=60, *, noise=0.3):
    """Scores of the same images by two detectors that mostly agree, the second noisier."""
    a = normal_scores(n_id, n_ood)
    rng = np.random.default_rng(9)
    return a, tuple(scores + noise * rng.normal(size=len(scores)) for scores in a)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("metric", ["auroc", "fpr95"])
def test_a_detector_does_not_differ_from_itself(metric, convention):
    known, unknown = normal_scores(50, 30)
    same = np.exp(known), np.exp(unknown)
    result = paired_difference(known, unknown, *same, metric=metric, convention=convention, bootstrap=200)
    assert (result.difference, result.low, result.high, result.p_value) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize(("metric", "sign"), [("auroc", 1), ("fpr95", -1)])
def test_a_much_better_detector_is_recognised(metric, sign):
    known, unknown = normal_scores(200, 200, shift=3.0)
    noise = np.random.default_rng(5).normal(size=(2, 200))
    result = paired_difference(known, unknown, noise[0], noise[1], metric=metric, bootstrap=999)
    assert sign * result.low > 0.2
    assert sign * result.high > 0.2
    assert result.p_value == pytest.approx(2 / 1000)


@pytest.mark.parametrize("metric", ["auroc", *CONVENTIONS])
def test_difference_is_that_of_the_metrics_and_turns_its_sign(metric):
    a, b = two_detectors(81, 63)
    options = {} if metric == "auroc" else {"metric": "fpr95", "convention": metric}
    point = auroc if metric == "auroc" else lambda *scores: fpr_at_tpr(*scores, convention=metric)
    result = paired_difference(*a, *b, **options)
    turned = paired_difference(*b, *a, **options)
    assert result.difference == point(*a) - point(*b)
    assert (turned.difference, turned.p_value) == (-result.difference, result.p_value)
    np.testing.assert_allclose([turned.low, turned.high], [-result.high, -result.low], rtol=0, atol=1e-12)


def test_comparison_agrees_with_a_naive_paired_loop():
    (id_a, ood_a), (id_b, ood_b) = two_detectors(noise=0.8)
    result = paired_difference(id_a, ood_a, id_b, ood_b, bootstrap=6000)
    rng = np.random.default_rng(2)
    naive = []
    for _ in range(2500):
        i, o = rng.integers(0, len(id_a), len(id_a)), rng.integers(0, len(ood_a), len(ood_a))
        naive.append(brute_auroc(id_a[i], ood_a[o]) - brute_auroc(id_b[i], ood_b[o]))
    naive = np.array(naive)
    expected = np.quantile(naive, [0.025, 0.975])
    assert np.all(np.abs([result.low, result.high] - expected) < 0.2 * naive.std())
    assert result.p_value == pytest.approx(2 * min(share(naive <= 0), share(naive >= 0)), abs=0.03)


def test_pairing_narrows_the_interval():
    (id_a, ood_a), (id_b, ood_b) = two_detectors()
    rng = np.random.default_rng(3)
    paired = paired_difference(id_a, ood_a, id_b, ood_b)
    mixed = paired_difference(id_a, ood_a, rng.permutation(id_b), rng.permutation(ood_b))
    assert paired.difference == mixed.difference
    assert paired.high - paired.low < 0.6 * (mixed.high - mixed.low)


def test_comparison_follows_the_seed_alone():
    a, b = two_detectors()
    first, same, other = (paired_difference(*a, *b, seed=s, bootstrap=100) for s in (3, 3, 4))
    assert first == same
    assert first.low != other.low


def several_detectors(round_to=9):
    """Scores of the same 83 ID images and two sets of OOD images by three detectors, with ties if rounded."""
    rng = np.random.default_rng(11)
    known, sets = rng.normal(1, 1, 83), {"near": rng.normal(0.3, 1, 41), "far": rng.normal(-1, 1, 29)}
    noise = {"a": 0.1, "b": 0.5, "c": 2.0}

    def seen(scores):
        return {name: (scores + size * rng.normal(size=len(scores))).round(round_to) for name, size in noise.items()}

    return seen(known), {name: seen(scores) for name, scores in sets.items()}


@pytest.mark.parametrize("round_to", [9, 0])
def test_paired_bootstrap_is_the_paired_difference_of_every_pair(round_to):
    known, sets = several_detectors(round_to)
    result = paired_bootstrap(known, {"near": sets["near"]}, reference="b", bootstrap=301, seed=4)
    assert (result.reference, list(result.mean)) == ("b", ["a", "c"])
    for name in ("a", "c"):
        expected = paired_difference(
            known[name], sets["near"][name], known["b"], sets["near"]["b"], bootstrap=301, seed=4
        )
        assert result.per_set[name]["near"] == result.mean[name] == expected


def test_paired_bootstrap_draws_the_images_of_the_intervals():
    # Against a detector without mistakes the difference is AUROC - 1, in every replicate.
    known, sets = several_detectors(1)
    known["perfect"] = np.full(83, np.inf)
    for own in sets.values():
        own["perfect"] = np.full(len(own["a"]), -np.inf)
    result = paired_bootstrap(known, sets, bootstrap=200, seed=2)
    assert result.reference == "perfect"
    for name in "abc":
        own = evaluate_scores(known[name], {s: sets[s][name] for s in sets}, bootstrap=200, seed=2)
        rows = {"mean": (own.mean, result.mean[name])}
        rows |= {s: (own.per_set[s], result.per_set[name][s]) for s in sets}
        for figures, found in rows.values():
            expected = [figures.auroc - 1, figures.auroc_low - 1, figures.auroc_high - 1]
            np.testing.assert_allclose([found.difference, found.low, found.high], expected, rtol=0, atol=1e-12)


def test_mean_difference_agrees_with_a_naive_loop():
    known, sets = several_detectors()
    result = paired_bootstrap(known, sets, bootstrap=4000).mean["b"]
    rng = np.random.default_rng(0)
    naive = []
    for _ in range(1500):
        i, draws = rng.integers(0, 83, 83), {s: rng.integers(0, len(sets[s]["a"]), len(sets[s]["a"])) for s in sets}
        a, b = (np.mean([brute_auroc(known[n][i], sets[s][n][draws[s]]) for s in sets]) for n in ("a", "b"))
        naive.append(b - a)
    naive = np.array(naive)
    np.testing.assert_allclose([result.low, result.high], np.quantile(naive, [0.025, 0.975]), atol=0.25 * naive.std())
    assert result.p_value == pytest.approx(2 * min(share(naive <= 0), share(naive >= 0)), abs=0.04)


def test_paired_bootstrap_compares_with_the_best_and_ignores_the_scale():
    known, sets = several_detectors()
    means = {n: np.mean([auroc(known[n], sets[s][n]) for s in sets]) for n in "abc"}
    known["a"], sets = np.exp(known["a"]), {s: own | {"a": np.exp(own["a"])} for s, own in sets.items()}
    result = paired_bootstrap(known, sets, bootstrap=50)
    assert result.reference == max(means, key=means.get)
    assert {n: row.difference for n, row in result.mean.items()} == pytest.approx(
        {n: means[n] - means[result.reference] for n in means if n != result.reference}, abs=1e-12
    )
    twin = paired_bootstrap({"a": known["a"], "b": 2 * known["a"]}, {"s": {"a": [1.0], "b": [2.0]}}, bootstrap=20)
    assert twin.mean["b"] == metrics.PairedDifference(0.0, 0.0, 0.0, 1.0)
    layout = result.to_dict()
    assert layout["detectors"]["c"]["per_set"]["far"]["p_value"] == result.per_set["c"]["far"].p_value
    assert layout["detectors"]["c"]["average"]["low"] == result.mean["c"].low


@pytest.mark.parametrize(
    ("known", "sets", "options", "error", "match"),
    [
        ({"a": [1, 2], "b": [1]}, {"s": {"a": [0], "b": [0]}}, {}, ValueError, r"id_scores has \[2, 1\] scores"),
        ({"a": [1], "b": [1]}, {"s": {"a": [0, 1], "b": [0]}}, {}, ValueError, r"\['s'\] has \[2, 1\] scores"),
        ({"a": [1], "b": [1]}, {"s": {"a": [0]}}, {}, ValueError, "not of the detectors"),
        ({"a": [1]}, {"s": {"a": [math.nan]}}, {}, ValueError, "NaN"),
        ({"a": [1]}, {}, {}, ValueError, "at least one"),
        ({}, {"s": {}}, {}, ValueError, "at least one"),
        ([1], {"s": [1]}, {}, TypeError, "mappings"),
        ({"a": [1]}, {"s": {"a": [0]}}, {"reference": "b"}, ValueError, "reference"),
        ({"a": [1]}, {"s": {"a": [0]}}, {"bootstrap": 0}, ValueError, "bootstrap=0"),
        ({"a": [1]}, {"s": {"a": [0]}}, {"seed": -1}, ValueError, "seed=-1"),
    ],
)
def test_what_cannot_be_compared_is_refused(known, sets, options, error, match):
    with pytest.raises(error, match=match):
        paired_bootstrap(known, sets, **options)


def test_examples_in_the_documentation():
    result = doctest.testmod(metrics)
    assert (result.failed, result.attempted > 5) == (0, True)
