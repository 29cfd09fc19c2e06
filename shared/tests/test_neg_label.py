"""NegLabel: the score against plain loops, the selection against numpy, the word lists, and the detector."""

import csv
import doctest
import gzip
import json
import math
from pathlib import Path

import numpy as np
import ood_core
import ood_core.detectors.neg_label
import pytest
import torch
import torch.nn.functional as F
from ood_core import create_backbone, create_detector
from ood_core.data import scenes
from ood_core.detectors.base import Detector
from ood_core.detectors.neg_label import NegLabel, neg_label, select_negatives
from ood_core.errors import DataError, MissingDataError, NotFittedError, UsageError
from ood_core.features import FeatureSet
from ood_core.words import read_words

WORDNET = Path(ood_core.__file__).parent / "wordnet"
CLASSES = ["Striped_Star", "entity", "brick square"]
OPTIONS = {"max_words": 200, "groups": 8, "logit_scale": 30.0}


def unit(*shape, seed=0, dtype=torch.float64):
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(made, dim=-1).to(dtype)


def by_loops(image, text, negatives, scale, groups):
    """The score one image, group and word at a time."""
    size = len(negatives) // groups
    scores = []
    for x in image.tolist():
        shares = []
        for g in range(groups):
            known = sum(math.exp(scale * np.dot(x, t)) for t in text.tolist())
            others = sum(math.exp(scale * np.dot(x, t)) for t in negatives[g * size : (g + 1) * size].tolist())
            shares.append(known / (known + others))
        scores.append(sum(shares) / groups)
    return torch.tensor(scores, dtype=torch.float64)


def rows_of(name):
    with gzip.open(WORDNET / f"{name}.csv.gz", "rt", encoding="utf-8") as table:
        return [(int(row["lexfile"]), row["lemmas"].lower().split("|")[:1]) for row in csv.DictReader(table)]


@pytest.fixture(scope="module")
def backbone():
    return create_backbone("tiny")


@pytest.fixture(scope="module")
def features():
    return FeatureSet(ids=list("abcdef"), image=unit(6, 192, seed=9, dtype=torch.float32))


def make(backbone, **options):
    return create_detector("neg_label", backbone=backbone, class_names=CLASSES, **OPTIONS | options)


@pytest.fixture(scope="module")
def shared(backbone):
    """For tests that change nothing."""
    return make(backbone)


class TestScore:
    @pytest.mark.parametrize(("negatives", "groups"), [(12, 1), (12, 3), (12, 12), (13, 4), (7, 4), (1, 1)], ids=str)
    @pytest.mark.parametrize(("logit_scale", "temperature"), [(100.0, 1.0), (15.0, 1.0), (100, 7)], ids=str)
    def test_equals_plain_loops(self, negatives, groups, logit_scale, temperature):
        image, text, negatives = unit(5, 6), unit(3, 6, seed=1), unit(negatives, 6, seed=2)
        expected = by_loops(image, text, negatives, logit_scale / temperature, groups)
        options = {"logit_scale": logit_scale, "temperature": temperature, "groups": groups}
        found = neg_label(image, text, negatives, **options)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)
        single = neg_label(image.float(), text.float(), negatives.float(), **options)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), expected, rtol=1e-3, atol=1e-6)

    def test_defaults_are_the_released_codes(self):
        image, text, negatives = unit(4, 8), unit(3, 8, seed=1), unit(230, 8, seed=2)
        torch.testing.assert_close(neg_label(image, text, negatives), by_loops(image, text, negatives, 100.0, 100))

    def test_the_remainder_counts_in_no_group(self):
        image, text, negatives = unit(4, 8), unit(3, 8, seed=1), unit(11, 8, seed=2)
        dropped = neg_label(image, text, negatives, groups=4)
        assert torch.equal(dropped, neg_label(image, text, negatives[:8], groups=4))
        assert not torch.equal(dropped, neg_label(image, text, negatives[3:], groups=4))

    def test_lies_above_zero_and_at_most_at_one(self):
        scores = neg_label(unit(50, 5), unit(4, 5, seed=1), unit(60, 5, seed=2), groups=6)
        assert 0 < scores.min() < 0.1
        assert 0.9 < scores.max() <= 1

    def test_another_negative_never_raises_it(self):
        image, text, negatives = unit(9, 5), unit(4, 5, seed=1), unit(40, 5, seed=2)
        scores = torch.stack([neg_label(image, text, negatives[:m], groups=1) for m in range(1, 41)])
        assert scores.diff(dim=0).max() <= 1e-15
        assert (scores[-1] < scores[0]).all()

    def test_order_of_classes_and_within_groups_is_nothing(self):
        image, text, negatives = unit(9, 5), unit(4, 5, seed=1), unit(12, 5, seed=2)
        scores = neg_label(image, text, negatives, groups=3)
        torch.testing.assert_close(neg_label(image, text[[2, 0, 3, 1]], negatives, groups=3), scores)
        inside = negatives.view(3, 4, 5)[[2, 0, 1]].flip(1).reshape(12, 5)
        torch.testing.assert_close(neg_label(image, text, inside, groups=3), scores)
        assert not torch.allclose(neg_label(image, text, negatives.view(3, 4, 5).mT.reshape(12, 5), groups=3), scores)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize(
        "options", [{"logit_scale": 1e300}, {"temperature": 1e-300}, {"logit_scale": 1e30}], ids=str
    )
    def test_a_huge_scale_counts_the_groups_won(self, dtype, options):
        image, text, negatives = unit(7, 5), unit(3, 5, seed=1), unit(8, 5, seed=2)
        best = (image @ text.T).amax(1, keepdim=True)
        won = best > (image @ negatives.T).view(7, 4, 2).amax(2)
        found = neg_label(image.to(dtype), text.to(dtype), negatives.to(dtype), groups=4, **options)
        assert torch.equal(found, won.to(dtype).mean(1))

    def test_equal_features_share_by_number(self):
        one = torch.ones(1, 1, dtype=torch.float64)
        assert neg_label(one, one.expand(3, 1), one.expand(10, 1), groups=2).item() == pytest.approx(3 / 8)

    def test_half_precision_is_computed_in_single(self):
        image, text, negatives = (unit(n, 6, seed=n, dtype=torch.float16) for n in (5, 3, 12))
        found = neg_label(image, text, negatives, groups=2)
        assert found.dtype == torch.float32
        assert torch.equal(found, neg_label(image.float(), text.float(), negatives.float(), groups=2))

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"groups": 9}, ValueError, r"groups=9 is outside \[1, 8\] \(1 to the number of negatives\)"),
            ({"groups": 0}, ValueError, "groups=0"),
            ({"groups": 2.0}, TypeError, r"groups must be an integer, got 2\.0"),
            ({"logit_scale": 0}, ValueError, "logit_scale=0"),
            ({"logit_scale": float("inf")}, ValueError, "logit_scale=inf"),
            ({"temperature": -1.0}, ValueError, r"temperature=-1\.0"),
            ({"temperature": "1"}, TypeError, "temperature must be a number, got '1'"),
            ({"image": unit(2, 4)}, ValueError, r"text has shape \[3, 5\], but d is 4 in image"),
            ({"negatives": unit(8, 5)[:0]}, ValueError, "negatives is empty"),
            ({"negatives": torch.full((8, 5), math.nan)}, ValueError, "negatives holds NaN"),
            ({"text": [[1.0]]}, TypeError, "text must be a torch.Tensor"),
        ],
        ids=str,
    )
    def test_bad_input(self, change, error, words):
        given = {"image": unit(2, 5), "text": unit(3, 5), "negatives": unit(8, 5), "groups": 2} | change
        with pytest.raises(error, match=words):
            neg_label(**given)


class TestSelection:
    @pytest.mark.parametrize(("candidates", "classes"), [(200, 30), (37, 1), (9, 4)], ids=str)
    @pytest.mark.parametrize(("share", "quantile"), [(0.15, 0.95), (0.5, 0.5), (1, 1), (1.0, 0)], ids=str)
    def test_equals_numpy(self, candidates, classes, share, quantile):
        words, text = unit(candidates, 6), unit(classes, 6, seed=1)
        nearness = np.quantile(words.numpy() @ text.numpy().T, quantile, axis=1)
        expected = np.argsort(nearness, kind="stable")[: int(candidates * share)]
        found = select_negatives(words, text, share=share, quantile=quantile)
        assert found.dtype == torch.int64
        assert found.tolist() == expected.tolist()

    def test_defaults_are_the_released_codes(self):
        words, text = unit(60, 6), unit(30, 6, seed=1)
        expected = np.argsort(np.quantile(words.numpy() @ text.numpy().T, 0.95, axis=1))[:9]
        assert select_negatives(words, text).tolist() == expected.tolist()

    def test_ties_keep_the_earlier(self):
        # Cosines with the one class: 1, 0, -1, 0, 0, 1, 0.
        words = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1], [0, 1], [1, 0], [0, 1]])
        text = torch.tensor([[1.0, 0]])
        assert select_negatives(words, text, share=0.6).tolist() == [2, 1, 3, 4]
        assert select_negatives(words, text, share=1).tolist() == [2, 1, 3, 4, 6, 0, 5]

    def test_chunks_change_nothing(self, monkeypatch):
        words, text = unit(101, 6), unit(7, 6, seed=1)
        whole = select_negatives(words, text, share=1)
        for cosines in (1, 70, 700):
            monkeypatch.setattr(ood_core.detectors.neg_label, "_COSINES", cosines)
            assert torch.equal(select_negatives(words, text, share=1), whole)

    def test_one_near_class_of_many_is_overlooked(self):
        text = F.one_hot(torch.arange(40), 41).double()
        words = F.one_hot(torch.tensor([3, 40]), 41).double()  # the fourth class itself, and no class
        assert select_negatives(words, text, share=1).tolist() == [0, 1]  # a tie: 39 of 40 cosines are 0
        assert select_negatives(words, text, share=1, quantile=1).tolist() == [1, 0]

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"share": 0}, ValueError, "share=0"),
            ({"share": 1.5}, ValueError, r"share=1\.5 must be at most 1"),
            ({"share": "half"}, TypeError, "share must be a number, got 'half'"),
            ({"share": 0.05}, ValueError, r"share=0\.05 of 8 candidates keeps none: raise share"),
            ({"quantile": -0.1}, ValueError, r"quantile=-0\.1"),
            ({"quantile": 95}, ValueError, "quantile=95 must be at most 1"),
            ({"quantile": None}, TypeError, "quantile must be a number, got None"),
            ({"text": unit(3, 4)}, ValueError, r"text has shape \[3, 4\], but d is 5"),
            ({"candidates": torch.ones(8, 5, dtype=torch.int64)}, TypeError, "candidates must be floating point"),
        ],
        ids=str,
    )
    def test_bad_input(self, change, error, words):
        with pytest.raises(error, match=words):
            select_negatives(**{"candidates": unit(8, 5), "text": unit(3, 5), "share": 0.5} | change)


class TestWords:
    @pytest.mark.parametrize(
        ("name", "exclude", "numbers"),
        [
            ("nouns", (), set()),
            ("nouns", ("noun.animal", "noun.food"), {5, 13}),
            ("nouns", [5, "noun.food"], {5, 13}),
            ("nouns", ("noun.Tops", "noun.time"), {3, 28}),
            ("adjectives", ("noun.animal",), set()),
            ("adjectives", ("adj.pert",), {1}),
        ],
    )
    def test_the_first_lemmas_of_the_other_files_once(self, name, exclude, numbers):
        words = read_words(name, exclude)
        expected = list(dict.fromkeys(lemma for file, row in rows_of(name) if file not in numbers for lemma in row))
        assert [word.lower() for word in words] == expected  # in file order
        assert len(words) > (50_000 if name == "nouns" else 10_000)
        assert not [word for word in words if "_" in word or word != word.strip() or not word]

    def test_numbers_of_the_lexicographer_files(self):
        # A word of each of some files and of no other.
        only = {
            "noun.animal": "axolotl",
            "noun.food": "guacamole",
            "noun.plant": "ragwort",
            "noun.person": "shopkeeper",
        }
        assert set(only.values()) <= set(read_words("nouns"))
        assert not set(only.values()) & set(read_words("nouns", list(only)))

    def test_a_word_with_another_meaning_stays(self):
        assert "turkey" in [word.lower() for word in read_words("nouns", ("noun.animal", "noun.food"))]

    def test_a_file_of_words(self, tmp_path):
        file = tmp_path / "words.txt"
        file.write_text("\ufeff fire_engine\n\nPear \npear\nfire  engine\nä_b", encoding="utf-8")
        assert read_words(file) == read_words(str(file), ["noun.food"]) == ["fire engine", "Pear", "ä b"]

    def test_bad_input(self, tmp_path):
        for name, content in (("empty", b""), ("blank", b"\n _ \n"), ("binary", b"\xff\xfe\x00")):
            (tmp_path / name).write_bytes(content)
        for name, error, words in (
            (tmp_path / "empty", DataError, "empty holds no word"),
            (tmp_path / "blank", DataError, "blank holds no word"),
            (tmp_path / "binary", DataError, "binary is no UTF-8 text"),
            (tmp_path / "absent", MissingDataError, "No word file .*absent: give 'nouns'"),
            (tmp_path, MissingDataError, "No word file"),
            ("noun", MissingDataError, "No word file noun: give 'nouns'"),
        ):
            with pytest.raises(error, match=words):
                read_words(name)

    @pytest.mark.parametrize(
        ("exclude", "error", "words"),
        [
            ("noun.food", TypeError, r"must be a list such as \['noun.food'\], got the string 'noun.food'"),
            (["noun.foods"], UsageError, "Unknown lexicographer file 'noun.foods'. Did you mean 'noun.food'"),
            ([2], UsageError, "Unknown lexicographer file '2'"),
            ([True], UsageError, "Unknown lexicographer file 'True'"),
            ([0, 1, 44], DataError, r"adjectives holds no word outside exclude=\[0, 1, 44\]"),
        ],
    )
    def test_bad_exclusions(self, exclude, error, words):
        with pytest.raises(error, match=words):
            read_words("adjectives", exclude)

    def test_the_notice_is_shipped(self):
        assert "Princeton University" in (WORDNET / "LICENSE").read_text(encoding="utf-8")


class TestDetector:
    def test_negatives_are_the_farthest_words_of_each_list(self, shared, backbone):
        words, text = shared.negative_words, shared.state["text"]
        assert torch.equal(
            text, backbone.encode_text(["the nice Striped Star", "the nice entity", "the nice brick square"])
        )
        # 30 of 200 per list, 60 in all, of which the last 4 do not fill the 8 groups; then the permutation.
        assert len(words) == len(set(words)) == 56
        order = torch.randperm(56, generator=torch.Generator().manual_seed(0))
        words = [words[i] for i in order.argsort().tolist()]
        features = shared.state["negatives"][order.argsort()]
        known = {"striped star", "entity", "brick square"}
        for name, part, template in (
            ("nouns", slice(0, 30), "the nice {}"),
            ("adjectives", slice(30, 56), "This is a {} photo"),
        ):
            every = [word for word in read_words(name, (5, 13)) if word.lower() not in known]
            known |= {word.lower() for word in every}  # a word is a candidate of one list only
            spread = [every[i * len(every) // 200] for i in range(200)]
            encoded = backbone.encode_text([template.format(word) for word in spread])
            nearness = dict(zip(spread, np.quantile((encoded @ text.T).numpy(), 0.95, axis=1), strict=True))
            found = [nearness[word] for word in words[part]]
            np.testing.assert_allclose(found, np.sort(list(nearness.values()))[: len(found)], rtol=0, atol=1e-6)
            rows = [spread.index(word) for word in words[part]]
            torch.testing.assert_close(features[part], encoded[rows], rtol=0, atol=1e-5)

    def test_scores_are_the_functions(self, shared, features):
        text, negatives = shared.state["text"], shared.state["negatives"]
        expected = neg_label(features.image, text, negatives, logit_scale=30, groups=8)
        scores = shared.score_features(features)
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, expected)
        assert shared.needs == {"image"}
        assert torch.equal(shared.predict(features), (features.image @ text.T).argmax(1))

    def test_images_are_scored(self, shared, backbone, tmp_path):
        folder = scenes.write_folder(scenes.render(["striped star"], 3, size=64), tmp_path)
        scores = shared.score(folder)
        assert scores.shape == (3,)
        assert 0 < scores.min() <= scores.max() < 1

    def test_the_backbones_own_scale_is_the_default(self, backbone, features):
        made = make(backbone, logit_scale=None)
        text, negatives = made.state["text"], made.state["negatives"]
        own = neg_label(features.image, text, negatives, logit_scale=backbone.logit_scale, groups=8)
        torch.testing.assert_close(made.score_features(features), own)
        given = made.set_params(logit_scale=3.0, temperature=2.0).score_features(features)
        torch.testing.assert_close(given, neg_label(features.image, text, negatives, logit_scale=1.5, groups=8))
        assert made.state["negatives"] is negatives  # nothing was encoded again
        torch.testing.assert_close(made.set_params(logit_scale=None, temperature=1.0).score_features(features), own)

    def test_options_that_the_negatives_depend_on_mine_again(self, backbone, features, tmp_path):
        made = make(backbone, max_words=100)
        for change, count in (
            ({"seed": 1}, 24),
            ({"groups": 5}, 30),
            ({"share": 0.2}, 40),
            ({"max_words": 60}, 20),
            ({"exclude": ["noun.plant"]}, 20),
            ({"words": ["adjectives"]}, 10),
        ):
            before = made.negative_words
            made.set_params(**change)
            assert made.negative_words != before, change
            assert len(made.negative_words) == len(made.state["negatives"]) == count
            fresh = NegLabel(class_names=CLASSES, **made.get_params())
            fresh.attach(backbone)
            assert fresh.negative_words == made.negative_words
            torch.testing.assert_close(made.score_features(features), fresh.score_features(features))

    def test_a_new_seed_only_deals_anew(self, shared, backbone):
        other = make(backbone, seed=3)
        assert other.negative_words != shared.negative_words
        assert set(other.negative_words) == set(shared.negative_words)

    def test_saving_and_loading(self, shared, backbone, features, tmp_path):
        shared.save_pretrained(tmp_path)
        loaded = Detector.from_pretrained(tmp_path)
        assert type(loaded) is NegLabel
        assert loaded.get_params() == shared.get_params()
        assert torch.equal(loaded.score_features(features), shared.score_features(features))
        assert loaded.negative_words == shared.negative_words
        assert (tmp_path / "negatives.txt").read_text(encoding="utf-8").splitlines() == shared.negative_words
        attached = Detector.from_pretrained(tmp_path, backbone=backbone)
        assert torch.equal(attached.state["negatives"], shared.state["negatives"])  # loaded, not mined
        (tmp_path / "negatives.txt").unlink()
        assert torch.equal(Detector.from_pretrained(tmp_path).score_features(features), shared.score_features(features))

    def test_a_users_words(self, backbone, tmp_path):
        file = tmp_path / "mine.txt"
        file.write_text("STRIPED star\nlorry\nbrick_square\nteapot\n", encoding="utf-8")
        made = make(backbone, words=[file], groups=1, share=1)
        assert sorted(made.negative_words) == ["lorry", "teapot"]  # class names left out
        encoded = backbone.encode_text([f"the nice {word}" for word in made.negative_words])
        torch.testing.assert_close(made.state["negatives"], encoded)
        assert json.loads(json.dumps(made.get_params()))["words"] == [str(file)]

    def test_class_names_are_no_negatives(self, backbone):
        names = ["aBLE", "unable"]
        made = create_detector(
            "neg_label", backbone=backbone, class_names=names, words=["adjectives"], share=1, max_words=5, groups=1
        )
        every = read_words("adjectives")[2:]
        assert sorted(made.negative_words) == sorted(every[i * len(every) // 5] for i in range(5))
        assert every[0] in made.negative_words

    def test_progress_is_logged(self, backbone, caplog):
        caplog.set_level("INFO", logger="ood_core.detectors.neg_label")
        make(backbone, max_words=60, words=["nouns"])
        assert caplog.messages == ["neg_label: 60 of 60 prompts of nouns encoded."]

    def test_without_a_backbone_it_says_what_is_missing(self, features):
        with pytest.raises(NotFittedError, match="backbone= and class_names="):
            NegLabel(class_names=CLASSES).score_features(features)

    def test_demo_options_are_options(self):
        made = NegLabel(class_names=CLASSES, **NegLabel.demo_options)
        assert made.get_params() | NegLabel.demo_options == made.get_params()
        assert NegLabel.fit_options <= set(made.get_params())

    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            ({"words": "nouns"}, TypeError, r"got 'nouns': write \['nouns'\]"),
            ({"words": Path("a.txt")}, TypeError, r"got 'a.txt': write \['a.txt'\]"),
            ({"words": []}, UsageError, r"words=\[\] leaves no candidates"),
            ({"words": ["no_such.txt"]}, MissingDataError, "No word file no_such.txt"),
            ({"exclude": "noun.food"}, TypeError, "exclude must be a list"),
            ({"exclude": ["noun.dog"]}, UsageError, "Unknown lexicographer file 'noun.dog'"),
            ({"groups": 61}, UsageError, r"groups=61 is more than the 60 negatives that share=0\.15 .* lower groups"),
            ({"groups": 0}, ValueError, "groups=0"),
            ({"max_words": 0}, ValueError, "max_words=0"),
            ({"max_words": 6}, ValueError, r"share=0\.15 of 6 candidates keeps none"),
            ({"share": 2}, ValueError, "share=2 must be at most 1"),
            ({"seed": -1}, ValueError, "seed=-1"),
            ({"logit_scale": 0.0}, ValueError, r"logit_scale=0\.0"),
            ({"temperature": 0}, ValueError, "temperature=0"),
        ],
        ids=str,
    )
    def test_bad_options(self, backbone, options, error, words):
        with pytest.raises(error, match=words):
            make(backbone, **options)

    def test_bad_words_and_classes(self, backbone, tmp_path):
        file = tmp_path / "mine.txt"
        file.write_text("Entity\nbrick_square\n")
        with pytest.raises(DataError, match=r"Every word of .*mine.txt is a class name"):
            make(backbone, words=[file])
        with pytest.raises(UsageError, match="class_names="):
            create_detector("neg_label", backbone=backbone)


def test_clear_cases_are_told_apart_by_what_remains_to_1(backbone):
    detector = make(backbone, logit_scale=1000.0)
    generator = torch.Generator().manual_seed(0)
    text, negatives = detector.state["text"], detector.state["negatives"]
    image = F.normalize(text[torch.arange(40) % len(text)] + 0.02 * torch.randn(40, 1, generator=generator), dim=-1)
    found = detector.score_features(FeatureSet(ids=[str(i) for i in range(40)], image=image))
    plain = neg_label(image, text, negatives, logit_scale=1000.0, groups=detector.groups)
    groups = (1000 * image.double() @ negatives.double().T)[:, : len(negatives) // detector.groups * detector.groups]
    odds = (1000 * image.double() @ text.double().T).logsumexp(1, keepdim=True)
    odds = odds - groups.unflatten(1, (detector.groups, -1)).logsumexp(2)
    remaining = F.logsigmoid(-odds).logsumexp(1) - math.log(detector.groups)
    assert plain.unique().numel() < found.unique().numel()
    order = remaining.argsort(descending=True)
    assert (found[order].diff() >= -1e-6).all()
    ordinary = remaining > math.log(2**-10)
    torch.testing.assert_close(found[ordinary], plain[ordinary])


def test_examples_of_the_docstrings():
    result = doctest.testmod(ood_core.detectors.neg_label, verbose=False)
    assert result.attempted
    assert not result.failed
