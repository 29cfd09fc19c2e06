"""Weights from a file: safetensors, PyTorch's files and TorchScript archives; no code in a file is ever run."""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ood_core.errors import DataError, MissingDataError

__all__ = ["Checkpoint", "load_strictly", "read_checkpoint", "without_wrappers"]

log = logging.getLogger(__name__)


# Where training programs keep the weights, best first: an average over the training is what they evaluate.
_NESTED = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher"),
    *("state_dict", "model_state_dict", "model", "module", "network", "net", "weights", "params"),
)

# What wrappers of a network put before (or, of compiled and sharded parts, between) the names of its weights.
_WRAPPERS = frozenset(
    [*_NESTED, "backbone", "encoder", "clip", "clip_model", "base_model", "student", "online_network"]
)
_BETWEEN = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


class Checkpoint(NamedTuple):
    """What a file of weights holds.

    Attributes:
        path: of the file.
        state: weights by name, on the CPU.
        part: keys of the nested dictionary that the weights were taken from, e.g. "state_dict_ema"; "" without one.
        scripted: whether the file is a TorchScript archive (OpenAI publishes CLIP in them).
    """

    path: Path
    state: dict[str, Tensor]
    part: str = ""
    scripted: bool = False


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read the weights in a file; of nested dictionaries an average over the training ("ema") is preferred.

    Nothing in the file is run: PyTorch's files are read with `weights_only`, of a TorchScript archive the stored
    tensors alone.

    Raises:
        MissingDataError: no such file.
        DataError: a damaged file, one with other Python objects than tensors, or one without weights.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        kind = "is a folder, not a file of weights" if path.is_dir() else "is not there"
        raise MissingDataError(
            f"The checkpoint {path} {kind}: give the path of a .safetensors, .pt, .pth or .bin file."
        )
    scripted = _is_scripted(path)
    try:
        content = _read_archive(path) if scripted else _read(path)
    except pickle.UnpicklingError as error:
        raise DataError(_refusal(path, str(error))) from error
    except Exception as error:
        raise DataError(
            f"The checkpoint {path} is damaged or of another format ({type(error).__name__}: {str(error)[:150]}): "
            "copy or download it again; .safetensors and files of torch.save are read."
        ) from error
    state, part = _unwrap(content, path)
    return Checkpoint(path, state, part, scripted)


def without_wrappers(state: Mapping[str, Tensor], expected: Collection[str]) -> dict[str, Tensor]:
    """The weights under the names that the bare network has: "module.", "_orig_mod.", "model." and the like are cut.

    Args:
        state: weights by name.
        expected: names of the network, in every form that is read; nothing is cut that belongs to them.
    """
    expected = frozenset(expected)
    cut = {name if name in expected else _without_between(name): value for name, value in state.items()}
    found = Counter(prefix for name in cut for prefix in _prefixes(name) if name.removeprefix(prefix) in expected)
    prefix = max(found, key=lambda one: (found[one], -len(one)), default="")
    return {name.removeprefix(prefix): value for name, value in cut.items()}


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Load weights that fit exactly: same names, same shapes, finite values.

    Args:
        module: the network.
        state: its weights; another precision is converted.
        source: says in messages where they come from, e.g. "The checkpoint a.pt".

    Raises:
        DataError: missing or unexpected names, other shapes or values that are not finite; the message names them.
    """
    own = module.state_dict()
    problems = [
        _names("lacks", [name for name in own if name not in state], "of this architecture"),
        _names("holds", [name for name in state if name not in own], "that this architecture has not"),
        _names("has other shapes for", [_shapes(n, state[n], own[n]) for n in own if _differ(n, state, own)], ""),
    ]
    if problems := [problem for problem in problems if problem]:
        raise DataError(
            f"{source} does not belong to this architecture: it {'; it '.join(problems)}. "
            "Name the architecture that the weights were trained with."
        )
    if bad := [n for n, _ in module.named_parameters() if state[n].is_floating_point() and not _finite(state[n])]:
        raise DataError(f"{source} is damaged: it {_names('holds NaN or infinite values in', bad, '')}.")
    module.load_state_dict(dict(state))


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _differ(name: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    return name in state and state[name].shape != own[name].shape


def _shapes(name: str, found: Tensor, wanted: Tensor) -> str:
    return f"{name} {list(found.shape)} instead of {list(wanted.shape)}"


def _names(verb: str, names: list[str], what: str) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{verb} {', '.join(names[:4])}{more} {what}".rstrip()


def _prefixes(name: str) -> Iterator[str]:
    """Nothing, and every start of a name that consists of wrappers alone."""
    prefix = ""
    yield prefix
    for part in name.split(".")[:-1]:
        if part not in _WRAPPERS:
            return
        prefix += f"{part}."
        yield prefix


def _without_between(name: str) -> str:
    for part in _BETWEEN:
        name = name.replace(part, "")
    return name


def _unwrap(content: Any, path: Path) -> tuple[dict[str, Tensor], str]:
    part: list[str] = []
    while isinstance(content, Mapping) and not _is_state(content):
        inside = [key for key in _NESTED if isinstance(content.get(key), Mapping) and content[key]]
        if not inside:
            break
        part.append(inside[0])
        if len(inside) > 1:
            log.warning("%s: it holds %s; %r is used.", path, " and ".join(map(repr, inside)), inside[0])
        content = content[inside[0]]
    if not isinstance(content, Mapping) or not _is_state(content):
        keys = f" (keys: {', '.join(map(str, list(content)[:6]))})" if isinstance(content, Mapping) else ""
        raise DataError(
            f"The checkpoint {path} holds no weights by name but a {type(content).__name__}{keys}: save the "
            "network's state_dict()."
        )
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}, ".".join(part)


def _is_state(content: Mapping) -> bool:
    """Most of it named tensors: a few versions or counters may lie among them."""
    tensors = sum(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())
    return tensors * 2 > len(content)


def _read(path: Path) -> Any:
    if path.suffix.lower() == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _refusal(path: Path, reason: str) -> str:
    if found := re.search(r"GLOBAL (\S+)|class (\S+)|NEWOBJ (\S+)", reason):
        name = next(filter(None, found.groups()))
        return (
            f"The checkpoint {path} holds Python objects besides tensors ({name}), which reading would have to run. "
            "Save the state_dict() alone, best as .safetensors."
        )
    # PyTorch's own sentence first advises to switch the protection off; what was found stands behind it.
    found_last = (reason.partition("WeightsUnpickler error: ")[2] or reason).strip().partition("\n")[0][:150]
    return f"The checkpoint {path} is damaged or no file of weights ({found_last.rstrip('.')}): copy it again."


# ---- TorchScript archives


def _is_scripted(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in archive.namelist())


def _read_archive(path: Path) -> dict[str, Tensor]:
    """The tensors of a TorchScript archive by name; its programs are neither compiled nor run."""
    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/constants.pkl")).partition("/")[0]
        with archive.open(f"{root}/data.pkl") as file:
            return dict(_tensors("", _ArchiveReader(file, archive, root).load()))


class _Scripted:
    """Stands for every class of an archive: it keeps what was stored and can do nothing."""

    def __setstate__(self, state: Any) -> None:
        self.stored = state


class _ArchiveReader(pickle.Unpickler):
    """Unpickles what TorchScript stores: its own objects as `_Scripted`, tensors, and no other name."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(file)
        self.archive, self.root = archive, root
        self.read: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Names that an archive may use."""
        if module.startswith("__torch__"):
            return _Scripted
        known: dict[tuple[str, str], Any] = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
            ("collections", "OrderedDict"): OrderedDict,
        }
        if module == "torch" and name.endswith("Storage"):
            return name
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"Unsupported GLOBAL {module}.{name} in a TorchScript archive")
        return known[module, name]

    def persistent_load(self, pid: Any) -> Tensor:
        """The numbers that a tensor is a view of."""
        _, storage, key, *_ = pid
        if key not in self.read:
            data = bytearray(self.archive.read(f"{self.root}/data/{key}"))
            dtype = _STORAGES[str(storage)]
            self.read[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self.read[key]


_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def _rebuild(numbers: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return torch.as_strided(numbers, size, stride, offset)


def _tensors(prefix: str, node: Any) -> Iterator[tuple[str, Tensor]]:
    stored = node.stored if isinstance(node, _Scripted) else node
    if isinstance(stored, Tensor):
        yield prefix.rstrip("."), stored
    elif isinstance(stored, Mapping):
        for name, value in stored.items():
            yield from _tensors(f"{prefix}{name}.", value)
