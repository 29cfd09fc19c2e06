"""Prompts: templates, class names from files, and the texts they become."""

import pytest
import torch
import torch.nn.functional as F
from ood_core.errors import DataError, MissingDataError, UsageError
from ood_core.prompts import fill, imagenet_names, read_class_names, resolve_templates, text_features


def test_names_fill_templates_and_underscores_become_spaces():
    assert fill("a photo of a {}", "great_white shark") == "a photo of a great white shark"
    assert resolve_templates("photo") == ["a photo of a {}"]
    assert len(resolve_templates("imagenet")) == 80
    assert len(resolve_templates("simple")) == 7
    assert all(template.count("{}") == 1 for name in ("imagenet", "simple") for template in resolve_templates(name))


def test_class_names_come_from_a_file_or_the_built_in_list(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffcat\r\n\n  tree frog \n".encode())
    assert read_class_names(path) == ["cat", "tree frog"]
    names = imagenet_names()
    assert len(names) == 1000
    assert names[0] == "tench"
    assert read_class_names("imagenet") == names
    path.write_text("\n")
    with pytest.raises(DataError, match="no class name"):
        read_class_names(path)
    with pytest.raises(MissingDataError, match=r"none\.txt"):
        read_class_names(tmp_path / "none.txt")


def test_an_ensemble_is_the_normalised_mean(small_backbone):
    templates = ["{}", "a {}.", "the big {}"]
    together = text_features(small_backbone, ["cat", "dog"], templates)
    each = [small_backbone.encode_text([t.format(n) for n in ("cat", "dog")]) for t in templates]
    torch.testing.assert_close(together, F.normalize(torch.stack(each).mean(0), dim=-1))
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(2))


def test_mistakes_are_named(small_backbone):
    with pytest.raises(UsageError, match="no braces"):
        resolve_templates("no braces")
    with pytest.raises(UsageError, match=r"must hold \{\} once"):
        resolve_templates(["{} and {}"])
    with pytest.raises(UsageError, match="empty"):
        resolve_templates([])
    with pytest.raises(ValueError, match="Class name 1 of 2 is empty"):
        text_features(small_backbone, ["cat", " "], "a {}")


LONG = "a very long name of a class that goes on and on until the text tower has read all that it reads " * 2


def test_a_class_whose_prompt_is_cut_is_named(small_backbone, caplog):
    limit = small_backbone.context_length
    assert small_backbone.cut_texts(["a dog", "a " * limit]) == [1]
    text_features(small_backbone, ["cat", LONG.replace(" ", "_")], "a photo of a {}")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert repr(LONG.replace(" ", "_")) in said[0]
    assert "cut" in said[0]
    caplog.clear()
    small_backbone.encode_text(["cat", LONG])
    small_backbone.encode_text(["cat", LONG, "dog"])
    assert all(LONG in record.getMessage() for record in caplog.records)
    assert caplog.records


def test_prompts_that_fit_exactly_are_not_cut(small_backbone, caplog):
    tokenizer, limit = small_backbone.tokenizer, small_backbone.context_length - 2
    words = next(text for n in range(limit, 0, -1) if len(tokenizer.encode(text := "a " * n)) <= limit)
    text = words + "a" * (limit - len(tokenizer.encode(words)))
    assert small_backbone.cut_texts([text, f"{text} b c d"]) == [1]
    small_backbone.encode_text([text])
    assert not caplog.records


@pytest.mark.parametrize(
    ("names", "template"),
    [
        ([LONG + "one", "cat", LONG + "two"], "a photo of a {}"),
        (["Dog", "cat", "dog"], "a photo of a {}"),
        (["sea_lion", "cat", "sea lion"], ["{}", "a {}"]),
        (["dog", "cat", "bird"], LONG + "{}"),
    ],
)
def test_different_names_with_the_same_vector_are_refused(small_backbone, names, template):
    with pytest.raises(UsageError, match="cannot tell the classes"):
        text_features(small_backbone, names, template)


def test_names_that_only_one_template_tells_apart_are_fine(small_backbone):
    features = text_features(small_backbone, ["dog", "cat"], [LONG + "{}", "{}"])
    assert not torch.equal(features[0], features[1])


def test_the_imagenet_names_are_all_different():
    import open_clip

    names = imagenet_names()
    assert len(set(names)) == 1000
    changed = {name: other for name, other in zip(open_clip.IMAGENET_CLASSNAMES, names, strict=True) if name != other}
    assert changed == {"missile": "projectile", "sunglasses": "sunglass"}
