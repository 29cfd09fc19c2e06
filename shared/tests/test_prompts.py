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
