import argparse
import logging
import pickle
import warnings
import zipfile

import pytest
import torch
from ood_core.backbones.checkpoint import load_strictly, read_checkpoint, without_wrappers
from ood_core.backbones.specs import names_file
from ood_core.errors import DataError, MissingDataError
from safetensors.torch import save_file
from torch import nn


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Linear(3, 2)  # a network's own name may be that of a wrapper
        self.register_buffer("steps", torch.tensor(3))
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x):
        return self.norm(self.model(x))


def network(seed=0):
    torch.manual_seed(seed)
    return Network().eval()


def same(module, state):
    return all(torch.equal(state[name], value) for name, value in module.state_dict().items()) and len(state) == len(
        module.state_dict()
    )


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".safetensors"])
def test_files_of_every_kind_give_the_weights(tmp_path, suffix):
    module, path = network(), tmp_path / f"a{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(module.state_dict(), path)
    assert same(module, read_checkpoint(path).state)


def test_archives_give_their_tensors_and_no_program(tmp_path):
    module, path = network().half(), tmp_path / "scripted.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(module.float(), torch.ones(2, 3)).save(path)
    checkpoint = read_checkpoint(path)
    assert checkpoint.scripted
    assert same(module, checkpoint.state)


@pytest.mark.parametrize(
    ("wrap", "part"),
    [
        (lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"state": {}}}, "state_dict"),
        (lambda state: {"model": {"state_dict": state}}, "model.state_dict"),
        (lambda state: {"model_state_dict": state}, "model_state_dict"),
        (lambda state: {"ema": state, "epoch": 1}, "ema"),
        (lambda state: {"student": {}, "teacher": state}, "teacher"),
    ],
)
def test_nested_weights_are_found(tmp_path, wrap, part):
    torch.save(wrap(network().state_dict()), tmp_path / "a.pt")
    checkpoint = read_checkpoint(tmp_path / "a.pt")
    assert checkpoint.part == part
    assert same(network(), checkpoint.state)


def test_averaged_weights_are_preferred_and_the_choice_is_said(tmp_path, caplog):
    torch.save({"state_dict": network(0).state_dict(), "state_dict_ema": network(1).state_dict()}, tmp_path / "a.pt")
    with caplog.at_level(logging.WARNING):
        checkpoint = read_checkpoint(tmp_path / "a.pt")
    assert same(network(1), checkpoint.state)
    assert "'state_dict_ema' is used" in caplog.text


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "module.model.net."])
def test_prefixes_of_wrappers_are_cut(prefix):
    module = network()
    state = {f"{prefix}{name}": value for name, value in module.state_dict().items()}
    assert same(module, without_wrappers(state, module.state_dict()))


def test_names_of_compiled_parts_are_mended():
    module = network()
    state = {name.replace("norm.", "norm._orig_mod."): value for name, value in module.state_dict().items()}
    assert same(module, without_wrappers(state, module.state_dict()))


def test_weights_that_do_not_fit_are_named():
    module = network()
    state = dict(module.state_dict())
    del state["norm.weight"]
    state |= {"head.weight": torch.ones(1), "model.weight": torch.ones(2, 4)}
    with pytest.raises(DataError, match=r"lacks norm\.weight .*holds head\.weight .*model\.weight \[2, 4\] instead of"):
        load_strictly(module, state, source="The checkpoint a.pt")


def test_weights_that_are_not_finite_are_refused():
    state = network().state_dict() | {"norm.weight": torch.tensor([1.0, float("nan")])}
    with pytest.raises(DataError, match=r"NaN or infinite values in norm\.weight"):
        load_strictly(network(), state, source="The checkpoint a.pt")


class Trap:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("content", [Trap(), {"state_dict": {"a": torch.ones(1)}, "args": argparse.Namespace(lr=1)}])
def test_files_with_other_objects_are_refused_and_not_run(tmp_path, capsys, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(DataError, match=r"Python objects besides tensors \(.*Save the state_dict"):
        read_checkpoint(tmp_path / "a.pt")
    assert not capsys.readouterr().out


def test_an_archive_with_a_trap_is_refused_and_not_run(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/constants.pkl", b"")
        archive.writestr("a/data.pkl", pickle.dumps(Trap()))
    with pytest.raises(DataError, match=r"Python objects besides tensors"):
        read_checkpoint(tmp_path / "a.pt")
    assert not capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"<html>not found</html>"])
def test_damaged_files_are_refused_in_a_sentence(tmp_path, suffix, damage):
    path = tmp_path / f"a{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(network().state_dict(), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"damaged"):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {}, {"state_dict": {}}])
def test_files_without_weights_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(DataError, match=r"no weights by name"):
        read_checkpoint(tmp_path / "a.pt")


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(MissingDataError, match=r"a\.pt is not there"):
        read_checkpoint(tmp_path / "a.pt")
    with pytest.raises(MissingDataError, match=r"is a folder"):
        read_checkpoint(tmp_path)


def test_files_are_told_from_tags(tmp_path):
    assert all(names_file(name) for name in ("a.pt", "/x/y", "x/y.bin", "A.SAFETENSORS"))
    assert not any(names_file(name) for name in ("openai", "laion2b_s34b_b79k", "webli"))
