"""Fusion: combination rules against independent computations, joins by id, refusals by name, saving and loading."""

import json
from collections import Counter

import numpy as np
import pytest
import scipy.stats
import torch
from ood_core import create_detector, evaluate
from ood_core.backbones.open_clip import OpenCLIPBackbone
from ood_core.combination import cauchy, fisher, log_p_correlation, robust_z_score, weighted_mean, z_score
from ood_core.data import scenes
from ood_core.detectors.base import Detector, leaves
from ood_core.errors import DataError, NotFittedError, UsageError
from ood_core.evaluation import calibrate_detectors, score
from ood_core.features import extract
from ood_core.fusion import Fusion
from ood_core.metrics import auroc
from ood_core.scores import ScoreTable
from ood_core.tiny import ByteTokenizer, TinyConfig, build_model
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression

CLASSES = scenes.ID_CLASSES[:4]


class Given(Detector):
    """Scores as a function of the features says."""

    name = "given"

    def __init__(self, function, **common):
        super().__init__(**common)
        self.function = function

    @property
    def fitted(self):
        return True

    def _score(self, features):
        return self.function(features)


@pytest.fixture(scope="module")
def other_backbone(small_backbone):
    torch.manual_seed(1)
    config = TinyConfig(
        image_size=32, width=16, layers=1, heads=2, embed_dim=8, stem=(4, 8), text_width=16, text_heads=2
    )
    return OpenCLIPBackbone(build_model(config), ByteTokenizer(), small_backbone.transform, spec="other")


@pytest.fixture
def two_backbones(small_backbone, other_backbone):
    return Fusion(
        {
            "first": create_detector("mcm", backbone=small_backbone, class_names=CLASSES),
            "second": create_detector("gl_mcm", backbone=other_backbone, class_names=CLASSES),
            "third": create_detector("max_logit", backbone=small_backbone, class_names=CLASSES),
        }
    )


@pytest.fixture
def members(clustered):
    return [create_detector("knn", k=5).fit(clustered()), create_detector("mahalanobis").fit(clustered())]


def normals(rng, n, members=3, correlation=0.7, shift=0.0):
    """Member scores by name, normal and correlated."""
    common = rng.standard_normal(n)
    return {
        f"m{i}": torch.from_numpy(
            np.sqrt(correlation) * common + np.sqrt(1 - correlation) * rng.standard_normal(n) - shift
        ).float()
        for i in range(members)
    }


def table_of(scores, source="id", prefix="i"):
    import pandas as pd

    frame = pd.DataFrame({name: np.asarray(values, dtype=np.float32) for name, values in scores.items()})
    frame.insert(0, "id", [f"{prefix}{i:04d}" for i in range(len(frame))])
    return ScoreTable(frame.assign(source=source, label=None, status="ok"))


# ---- rules


def test_fisher_is_scipys_for_independent_p_values():
    p = np.random.default_rng(0).random((4, 50)) ** 3
    expected = scipy.stats.combine_pvalues(p, "fisher", axis=0).pvalue
    np.testing.assert_allclose(fisher(torch.from_numpy(p)).numpy(), expected, rtol=1e-10)
    tiny = torch.tensor([[1e-90], [1e-25]], dtype=torch.float64)
    assert float(fisher(tiny)) == pytest.approx(scipy.stats.combine_pvalues([1e-90, 1e-25], "fisher").pvalue, rel=1e-9)


def test_fisher_weights():
    p = torch.from_numpy(np.random.default_rng(1).random((3, 20)))
    weights = torch.tensor([1.0, 2.0, 0.0])
    torch.testing.assert_close(
        fisher(p, weights=torch.tensor([5.0, 5.0, 0.0])), fisher(p[:2])
    )  # only ratios count; a weight of 0 leaves out
    draws = -2 * (np.log(np.random.default_rng(2).random((2, 400_000))) * np.array([[1.0], [2.0]])).sum(0)
    statistic = -2 * (weights[:, None] * p.log()).sum(0).numpy()
    exact = [(draws >= value).mean() for value in statistic]
    np.testing.assert_allclose(fisher(p, weights=weights).numpy(), exact, atol=0.02)


@pytest.mark.parametrize("correlation", [0.0, 0.4, 0.9])
def test_brown_keeps_the_error_rate_under_dependence(correlation):
    rng = np.random.default_rng(3)
    cdf = scipy.stats.norm.cdf
    known, fresh = (
        torch.from_numpy(cdf(np.stack([*normals(rng, n, 5, correlation).values()]).astype(np.float64)))
        for n in (3000, 40000)
    )
    corrected = fisher(fresh, correlation=log_p_correlation(known))
    for alpha in (0.05, 0.01):
        assert (corrected <= alpha).double().mean() == pytest.approx(alpha, rel=0.2)
    if correlation:
        assert (fisher(fresh) <= 0.01).double().mean() > 0.02


def test_identical_detectors_are_one():
    p = torch.rand(1, 30, generator=torch.Generator().manual_seed(0)).double().expand(4, 30)
    torch.testing.assert_close(fisher(p, correlation=log_p_correlation(p)), p[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(cauchy(p), p[0], rtol=1e-9, atol=1e-12)


def test_log_p_correlation_is_numpys():
    p = np.random.default_rng(4).random((3, 40))
    p[2] = 1 - p[0]
    found = log_p_correlation(torch.from_numpy(p)).numpy()
    np.testing.assert_allclose(found, np.corrcoef(-2 * np.log(p)), rtol=1e-12)
    # detectors that contradict each other: little variance is left, the p-value stays one
    assert (fisher(torch.from_numpy(p), correlation=torch.from_numpy(found)) > 0).all()
    assert fisher(torch.tensor([[0.5], [0.5]]), correlation=torch.tensor([[1.0, -1.0], [-1.0, 1.0]])).isfinite().all()


def test_cauchy_is_the_cauchy_distribution():
    rng = np.random.default_rng(5)
    p, weights = rng.random((4, 30)) ** 4, np.array([1.0, 0.5, 2.0, 0.0])
    statistic = (weights[:, None] * scipy.stats.cauchy.isf(p)).sum(0) / weights.sum()
    expected = scipy.stats.cauchy.sf(statistic)
    np.testing.assert_allclose(cauchy(torch.from_numpy(p), weights=torch.from_numpy(weights)).numpy(), expected)
    assert float(cauchy(torch.tensor([[1e-200], [0.5]], dtype=torch.float64))) == pytest.approx(2e-200, rel=1e-9)
    assert float(cauchy(torch.tensor([[0.01], [1.0]]))) > 0.99  # what Fusion must avoid


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.95])
def test_cauchy_keeps_small_error_rates_under_dependence(correlation):
    rng = np.random.default_rng(6)
    p = scipy.stats.norm.cdf(np.stack([*normals(rng, 60000, 5, correlation).values()]).astype(np.float64))
    assert (cauchy(torch.from_numpy(p)) <= 0.01).double().mean() <= 0.0125


def test_scales_are_scipys():
    rng = np.random.default_rng(7)
    reference, x = rng.standard_t(2, 41), rng.standard_normal(5)
    spread = scipy.stats.median_abs_deviation(reference, scale="normal")
    written = (x - np.median(reference)) / spread
    found = robust_z_score(torch.from_numpy(x), torch.from_numpy(reference))
    np.testing.assert_allclose(found.numpy(), written, rtol=1e-12)
    found = z_score(torch.from_numpy(x), torch.from_numpy(reference))
    np.testing.assert_allclose(found.numpy(), (x - reference.mean()) / reference.std(ddof=1), rtol=1e-12)
    even = torch.tensor([0.0, 1.0, 2.0, 10.0])
    assert float(robust_z_score(torch.tensor([1.5]), even)) == 0.0


def test_rules_refuse_what_is_no_p_value():
    for rule in (fisher, cauchy, log_p_correlation):
        with pytest.raises(ValueError, match=r"p-values must lie in \(0, 1\], got 0.0 to 0.5"):
            rule(torch.tensor([[0.0, 0.5]]))
        with pytest.raises(ValueError, match="must have shape"):
            rule(torch.rand(3))
    with pytest.raises(ValueError, match="weights="):
        weighted_mean(torch.rand(2, 3), torch.tensor([-1.0, 1.0]))
    with pytest.raises(ValueError, match="weights="):
        cauchy(torch.rand(2, 3), weights=torch.zeros(2))
    with pytest.raises(ValueError, match="M is 2 in values"):
        fisher(torch.rand(2, 3), weights=torch.ones(3))
    with pytest.raises(ValueError, match=r"correlation must be \[2, 2\]"):
        fisher(torch.rand(2, 3), correlation=torch.eye(3))
    with pytest.raises(ValueError, match="standard deviation"):
        z_score(torch.ones(2), torch.ones(5))


# ---- the detector


def written_out(normalize, combine, known, fresh, weights):
    """Fused scores with numpy and scipy."""
    w = np.array([weights.get(name, 1.0) for name in known])[:, None]
    if normalize == "p_value":
        z = [[(1 + (known[name] <= s).sum()) / (len(known[name]) + 1) for s in fresh[name]] for name in known]
    elif normalize == "z_score":
        z = [(fresh[name] - known[name].mean()) / known[name].std(ddof=1) for name in known]
    else:
        mad = scipy.stats.median_abs_deviation
        z = [(fresh[n] - np.median(known[n])) / mad(known[n], scale="normal") for n in known]
    z = np.array(z)
    if combine == "fisher":
        ranks = np.array([scipy.stats.rankdata(known[name], "max") / (len(known[name]) + 1) for name in known])
        r = np.corrcoef(np.log(ranks))
        mean, variance = 2 * w.sum(), 4 * (w.T @ r @ w).item()
        statistic = -2 * (w * np.log(z)).sum(0)
        return np.log(scipy.stats.chi2.sf(statistic * 2 * mean / variance, 2 * mean**2 / variance))
    if combine == "cauchy":
        z = np.minimum(z, 1 - 0.5 / (len(known["m0"]) + 1))
        return np.log(scipy.stats.cauchy.sf((w * scipy.stats.cauchy.isf(z)).sum(0) / w.sum()))
    return {"mean": lambda: (w * z).sum(0) / w.sum(), "max": lambda: z.max(0), "min": lambda: z.min(0)}[combine]()


COMBINATIONS = [(n, c) for n in ("p_value", "z_score", "robust") for c in ("mean", "max", "min")]
COMBINATIONS += [("p_value", "fisher"), ("p_value", "cauchy")]


@pytest.mark.parametrize(
    ("normalize", "combine", "weighted"),
    [(n, c, False) for n, c in COMBINATIONS] + [(n, c, True) for n, c in COMBINATIONS if c not in ("max", "min")],
)
def test_scores_written_out(normalize, combine, weighted):
    weights = {"m0": 1.0, "m1": 3.0, "m2": 0.5} if weighted else None
    rng = np.random.default_rng(8)
    known, fresh = normals(rng, 60), normals(rng, 25, shift=1.0)
    fresh["m1"][:2] = torch.tensor([9.0, -9.0])  # above and below all that is known
    fusion = Fusion(["m0", "m1", "m2"], normalize=normalize, combine=combine, weights=weights).calibrate(known)
    plain = [{name: values.double().numpy() for name, values in scores.items()} for scores in (known, fresh)]
    expected = written_out(normalize, combine, *plain, weights or {})
    found = fusion.combine_scores(fresh)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(("normalize", "combine"), COMBINATIONS)
def test_false_alarms_of_the_fused_decision(normalize, combine):
    rng = np.random.default_rng(9)
    alarms = {"threshold": [], "p": []}
    for _ in range(80):
        fusion = Fusion(["m0", "m1", "m2"], normalize=normalize, combine=combine)
        fusion.calibrate(normals(rng, 60), tpr=0.9)
        fresh = normals(rng, 40)
        alarms["threshold"].append(fusion.is_ood(fresh).double().mean())
        alarms["p"].append((fusion.p_value(fresh) <= 0.1).double().mean())
    # Of 60 images the 7th lowest is the threshold: a new one falls below it with probability 7 / 61.
    assert 0.08 < np.mean(alarms["threshold"]) < 7 / 61 + 0.013
    assert 0.07 < np.mean(alarms["p"]) < 6 / 61 + 0.013


@pytest.mark.parametrize(("normalize", "combine"), COMBINATIONS)
def test_a_higher_member_score_never_lowers_the_fused_one(normalize, combine):
    rng = np.random.default_rng(10)
    fusion = Fusion(["m0", "m1", "m2"], normalize=normalize, combine=combine).calibrate(normals(rng, 50))
    fresh = normals(rng, 100)
    higher = fresh | {"m1": fresh["m1"] + 0.7}
    before, after = fusion.combine_scores(fresh), fusion.combine_scores(higher)
    assert (after >= before - 1e-6).all()
    assert (after > before).any()


def test_members_on_features(members, clustered, tmp_path):
    val, test, far = clustered(3), clustered(1), clustered(2, far=True)
    fused = Fusion(members).calibrate(val)
    shares = []
    for member in members:
        reference = member.score_features(val).numpy()
        shares.append([(1 + (reference <= s).sum()) / 121 for s in member.score_features(test).numpy()])
    np.testing.assert_allclose(fused.score_features(test).numpy(), np.mean(shares, 0), rtol=1e-6)
    assert auroc(fused.score_features(test), fused.score_features(far)) > 0.95
    assert fused.predict(test) is None
    assert fused.calibration.data_hash == members[0].calibrate(val).calibration.data_hash
    assert torch.equal(fused.is_ood(test), fused.is_ood(fused.score_features(test)))
    assert fused.is_ood(far, fdr=0.1).double().mean() > 0.8
    with pytest.raises(UsageError, match="'fusion' has no predicted class"):
        fused.is_ood(far, by_class=True)


def test_fit_fits_the_members_that_need_it(clustered):
    fitted = create_detector("knn", k=3).fit(clustered(7))
    bank = fitted.state["bank"]
    fused = Fusion([fitted, create_detector("mahalanobis")])
    assert not fused.fitted
    with pytest.raises(NotFittedError, match=r"Member 'mahalanobis' cannot score: .*has not been fitted"):
        fused.calibrate(clustered(3))
    fused.fit(clustered()).calibrate(clustered(3))
    assert fused.members["knn"].state["bank"] is bank
    assert fused.threshold is not None
    assert fused.fit(clustered()).threshold is None


# ---- several backbones, images, ids


def test_images_and_features_of_several_backbones_agree(two_backbones, small_backbone, other_backbone, image_folder):
    fused = two_backbones.calibrate(image_folder)
    each = {
        "first": fused.members["first"].score(image_folder),
        "second": fused.members["second"].score(image_folder),
        "third": fused.members["third"].score(image_folder),
    }
    expected = fused.combine_scores(each)
    torch.testing.assert_close(fused.score(image_folder), expected)
    sets = [extract(small_backbone, image_folder), extract(other_backbone, image_folder)]
    torch.testing.assert_close(fused.score_features(sets), expected)
    torch.testing.assert_close(fused.score_features(sets[::-1]), expected)
    assert torch.equal(fused.is_ood(sets), fused.is_ood(image_folder))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fused.score_features([sets[0], sets[1][order]]), expected)
    torch.testing.assert_close(fused.score_features([sets[0][order], sets[1]]), expected[order])
    torch.testing.assert_close(
        Fusion(fused.members).calibrate(sets).score_features(sets), expected, rtol=1e-6, atol=1e-6
    )
    assert Fusion(fused.members).calibrate(sets).calibration.data_hash == fused.calibration.data_hash
    with pytest.raises(DataError, match="stands in one of the two tables only"):
        fused.score_features([sets[0], sets[1][:-1]])
    with pytest.raises(UsageError, match=r"'second' is of 'other', of which there are no features"):
        fused.score_features([sets[0]])
    with pytest.raises(UsageError, match="Two of the feature sets are of the same backbone"):
        fused.score_features([sets[0], sets[0]])
    with pytest.raises(UsageError, match=r"Member 'second' cannot score: These features are of backbone 'small'"):
        fused.score_features(sets[0])


def test_a_list_of_many_images_keeps_its_order(two_backbones, image_folder):
    from PIL import Image

    images = [Image.open(path) for path in sorted(image_folder.rglob("*.png"))]  # ids "0" to "19": "10" sorts early
    fused = two_backbones.calibrate(image_folder)
    torch.testing.assert_close(fused.score(images), fused.score(image_folder))


def test_a_member_of_two_fusions_is_run_once(small_backbone, image_folder, tmp_path, monkeypatch):
    names = {"class_names": CLASSES, "backbone": small_backbone}
    single = {name: create_detector(name, **names) for name in ("mcm", "gl_mcm", "max_logit")}
    runs = Counter()
    for kind in map(type, single.values()):
        monkeypatch.setattr(
            kind, "_score", lambda self, part, plain=kind._score: runs.update([self.name]) or plain(self, part)
        )
    fused = {"both": Fusion([single["mcm"], single["gl_mcm"]]), "all": Fusion(single, combine="fisher")}
    detectors = {"both": fused["both"], "mcm": single["mcm"], "all": fused["all"]}
    calibrate_detectors(detectors, image_folder)
    again = Fusion(single, combine="fisher").calibrate(image_folder)
    assert again.threshold == fused["all"].threshold
    assert single["mcm"].calibration.n == 20  # in its own name, too
    assert again.calibration.data_hash == fused["all"].calibration.data_hash
    runs.clear()
    other = scenes.write_folder(scenes.textures(7, size=32), tmp_path / "textures")
    found = evaluate(detectors, id=image_folder, ood={"textures": other})
    assert runs == {"mcm": 2, "gl_mcm": 2, "max_logit": 2}
    assert found.scores.detectors == ["both", "mcm", "all"]
    assert found.results["detectors"]["all"]["params"] == {
        "normalize": "p_value", "combine": "fisher", "weights": None, "members": ["mcm", "gl_mcm", "max_logit"]
    }  # fmt: skip
    assert [b["spec"] for b in found.results["environment"]["backbones"]] == ["small"]
    assert [name for name, figures in found.results["detectors"].items() if "accuracy" in figures] == ["mcm"]
    for name in detectors:
        np.testing.assert_allclose(
            found.scores.scores(name, "textures"), detectors[name].score(other).numpy(), rtol=1e-5
        )


def test_images_that_fail_are_recorded(two_backbones, image_folder, tmp_path):
    fused = two_backbones.calibrate(image_folder)
    folder = scenes.write_folder(scenes.render(CLASSES, 2, size=40), tmp_path / "images")
    (folder / CLASSES[0] / "00001.png").write_text("not an image")
    table, counts = score({"fusion": fused}, folder, on_error="record")
    assert (counts["scored"], counts["failures"]) == (7, 1)
    bad = table.frame[table.frame["status"] != "ok"]
    assert bad["id"].tolist() == [f"{CLASSES[0]}/00001.png"]
    assert bad["fusion"].isna().all()
    np.testing.assert_allclose(table.scores("fusion", "id"), fused.score(folder, on_error="record").numpy(), rtol=1e-6)


# ---- refusals


def test_refusals_of_options(members):
    with pytest.raises(UsageError, match="two or more"):
        Fusion(members[:1])
    with pytest.raises(UsageError, match="two or more detectors of different names"):
        Fusion([members[0], members[0]])
    with pytest.raises(ValueError, match="normalize='rank'"):
        Fusion(members, normalize="rank")
    with pytest.raises(ValueError, match="combine='median'"):
        Fusion(members, combine="median")
    with pytest.raises(UsageError, match=r"combine='fisher' combines p-values: use normalize='p_value', not 'z_score'"):
        Fusion(members, combine="fisher", normalize="z_score")
    with pytest.raises(UsageError, match="combine='max' takes no weights"):
        Fusion(members, combine="max", weights={"knn": 1, "mahalanobis": 2})
    with pytest.raises(UsageError, match=r"must name every member once.*\['knn'\]"):
        Fusion(members, weights={"knn": 1})
    with pytest.raises(UsageError, match="not negative and not all 0"):
        Fusion(members, weights={"knn": 0, "mahalanobis": 0})
    with pytest.raises(UsageError, match="Unknown option of 'fusion' 'combined'"):
        Fusion(members).set_params(combined="max")


def test_members_that_are_no_use_are_named(members, clustered):
    val = clustered(3)

    def fused(function):
        return Fusion({"bad": Given(function), "knn": members[0]})

    def broken(features):
        raise RuntimeError("out of luck")

    with pytest.raises(NotFittedError, match="calibrate"):
        Fusion(members).score_features(val)
    with pytest.raises(DataError, match=r"Member 'bad' gives every calibration image the same score"):
        fused(lambda f: torch.ones(len(f))).calibrate(val)
    with pytest.raises(DataError, match=r"Member 'bad' gives no number \(NaN\) for 1 of 120"):
        fused(lambda f: f.image[:, 0].clone().index_fill_(0, torch.tensor([7]), float("nan"))).calibrate(val)
    with pytest.raises(DataError, match=r"Member 'bad' gives 1 infinite scores"):
        fused(lambda f: f.image[:, 0].clone().index_fill_(0, torch.tensor([7]), float("-inf"))).calibrate(val)
    with pytest.raises(DataError, match=r"Member 'bad' fails \(RuntimeError: out of luck\)"):
        fused(broken).calibrate(val)
    mostly = fused(lambda f: torch.cat([f.image[:50, 0], torch.ones(len(f) - 50)]))
    mostly.calibrate(val)  # ranks cope
    with pytest.raises(DataError, match=r"Member 'bad' cannot be brought to the scale 'robust'.*absolute deviation"):
        mostly.set_params(normalize="robust").calibrate(val)
    with pytest.raises(DataError, match="19 calibration images are too few"):
        Fusion(members).calibrate(val[:19])
    with pytest.raises(DataError, match="1 calibration images are too few"):
        Fusion(members).calibrate(val[:1])
    calibrated = fused(lambda f: f.image[:, 0]).calibrate(val)
    calibrated.members["bad"].function = lambda f: f.image[:, 0] * float("nan")
    with pytest.raises(DataError, match=r"Member 'bad' gives no number \(NaN\) for 120 of 120"):
        calibrated.is_ood(clustered(1))
    with pytest.raises(DataError, match="Member 'bad' gives no number"):
        evaluate(calibrated, id=clustered(1), ood={"far": clustered(2)})


def test_member_scores_that_do_not_fit():
    fusion = Fusion(["a", "b"])
    with pytest.raises(UsageError, match=r"no scores of member 'b', only of \['a'\]"):
        fusion.calibrate({"a": torch.rand(30)})
    with pytest.raises(UsageError, match="vectors of one length"):
        fusion.calibrate({"a": torch.rand(30), "b": torch.rand(31)})
    with pytest.raises(UsageError, match="vectors of one length"):
        fusion.calibrate({"a": torch.rand(30, 2), "b": torch.rand(30, 2)})


# ---- score tables


def test_tables_are_scored_by_the_members_names(members, clustered):
    val, test = clustered(3), clustered(1)
    fused = Fusion(members, combine="cauchy").calibrate(val)
    table, _ = score({"knn": members[0], "mahalanobis": members[1]}, test)
    shuffled = ScoreTable(table.frame.sample(frac=1, random_state=0))
    found = fused.score_table(shuffled).frame.set_index("id").loc[test.ids, "fusion"]
    np.testing.assert_allclose(found, fused.score_features(test).numpy(), rtol=1e-6)
    known, _ = score({"knn": members[0], "mahalanobis": members[1]}, val, source="held out")
    columns = Fusion(["knn", "mahalanobis"], combine="cauchy").calibrate(known)
    assert columns.threshold == fused.threshold
    np.testing.assert_array_equal(columns.score_table(table, name="f").scores("f", "id"), fused.score_features(test))
    with pytest.raises(UsageError, match="has a column 'knn' already"):
        columns.score_table(table, name="knn")
    with pytest.raises(UsageError, match=r"Unknown detector in this table 'mahalanobis'"):
        columns.score_table(table.select(["knn"]))
    with pytest.raises(UsageError, match="Member 'knn' cannot score: it is a column of a score table"):
        columns.score_features(test)
    with pytest.raises(UsageError, match="Score the table first"):
        columns.is_ood(table)


def test_columns_see_no_images_but_are_saved(image_folder, tmp_path):
    with pytest.raises(UsageError, match="A fusion of score table columns sees no images"):
        Fusion(["a", "b"]).calibrate(image_folder)
    known = {name: np.random.default_rng(i).standard_normal(40) for i, name in enumerate(("a", "b"))}
    fusion = Fusion(["a", "b"], combine="fisher").calibrate(known)
    fusion.save_pretrained(tmp_path)
    loaded = Detector.from_pretrained(tmp_path)
    assert torch.equal(loaded.combine_scores(known), fusion.combine_scores(known))
    assert torch.equal(loaded.is_ood(known, fdr=0.3), fusion.is_ood(known, fdr=0.3))


def test_images_that_a_table_lacks_are_reported_and_counted():
    rng = np.random.default_rng(11)
    scores = normals(rng, 40, members=2)
    first, second = (table_of({name: scores[name]}) for name in ("m0", "m1"))
    part = ScoreTable(second.frame.iloc[5:].iloc[::-1])
    extra = table_of({"m1": [0.0]}, prefix="new")
    joined = first.join(ScoreTable.concatenate([part, extra]), missing="record")
    assert joined.frame["id"].tolist() == [*first.frame["id"], "new0000"]
    lacking = joined.frame[joined.frame["status"] != "ok"]
    assert lacking["id"].tolist() == [*first.frame["id"][:5], "new0000"]
    assert lacking["status"].tolist() == ["no row with a score of m1"] * 5 + ["no row with a score of m0"]
    fusion = Fusion(["m0", "m1"]).calibrate(joined)
    assert fusion.calibration.n == 35
    scored = fusion.score_table(joined)
    assert scored.frame["fusion"].isna().tolist() == (joined.frame["status"] != "ok").tolist()
    rest = {name: values[5:] for name, values in scores.items()}
    np.testing.assert_allclose(scored.scores("fusion", "id"), fusion.combine_scores(rest).numpy(), rtol=1e-6)


def test_calibration_takes_the_id_rows_of_a_table():
    rng = np.random.default_rng(12)
    known, unknown = normals(rng, 40), normals(rng, 30, shift=3)
    both = ScoreTable.concatenate([table_of(known), table_of(unknown, "far"), table_of(unknown, "near")])
    fusion = Fusion([*known]).calibrate(both)
    assert fusion.threshold == Fusion([*known]).calibrate(known).threshold
    without = ScoreTable(both.frame[both.frame["source"] != "id"])
    with pytest.raises(UsageError, match=r"no set 'id' among its several sets: it holds \['far', 'near'\]"):
        Fusion([*known]).calibrate(without)


# ---- stacking


def test_stacking_is_declared_and_stamped(members, clustered, tmp_path):
    train_ood, far = clustered(5, far=True), clustered(2, far=True)
    fused = Fusion(members, combine="stacking")
    with pytest.raises(NotFittedError, match=r"labelled OOD images: call fit_stacking"):
        fused.calibrate(clustered(3))
    fused.fit_stacking(clustered(4), train_ood)
    assert fused.labelled_ood["images"] == 120
    fused.calibrate(clustered(3))
    found = evaluate(fused, id=clustered(1), ood={"far": far}, out=tmp_path / "out")
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["detectors"]["fusion"]["params"]["labelled_ood"] == fused.labelled_ood
    assert found.results["detectors"]["fusion"]["average"]["auroc"] > 0.95
    fused.save_pretrained(tmp_path / "saved")
    loaded = Detector.from_pretrained(tmp_path / "saved")
    assert loaded.labelled_ood == fused.labelled_ood
    assert torch.equal(loaded.score_features(far), fused.score_features(far))
    assert torch.equal(loaded.is_ood(far), fused.is_ood(far))
    plain = Fusion(members).calibrate(clustered(3))
    assert "labelled_ood" not in plain.stamps
    assert plain.labelled_ood is None
    with pytest.raises(UsageError, match="Only combine='stacking' learns"):
        plain.fit_stacking(clustered(4), train_ood)
    with pytest.raises(DataError, match="19 OOD images are too few"):
        Fusion(members, combine="stacking").fit_stacking(clustered(4), train_ood[:19])
    with pytest.raises(NotFittedError, match="fit_stacking"):
        fused.set_params(normalize="z_score").calibrate(clustered(3))
    assert fused.labelled_ood is None


def test_stacking_learns_the_logistic_regression():
    rng = np.random.default_rng(13)
    known, unknown = normals(rng, 300), normals(rng, 200)
    unknown["m1"] = unknown["m1"] - 2.0  # the only member that tells them apart
    fused = Fusion([*known], combine="stacking", normalize="z_score").fit_stacking(known, unknown, l2=1e-3)
    z = [
        np.concatenate([(s[n].double() - known[n].double().mean()) / known[n].double().std() for s in (known, unknown)])
        for n in known
    ]
    # the symmetric two-class penalty is half of scikit-learn's
    expected = LogisticRegression(C=2 / (500 * 1e-3), tol=1e-9, max_iter=1000).fit(np.stack(z, 1), np.arange(500) < 300)
    learned = fused.state["(stacking)"].numpy()
    np.testing.assert_allclose(learned, [*expected.coef_[0], *expected.intercept_], rtol=1e-4, atol=1e-4)
    assert learned[1] > 0.5
    found = fused.combine_scores(unknown).numpy()
    np.testing.assert_allclose(found, expected.decision_function(np.stack(z, 1))[300:], rtol=1e-3, atol=1e-3)
    tables = table_of(known), ScoreTable.concatenate([table_of(known), table_of(unknown, "far")])
    again = Fusion([*known], combine="stacking", normalize="z_score").fit_stacking(*tables)
    np.testing.assert_allclose(again.state["(stacking)"].numpy(), learned, rtol=1e-6)
    with pytest.raises(UsageError, match=r"no set but 'id'"):
        again.fit_stacking(tables[0], tables[0])


# ---- storage


@pytest.mark.parametrize("combine", ["mean", "fisher"])
def test_nested_fusions_round_trip(two_backbones, small_backbone, image_folder, tmp_path, combine):
    third = create_detector("r_mcm", backbone=small_backbone, class_names=CLASSES)
    outer = Fusion({"r/../mcm": third, "..": two_backbones}, combine=combine, weights={"r/../mcm": 2, "..": 1})
    outer.calibrate(image_folder, tpr=0.9)
    inner = Fusion(two_backbones.members).calibrate(image_folder)
    assert two_backbones.threshold == inner.set_params().calibrate(image_folder, 0.9).threshold
    outer.save_pretrained(tmp_path / "saved")
    assert {path.name for path in tmp_path.iterdir()} == {"saved"}
    loaded = Detector.from_pretrained(tmp_path / "saved")
    assert list(loaded.members) == ["r/../mcm", ".."]
    assert list(loaded.members[".."].members) == ["first", "second", "third"]
    assert loaded.get_params() == outer.get_params()
    known = {"small": small_backbone, "other": two_backbones.members["second"].backbone}
    for leaf in leaves(loaded):
        leaf.attach(known[leaf._held.record["spec"]])
    assert torch.equal(loaded.score(image_folder), outer.score(image_folder))
    assert torch.equal(loaded.p_value(image_folder), outer.p_value(image_folder))
    detectors = {"f": Fusion(outer.members, **outer.get_params())}
    two_backbones.state.clear()
    calibrate_detectors(detectors, image_folder, tpr=0.9)
    assert detectors["f"].threshold == outer.threshold


def test_a_fusion_saved_by_the_first_version_loads(members, clustered, tmp_path):
    fused = Fusion(members, normalize="z_score").calibrate(clustered(3))
    fused.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("members", "labelled_ood", "calibration"):
        del config[name]
    config["params"] = {"normalize": "zscore", "combine": "mean"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("knn", "mahalanobis"):
        tensors[f"state.{name}"] = tensors[f"state.{name}"].sort().values
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = Detector.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.score_features(clustered(1)), fused.score_features(clustered(1)))
    assert torch.equal(loaded.is_ood(clustered(1)), fused.is_ood(clustered(1)))
    assert Fusion(members, normalize="ecdf").normalize == "p_value"


def test_other_options_need_another_calibration_but_no_other_scores(members, clustered):
    val, test = clustered(3), clustered(1)
    fused = Fusion(members).calibrate(val)
    fused.set_params(combine="fisher")
    torch.testing.assert_close(
        fused.score_features(test), Fusion(members, combine="fisher").calibrate(val).score_features(test)
    )
    with pytest.raises(NotFittedError, match="not been calibrated"):
        fused.is_ood(test)


def test_neither_members_nor_features_are_changed(members, clustered):
    val = clustered(3)
    before = val.image.clone(), members[0].score_features(clustered(1))
    Fusion(members, combine="fisher").calibrate(val).is_ood(clustered(1))
    assert torch.equal(val.image, before[0])
    assert torch.equal(members[0].score_features(clustered(1)), before[1])
    assert members[0].threshold is None
