"""The linear probe: scikit-learn's optimum, the penalty chosen on held-out images, odd training sets."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from ood_core import create_detector
from ood_core.detectors.base import Detector
from ood_core.detectors.linear_probe import L2_GRID, hold_out
from ood_core.errors import DataError, NotFittedError
from ood_core.logistic import fit_logistic
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss


def reference(x, y, l2, **options):
    c = 1 / (len(x) * l2)
    return LogisticRegression(C=c, max_iter=20000, tol=1e-9, **options).fit(x.double().numpy(), y.numpy())


@pytest.fixture
def hard(clustered):
    """Clusters that overlap, so that the penalty matters; 41 + 37 + 9 images."""
    part = clustered()
    generator = torch.Generator().manual_seed(5)
    noisy = part.image + 0.5 * torch.randn(part.image.shape, generator=generator)
    keep = (part.labels != 2) | (torch.arange(120) % 4 == 0)
    return replace(part, image=noisy / noisy.norm(dim=1, keepdim=True))[keep]


@pytest.mark.parametrize("l2", [1e-1, 1e-3, 1e-5])
def test_optimum_is_scikit_learns(hard, l2):
    weight, bias = fit_logistic(hard.image, hard.labels, 3, l2=l2)
    expected = reference(hard.image, hard.labels, l2)
    assert weight.dtype == bias.dtype == torch.float64
    np.testing.assert_allclose(weight.numpy(), expected.coef_, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(bias.numpy(), expected.intercept_, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("classes", "l2"), [(2, 1e-2), (2, 1e-6), (3, 1e-4)])
def test_the_gradient_is_zero_there(hard, classes, l2):
    part = hard[hard.labels < classes]
    x, y = part.image.double(), part.labels
    found = [value.requires_grad_() for value in fit_logistic(x, y, classes, l2=l2)]
    loss = torch.nn.functional.cross_entropy(x @ found[0].T + found[1], y) + l2 / 2 * found[0].square().sum()
    loss.backward()
    assert max(float(value.grad.abs().max()) for value in found) < 1e-6
    assert float(found[0].detach().sum(0).abs().max()) < 1e-9  # penalised, so nothing common to all classes is left
    again = fit_logistic(x, y, classes, l2=l2, start=(torch.randn(classes, 10), torch.zeros(classes).double()))
    torch.testing.assert_close(again[0], found[0].detach(), rtol=1e-3, atol=1e-4)


def test_scores_are_those_of_the_probabilities(hard, clustered):
    expected = reference(hard.image, hard.labels, 1e-3)
    x = clustered(1).image.double().numpy()
    p, logits = expected.predict_proba(x), expected.decision_function(x)
    written = {
        "msp": p.max(1),
        "max_logit": logits.max(1),
        "energy": np.log(np.exp(logits).sum(1)),
        "gen": -(p**0.1 * (1 - p) ** 0.1).sum(1),
    }
    for scorer, scores in written.items():
        probe = create_detector("linear_probe", scorer=scorer, l2=1e-3).fit(hard)
        np.testing.assert_allclose(probe.score_features(clustered(1)).numpy(), scores, rtol=1e-3)
        assert probe.predict(clustered(1)).tolist() == p.argmax(1).tolist()


def test_the_penalty_is_the_best_on_held_out_images(hard):
    for seed in (0, 3):
        held = hold_out(hard.labels, seed)
        assert [int(held[hard.labels == label].sum()) for label in range(3)] == [8, 8, 2]
        losses = {}
        for l2 in L2_GRID:
            fitted = reference(hard.image[~held], hard.labels[~held], l2)
            losses[l2] = log_loss(hard.labels[held], fitted.predict_proba(hard.image[held].double().numpy()))
        probe = create_detector("linear_probe", seed=seed).fit(hard)
        best = min(losses, key=losses.get)
        assert 1e-6 < best < 1e-1  # else the test would not tell the smallest from the last
        assert float(probe.state["l2"]) == best
        weight, _ = fit_logistic(hard.image, hard.labels, 3, l2=best)
        torch.testing.assert_close(probe.state["weight"], weight.float())


def test_seed_and_repetition(hard):
    first, again = (create_detector("linear_probe", seed=1).fit(hard) for _ in range(2))
    assert torch.equal(first.state["weight"], again.state["weight"])
    assert torch.equal(hold_out(hard.labels, 1), hold_out(hard.labels, 1))
    assert not torch.equal(hold_out(hard.labels, 1), hold_out(hard.labels, 2))
    assert create_detector("linear_probe", l2=0.5).fit(hard).state["l2"] == 0.5


def test_held_out_classes_keep_an_image_to_learn_from():
    labels = torch.tensor([0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3])
    held = hold_out(labels, 0)
    assert [int(held[labels == label].sum()) for label in range(4)] == [0, 1, 1, 2]


def test_one_image_per_class(clustered, caplog):
    part = clustered()[[0, 40, 80]]
    probe = create_detector("linear_probe").fit(part)
    assert "No class has a second image" in caplog.text
    assert probe.predict(part).tolist() == [0, 1, 2]
    assert (probe.predict(clustered(1)) == clustered(1).labels).float().mean() > 0.9
    mixed = create_detector("linear_probe").fit(clustered()[[0, 40, *range(80, 100)]])
    assert mixed.predict(part).tolist() == [0, 1, 2]


def test_classes_without_an_image_are_left_out(clustered, caplog):
    part = clustered()[clustered().labels != 1]
    probe = create_detector("linear_probe", class_names=["c", "b", "a"]).fit(part)
    assert probe.class_names == ["c", "a"]
    assert "1 classes have no image" in caplog.text
    assert probe.logits(part).shape == (80, 2)
    assert (probe.predict(part) == (part.labels == 0)).all()


def test_sets_that_cannot_be_learned_from(clustered):
    part = clustered()
    probe = create_detector("linear_probe")
    with pytest.raises(DataError, match="at least two classes; the images are all 'b'"):
        probe.fit(part[part.labels == 1])
    with pytest.raises(DataError, match="All 120 training features are the same"):
        probe.fit(replace(part, image=torch.ones(120, 10)))
    with pytest.raises(DataError, match="NaN or infinite values for 2 of 120 images"):
        probe.fit(replace(part, image=part.image.clone().index_fill_(0, torch.tensor([3, 9]), float("nan"))))
    with pytest.raises(DataError, match="no labels"):
        probe.fit(replace(part, labels=None))
    with pytest.raises(NotFittedError, match="'linear_probe' has not been fitted"):
        probe.score_features(part)
    with pytest.raises(ValueError, match="scorer='entropy' must be one of 'msp'"):
        create_detector("linear_probe", scorer="entropy")
    with pytest.raises(ValueError, match="l2=0"):
        create_detector("linear_probe", l2=0)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\)"):
        fit_logistic(part.image, part.labels, 2, l2=0.1)


def test_another_scorer_keeps_the_fit_another_penalty_does_not(hard, tmp_path):
    probe = create_detector("linear_probe", l2=1e-3).fit(hard)
    before = probe.score_features(hard)
    assert not torch.equal(probe.set_params(scorer="gen").score_features(hard), before)
    probe.save_pretrained(tmp_path)
    loaded = Detector.from_pretrained(tmp_path)
    assert torch.equal(loaded.score_features(hard), probe.score_features(hard))
    assert loaded.get_params() == {"scorer": "gen", "l2": 1e-3, "seed": 0}
    with pytest.raises(NotFittedError):
        probe.set_params(l2=1e-2).score_features(hard)


def test_an_optimiser_that_stops_early_says_so(hard, monkeypatch, caplog):
    import scipy.optimize

    minimize = scipy.optimize.minimize
    monkeypatch.setattr(
        scipy.optimize, "minimize", lambda *a, options, **k: minimize(*a, options={**options, "maxiter": 1}, **k)
    )
    with caplog.at_level(logging.WARNING):
        fit_logistic(hard.image, hard.labels, 3, l2=1e-5)
    assert "l2=1e-05 stopped early" in caplog.text
