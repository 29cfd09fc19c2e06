"""Edits: what they change, that they can be undone, stored and found again, and the released code's lists."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from ood_core import create_backbone, create_detector
from ood_core.detectors.base import Detector
from ood_core.errors import DataError, MissingDataError, UsageError
from ood_setar.edit import SeTAREdit, draw
from ood_setar.functional import dropped_rank, split_low_rank, truncate
from ood_setar.search import search, visiting_order
from safetensors.torch import load_file, save_file

REPLAY = json.loads((Path(__file__).parent / "golden" / "setar_replay.json").read_text())
RATIOS = {"visual.1.up": 0.25, "visual.0.query": 0.4, "text.1.down": 0.1, "text.0.value": 0.0, "text.projection": 0.2}
TEXTS = ["a photo of a cat", "an eel"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def clip(make):
    """In float32, so that encodings show every bit."""
    backbone = make.clip()
    backbone.model.float()
    return type(backbone)(backbone.model, backbone.tokenizer, backbone.transform, spec="small-clip")


@pytest.fixture(scope="module")
def tiny():
    return create_backbone("tiny", dtype="float32")


def edit_of(backbone, ratios=RATIOS, **options):
    return SeTAREdit(dict(ratios), backbone.fingerprint, **options)


def weights(backbone):
    return {name: value.clone() for name, value in backbone.model.state_dict().items()}


def differing(before, after):
    return sorted(name for name, value in before.items() if not torch.equal(value, after[name]))


def encodings(backbone):
    x = torch.randn(3, 3, *backbone.transform.crop, generator=torch.Generator().manual_seed(0))
    return [*backbone.encode_dense(x), backbone.encode_text(TEXTS)]


def equal(first, second):
    return all(map(torch.equal, first, second))


def adapters(backbone, names=("visual.1.up", "text.0.value"), rank=2):
    generator = torch.Generator().manual_seed(7)
    shapes = {name: backbone.linear(name).weight.shape for name in names}
    return {
        name: (0.1 * torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator))
        for name, (rows, columns) in shapes.items()
    }


# ---- applying


@pytest.mark.parametrize("drop", ["minor", "principal", "random"])
def test_apply_makes_a_new_backbone_with_truncated_weights(clip, drop):
    before, fingerprint, vanilla = weights(clip), clip.fingerprint, encodings(clip)
    edited = edit_of(clip, drop=drop, seed=3).apply(clip)
    assert edited is not clip
    assert edited.model is not clip.model
    assert not differing(before, weights(clip))
    assert (clip.fingerprint, clip.spec) == (fingerprint, "small-clip")
    assert edited.fingerprint != fingerprint
    assert edited.spec == "small-clip+edit:unsaved"
    for name, ratio in RATIOS.items():
        original = clip.linear(name).weight
        expected = truncate(original, ratio, drop=drop, generator=draw(3, name))
        assert torch.equal(edited.linear(name).weight, expected)
        assert torch.linalg.matrix_rank(expected.double(), rtol=1e-5) == min(original.shape) - dropped_rank(
            original.shape, ratio
        )
    for name in set(clip.linears()) - set(RATIOS):
        assert torch.equal(edited.linear(name).weight, clip.linear(name).weight)
    assert equal(encodings(clip), vanilla)
    for ours, theirs in zip(encodings(edited), vanilla, strict=True):
        assert (ours - theirs).abs().max() > 1e-4


def test_random_drops_depend_on_the_seed_and_the_name_alone(clip):
    edits = [edit_of(clip, drop="random", seed=seed) for seed in (3, 3, 4)]
    torch.manual_seed(0)
    first = encodings(edits[0].apply(clip))
    torch.manual_seed(1)
    assert equal(first, encodings(edits[1].apply(clip)))
    assert not equal(first, encodings(edits[2].apply(clip)))
    alone = edit_of(clip, {"visual.0.query": 0.4}, drop="random", seed=3)
    assert torch.equal(
        alone.apply(clip).linear("visual.0.query").weight, edits[0].apply(clip).linear("visual.0.query").weight
    )


@pytest.mark.parametrize(
    ("seed", "name", "first"),
    [
        (5, "visual.11.up", [4, 7, 5, 0, 1, 3, 2, 6]),
        (5, "visual.10.up", [2, 4, 3, 7, 5, 0, 1, 6]),
        (6, "visual.11.up", [6, 5, 3, 1, 2, 7, 0, 4]),
    ],
)
def test_draws_stay_what_stored_edits_rely_on(seed, name, first):
    assert torch.randperm(8, generator=draw(seed, name)).tolist() == first


def test_candidates_of_a_random_drop_are_nested(clip):
    """A larger ratio drops what a smaller one drops, and more."""
    weight = clip.linear("visual.1.up").weight.double()
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)
    dropped = []
    for ratio in (0.1, 0.25, 0.4):
        found = truncate(weight, ratio, drop="random", generator=draw(5, "visual.1.up"))
        dropped.append(set((torch.einsum("or,oi,ri->r", u, found, vh).abs() < 1e-9).nonzero().flatten().tolist()))
    assert [len(one) for one in dropped] == [2, 6, 10]
    assert dropped[0] < dropped[1] < dropped[2]


@pytest.mark.parametrize("kind", ["query", "key", "value"])
def test_only_the_rows_of_a_fused_projection_change(clip, kind):
    edited = edit_of(clip, {f"visual.1.{kind}": 0.4}).apply(clip)
    before, after = (one.model.visual.transformer.resblocks[1].attn.in_proj_weight for one in (clip, edited))
    rows = {"query": slice(0, 24), "key": slice(24, 48), "value": slice(48, 72)}[kind]
    changed = (before != after).any(1)
    assert changed[rows].all()
    assert changed.sum() == 24
    assert differing(weights(clip), weights(edited)) == ["visual.transformer.resblocks.1.attn.in_proj_weight"]


def test_nothing_dropped_changes_no_bit(clip):
    ratios = dict.fromkeys(RATIOS, 0.0) | {"visual.0.up": 0.02}  # rounds to no singular value
    edit = edit_of(clip, ratios)
    edited = edit.apply(clip)
    assert not differing(weights(clip), weights(edited))
    assert edited.fingerprint == clip.fingerprint
    assert equal(encodings(edited), encodings(clip))
    with edit.applied(clip) as same:
        assert equal(encodings(same), encodings(edited))


class TestApplied:
    def test_edits_in_place_and_restores_every_bit(self, clip):
        before, fingerprint, vanilla = weights(clip), clip.fingerprint, encodings(clip)
        edit = edit_of(clip)
        expected = edit.apply(clip)
        with edit.applied(clip) as edited:
            assert edited is clip
            assert equal(encodings(clip), encodings(expected))
            assert clip.fingerprint == expected.fingerprint
            with pytest.raises(UsageError, match="edited already"), edit.applied(clip):
                pass
        assert not differing(before, weights(clip))
        assert clip.fingerprint == fingerprint
        assert equal(encodings(clip), vanilla)
        with edit.applied(clip):  # once more, from the start
            assert clip.fingerprint == expected.fingerprint

    def test_restores_after_an_exception(self, clip):
        before, fingerprint = weights(clip), clip.fingerprint

        def fail():
            with edit_of(clip).applied(clip):
                assert differing(before, weights(clip))
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert not differing(before, weights(clip))
        assert clip.fingerprint == fingerprint

    def test_a_weight_that_cannot_be_set_leaves_none_set(self, clip):
        before, fingerprint = weights(clip), clip.fingerprint
        wrong = {"text.1.down": (torch.full((20, 1), torch.inf), torch.ones(1, 80))}
        edit = edit_of(clip, factors=wrong)
        for use in (edit.apply, lambda backbone: edit.applied(backbone).__enter__()):
            with pytest.raises(ValueError, match=r"text\.1\.down holds NaN or infinite"):
                use(clip)
            assert not differing(before, weights(clip))
            assert clip.fingerprint == fingerprint


# ---- refusals


def test_a_backbone_it_was_not_made_for(make, clip):
    other = make.clip(seed=1)
    before = weights(other)
    edit = edit_of(clip)
    for use in (edit.apply, lambda backbone: edit.applied(backbone).__enter__()):
        with pytest.raises(UsageError, match=f"made for a backbone with fingerprint {clip.fingerprint[:12]}"):
            use(other)
    assert not differing(before, weights(other))
    assert not other.edits
    assert replace(edit, fingerprint="").apply(other).fingerprint != other.fingerprint  # unknown: taken on trust


def test_twice_is_refused(clip):
    edit = edit_of(clip)
    edited = edit.apply(clip)
    before = weights(edited)
    for again in (edit, replace(edit, fingerprint=edited.fingerprint), SeTAREdit({"text.0.up": 0.1})):
        for use in (again.apply, lambda backbone, again=again: again.applied(backbone).__enter__()):
            with pytest.raises(UsageError, match=r"small-clip\+edit:unsaved' is edited already \(text\.1\.down"):
                use(edited)
    assert not differing(before, weights(edited))


@pytest.mark.parametrize(
    ("ratios", "error", "words"),
    [
        ({"visual.0.up": 0.1, "visual.2.up": 0.1}, UsageError, r"Unknown weight 'visual\.2\.up'.*visual\.1\.up"),
        ({"visual.0.up": 0.1, "visual.1.up": 0.99}, ValueError, "drops all 24"),
        ({"visual.0.up": 0.1, "visual.1.up": 5.0}, ValueError, r"ratio=5\.0 is outside \[0, 1\)"),
        ({"visual.0.up": 0.1, "visual.1.up": -0.1}, ValueError, r"ratio=-0\.1"),
        ({"visual.0.up": 0.1, "visual.1.up": float("nan")}, ValueError, "ratio=nan"),
    ],
)
def test_weights_and_ratios_that_do_not_fit(clip, ratios, error, words):
    before = weights(clip)
    edit = edit_of(clip, ratios)
    for use in (edit.apply, lambda backbone: edit.applied(backbone).__enter__()):
        with pytest.raises(error, match=words):
            use(clip)
    assert not differing(before, weights(clip))


# ---- trained factors


def test_factors_are_added_to_the_truncated_weight(clip):
    factors = adapters(clip)
    for scale in (1.0, 0.25):
        edit = edit_of(clip, factors=factors, scale=scale)
        edited = edit.apply(clip)
        for name, ratio in RATIOS.items():
            expected = truncate(clip.linear(name).weight, ratio)
            if name in factors:
                b, a = factors[name]
                expected = expected + scale * b @ a
            torch.testing.assert_close(edited.linear(name).weight, expected, rtol=1e-6, atol=1e-6)
        assert not torch.equal(edited.linear("text.0.value").weight, clip.linear("text.0.value").weight)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("visual.1.up", ((96, 2), (3, 24))),
        ("visual.1.up", ((1, 2), (2, 24))),  # would be spread over all rows
        ("visual.1.up", ((96, 2), (2, 1))),
        ("visual.1.up", ((96,), (2, 24))),
        ("visual.0.down", ((24, 2), (2, 96))),  # no ratio
    ],
)
def test_factors_that_do_not_fit(clip, name, shapes):
    edit = edit_of(clip, factors={name: tuple(torch.ones(shape) for shape in shapes)})
    with pytest.raises(UsageError, match=rf"of {name} do not fit"):
        edit.apply(clip)


def test_factors_that_were_split_off_give_the_original_back(make):
    backbone = make.clip()
    names = [name for name in backbone.linears() if name.endswith(".up")]
    factors = {name: split_low_rank(backbone.linear(name).weight, 0.4)[1:] for name in names}
    edited = edit_of(backbone, dict.fromkeys(names, 0.4), factors=factors).apply(backbone)
    for name in names:
        torch.testing.assert_close(edited.linear(name).weight, backbone.linear(name).weight, rtol=0, atol=1e-12)


def test_factors_survive_storage(clip, tmp_path):
    factors = adapters(clip)
    b, a = factors["visual.1.up"]
    factors["visual.1.up"] = (b.T.contiguous().T, a.double())  # any layout and precision
    edit = edit_of(clip, factors=factors, scale=0.25)
    edit.save_pretrained(tmp_path)
    loaded = SeTAREdit.from_pretrained(tmp_path)
    assert loaded.scale == 0.25
    assert list(loaded.factors) == list(factors)
    for name, pair in factors.items():
        assert equal(loaded.factors[name], pair)
        assert [factor.dtype for factor in loaded.factors[name]] == [factor.dtype for factor in pair]
    assert equal(encodings(loaded.apply(clip)), encodings(edit.apply(clip)))


# ---- storage


@pytest.mark.parametrize("drop", ["minor", "random"])
def test_saved_loaded_applied_is_bit_identical(clip, tmp_path, drop):
    edit = edit_of(clip, drop=drop, seed=9, record={"why": "é", "steps": [{"before": None, "value": 0.1 + 0.2}]})
    assert edit.folder is None
    edit.save_pretrained(tmp_path / "new" / "edit")
    assert edit.folder == tmp_path / "new" / "edit"
    loaded = SeTAREdit.from_pretrained(tmp_path / "new" / "edit")
    assert asdict(loaded) == asdict(edit)
    assert list(loaded.ratios) == list(edit.ratios)
    first, second = edit.apply(clip), loaded.apply(clip)
    assert not differing(weights(first), weights(second))
    assert first.fingerprint == second.fingerprint
    assert equal(encodings(first), encodings(second))
    assert second.spec == f"small-clip+edit:{tmp_path / 'new' / 'edit'}"
    assert sorted(path.name for path in (tmp_path / "new" / "edit").iterdir()) == ["edit.json", "edit.safetensors"]


def test_a_search_is_stored_with_its_record(make, tmp_path):
    backbone = make.clip()
    edit = search(backbone, make.photos(["eel", "cat", "bee", "cat"]), ratios=(0.2, 0.4), order="visual_only")
    edit.save_pretrained(tmp_path)
    loaded = SeTAREdit.from_pretrained(tmp_path)
    assert loaded.record == edit.record
    assert [step["weight"] for step in loaded.record["steps"]] == ["visual.1.up", "visual.0.up"]
    assert loaded.apply(backbone).fingerprint == edit.apply(backbone).fingerprint


def test_ratios_keep_every_digit(clip, tmp_path):
    edit = edit_of(clip, {"visual.0.up": 1 / 3, "visual.1.up": 0.1 + 0.2})
    edit.save_pretrained(tmp_path)
    assert SeTAREdit.from_pretrained(tmp_path).ratios == {"visual.0.up": 1 / 3, "visual.1.up": 0.30000000000000004}


def test_saving_again_replaces(clip, tmp_path):
    edit_of(clip, factors=adapters(clip)).save_pretrained(tmp_path)
    edit_of(clip, {"visual.0.up": 0.1}).save_pretrained(tmp_path)
    loaded = SeTAREdit.from_pretrained(tmp_path)
    assert (loaded.ratios, loaded.factors) == ({"visual.0.up": 0.1}, {})


@pytest.mark.parametrize("name", ["edit.json", "edit.safetensors"])
def test_missing_files_are_named(clip, tmp_path, name):
    edit_of(clip).save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(MissingDataError, match=f"{name} is missing"):
        SeTAREdit.from_pretrained(tmp_path)
    with pytest.raises(MissingDataError, match="nowhere holds no saved edit"):
        SeTAREdit.from_pretrained(tmp_path / "nowhere")


def changed(**change):
    return lambda content: json.dumps(content | change)


def without(key):
    return lambda content: json.dumps({name: value for name, value in content.items() if name != key})


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: "",
        lambda content: json.dumps(content)[:-20],
        lambda content: "[1, 2]",
        lambda content: "null",
        without("ratios"),
        without("fingerprint"),
        without("factors"),
        changed(ratios=["visual.0.up"]),
        changed(ratios={"visual.0.up": "much"}),
        changed(ratios={"visual.0.up": None}),
        changed(ratios={"visual.0.up": 1.5}),
        changed(drop="small"),
        changed(factors=["visual.0.down"]),
        changed(factors=3),
    ],
)
def test_damaged_descriptions(clip, tmp_path, damage):
    edit_of(clip, factors=adapters(clip)).save_pretrained(tmp_path)
    path = tmp_path / "edit.json"
    path.write_text(damage(json.loads(path.read_text())))
    with pytest.raises(DataError, match="no readable edit"):
        SeTAREdit.from_pretrained(tmp_path)


def test_damaged_tensors(clip, tmp_path):
    edit_of(clip, factors=adapters(clip)).save_pretrained(tmp_path)
    path = tmp_path / "edit.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)
    for damaged in (b"", whole[: len(whole) // 2], b"\x00" * len(whole)):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="no readable edit"):
            SeTAREdit.from_pretrained(tmp_path)
    save_file({name: value for name, value in tensors.items() if name != "visual.1.up.A"}, path)
    with pytest.raises(DataError, match=r"visual\.1\.up\.A"):
        SeTAREdit.from_pretrained(tmp_path)


# ---- the released code's lists


def released_rows(name):
    return [[tower, "W_up", layer, ratio] for tower, layer, ratio in REPLAY[name]["ratios"]]


@pytest.mark.parametrize("name", REPLAY)
def test_the_published_searches_are_read_and_written(name, tmp_path):
    rows = released_rows(name)
    edit = SeTAREdit.from_released(rows, fingerprint="0123")
    assert edit.to_released() == rows
    assert (edit.fingerprint, edit.drop) == ("0123", "minor")
    assert list(edit.ratios.values()) == [ratio for _, _, ratio in REPLAY[name]["ratios"]]
    order = "visual_only" if "swin" in name else "visual_text"
    assert visiting_order(list(reversed(edit.ratios)), order=order) == list(edit.ratios)
    path = tmp_path / "config_best.json"
    for content in (rows, {"model_name": "x", "lora_settings": rows}):
        path.write_text(json.dumps(content))
        for given in (content, path, str(path)):
            assert SeTAREdit.from_released(given).ratios == edit.ratios


def test_names_of_the_released_code():
    rows = [
        ["visual", "W_q", 11, 0.1],
        ["visual", "W_k", 10, 0.1],
        ["text", "W_v", 9, 0.0],
        ["text", "W_o", 0, 0.25],
        ["visual", "W_up", [3, 1], 0.4],
        ["visual", "W_down", [2, 17], 0.05],
        ["text", "W_p", None, 0.3],
    ]
    edit = SeTAREdit.from_released(rows)
    assert edit.ratios == {
        "visual.11.query": 0.1,
        "visual.10.key": 0.1,
        "text.9.value": 0.0,
        "text.0.out": 0.25,
        "visual.3.1.up": 0.4,
        "visual.2.17.down": 0.05,
        "text.projection": 0.3,
    }
    assert edit.to_released() == rows


def test_a_released_list_is_applied_without_a_fingerprint(make, clip):
    edit = SeTAREdit.from_released([["visual", "W_up", 1, 0.25], ["text", "W_q", 0, 0.1]])
    edited = edit.apply(clip)
    assert torch.equal(edited.linear("visual.1.up").weight, truncate(clip.linear("visual.1.up").weight, 0.25))
    assert torch.equal(edited.linear("text.0.query").weight, truncate(clip.linear("text.0.query").weight, 0.1))
    swin = make.swin(2)
    edited = SeTAREdit.from_released([["visual", "W_up", [1, 0], 0.4]]).apply(swin)
    assert [
        name for name in swin.linears() if not torch.equal(edited.linear(name).weight, swin.linear(name).weight)
    ] == ["visual.1.0.up"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (["visual", "W_up", 11], "is no row"),
        (["visual", "W_up", 11, 0.1, 0.2], "is no row"),
        (["visual", "W_x", 11, 0.1], "weight of W_q, W_k"),
        (["visual", None, 11, 0.1], "is no row"),
        (["visual", "W_up", None, 0.1], "is no row"),
        (["visual", "W_up", "top", 0.1], "is no row"),
        (["visual", "W_up", [3, None], 0.1], "is no row"),
        (["visual", "W_up", 11.5, 0.1], "is no row"),
        (["visual", "W_up", 11, "much"], "is no row"),
        (["visual", "W_up", 11, None], "is no row"),
        (["visual", "W_up", 11, 38], "is no row"),
        (["visual", "W_up", 11, -0.1], "is no row"),
        (["audio", "W_up", 11, 0.1], "is no row"),
        ([3, "W_up", 11, 0.1], "is no row"),
        (7, "7 is no row"),
        (["visual", "W_up", 9, 0.2], r"visual\.9\.up.*twice"),
    ],
)
def test_bad_rows(row, words):
    rows = [["visual", "W_up", 10, 0.1], ["visual", "W_up", 9, 0.1]]
    with pytest.raises(DataError, match=words):
        SeTAREdit.from_released([*rows, row])


@pytest.mark.parametrize(
    "content", [[], {}, {"lora_settings": []}, {"lora_settings": "all"}, {"lora_settings": None}, 3]
)
def test_lists_without_rows(content, tmp_path):
    path = tmp_path / "config_best.json"
    path.write_text(json.dumps(content))
    for given in (content, path):
        with pytest.raises(DataError, match="no list 'lora_settings'"):
            SeTAREdit.from_released(given)


def test_lists_that_cannot_be_read(tmp_path):
    with pytest.raises(MissingDataError, match=r"config_best\.json"):
        SeTAREdit.from_released(tmp_path / "config_best.json")
    path = tmp_path / "config_best.json"
    for content in (b"{", b"\xff\xfe\x00"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="no JSON file"):
            SeTAREdit.from_released(path)


# ---- edited backbones by name


TINY = {"visual.3.up": 0.3, "visual.0.query": 0.1, "text.2.up": 0.2}


@pytest.fixture(scope="module")
def tiny_edit(tiny, tmp_path_factory):
    edit = edit_of(tiny, TINY)
    edit.save_pretrained(tmp_path_factory.mktemp("edits") / "tiny")
    return edit


def test_an_edited_backbone_is_created_by_its_name(tiny, tiny_edit):
    expected = tiny_edit.apply(tiny)
    assert expected.fingerprint != tiny.fingerprint
    for found in (
        create_backbone("tiny", dtype="float32", edit=str(tiny_edit.folder)),
        create_backbone(f"tiny+edit:{tiny_edit.folder}", dtype="float32"),
        create_backbone(expected.spec, dtype="float32"),
    ):
        assert found.fingerprint == expected.fingerprint
        assert found.spec == expected.spec == f"tiny+edit:{tiny_edit.folder}"
        assert equal(encodings(found), encodings(expected))
        assert not differing(weights(found), weights(expected))


def test_an_edit_is_made_before_the_precision_is_lowered(tiny, tiny_edit):
    half = create_backbone("tiny", dtype="bfloat16", edit=str(tiny_edit.folder))
    assert half.fingerprint == tiny_edit.apply(tiny).fingerprint
    expected = tiny_edit.apply(tiny).linear("visual.3.up").weight.bfloat16()
    assert torch.equal(half.linear("visual.3.up").weight, expected)


def test_edits_that_cannot_be_found_or_are_of_another_backbone(clip, tmp_path):
    with pytest.raises(MissingDataError, match="nowhere holds no saved edit"):
        create_backbone(f"tiny+edit:{tmp_path / 'nowhere'}")
    edit_of(clip).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="made for a backbone with fingerprint"):
        create_backbone("tiny", edit=str(tmp_path))


def test_a_detector_on_an_edited_backbone_finds_it_again(tiny, tiny_edit, tmp_path):
    edited = tiny_edit.apply(tiny)
    detector = create_detector("mcm", backbone=edited, class_names=["glossy circle", "striped star"])
    detector.save_pretrained(tmp_path)
    loaded = Detector.from_pretrained(tmp_path)
    assert loaded.backbone.spec == f"tiny+edit:{tiny_edit.folder}"
    assert loaded.backbone.fingerprint == edited.fingerprint
    torch.testing.assert_close(loaded.state["text"], detector.state["text"])
    with pytest.raises(UsageError, match="was made with backbone"):
        Detector.from_pretrained(tmp_path, backbone=tiny)
    assert Detector.from_pretrained(tmp_path, backbone=edited).backbone is edited
