"""The Triton backend: compiled where there is a GPU, interpreted otherwise (conftest.py), and compiled ahead of time.

Started as a script, outside the interpreter, this file compiles every kernel and prints what the machine code uses.
"""

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ood_core.ops import topk_patch_softmax

triton = pytest.importorskip("triton")

from ood_core.ops import backend as backends  # noqa: E402
from ood_core.ops.topk_patch_softmax import torch as chunked  # noqa: E402
from ood_core.ops.topk_patch_softmax import triton as kernels  # noqa: E402
from ood_core.ops.topk_patch_softmax.kernels import sizes as shipped  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of means of float32 probabilities against float64 on the same float32 inputs.
TOLERANCE = 2e-6


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def inputs(images, patches, classes, negatives, width):
    given = unit(negatives, width, seed=3) if negatives else None
    return unit(images, patches, width, seed=1), unit(classes, width, seed=2), given


def check(local, text, negatives, k, temperature=1.0, tolerance=TOLERANCE):
    on_device = [None if x is None else x.to(DEVICE) for x in (local, text, negatives)]
    found = topk_patch_softmax(*on_device, k=k, temperature=temperature, backend="triton")
    wide = [None if x is None else x.double() for x in (local, text, negatives)]
    expected = topk_patch_softmax(*wide, k=k, temperature=temperature, backend="reference")
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.cpu().double(), other, rtol=tolerance, atol=0)


@pytest.fixture
def only_kernels(monkeypatch):
    """Small tiles, so that small inputs have many; and an error if the torch backend runs instead."""

    def refuse(*_):
        raise AssertionError("the torch backend ran")

    monkeypatch.setattr(shipped, "TILE", 16)
    monkeypatch.setattr(chunked, "match", refuse)


SHAPES = {
    "no multiple of the tile": (2, 33, 40, 17, 24, 7),
    "multiples of the tile": (1, 32, 48, 16, 32, 5),
    "no negatives": (2, 21, 50, 0, 24, 5),
    "k = 1": (2, 20, 30, 5, 20, 1),
    "k > P": (1, 5, 300, 3, 8, 20),
    "k > C": (1, 500, 3, 2, 8, 20),
    "one patch": (1, 1, 150, 3, 8, 2),
    "one class": (1, 150, 1, 3, 8, 2),
    "several k": (1, 33, 40, 1, 24, [1, 20, 7]),
    "width of one": (1, 17, 20, 1, 1, 5),
}


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.usefixtures("only_kernels")
def test_shapes(case):
    *shape, k = SHAPES[case]
    check(*inputs(*shape), k)


@pytest.mark.parametrize("case", ["all equal", "equal patches", "equal classes", "one hot patch"])
@pytest.mark.usefixtures("only_kernels")
def test_ties_and_a_hot_patch(case):
    local, text, negatives = inputs(2, 20, 40, 5, 16)
    if case == "all equal":
        text, negatives = text[:1].expand_as(text), text[:1].expand_as(negatives)
    if case in ("all equal", "equal patches"):
        local = local[:, :1].expand_as(local)
    if case == "equal classes":
        text = text[:4].repeat(10, 1)
    if case == "one hot patch":
        local[:, 3] = text[2]
    check(local, text, negatives, k=11)
    if case == "all equal":
        found = topk_patch_softmax(local.to(DEVICE), text.to(DEVICE), k=11, backend="triton")
        torch.testing.assert_close(found.image_to_text.cpu(), torch.full((2,), 1 / 40), rtol=TOLERANCE, atol=0)
        torch.testing.assert_close(found.text_to_image.cpu(), torch.full((2,), 1 / 40), rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("k", [1, 12])
@pytest.mark.usefixtures("only_kernels")
def test_logits_of_a_hundred(k):
    local, text, negatives = inputs(1, 20, 40, 5, 24)
    local[:, 0], local[:, 7] = text[2], -text[5]
    # Cosines near 1 are rounded to 6e-8, logits and logsumexp of 100 to 4e-6 each; their differences are exponents.
    check(local, text, negatives, k, temperature=0.01, tolerance=2e-5)


@pytest.mark.usefixtures("only_kernels")
def test_a_score_does_not_depend_on_the_batch():
    local, text, negatives = (x.to(DEVICE) for x in inputs(3, 20, 30, 5, 16))
    together = topk_patch_softmax(local, text, negatives, k=6, backend="triton")
    alone = topk_patch_softmax(local[1:2], text, negatives, k=6, backend="triton")
    assert torch.equal(alone.image_to_text, together.image_to_text[1:2])
    assert torch.equal(alone.text_to_image, together.text_to_image[1:2])


@pytest.mark.usefixtures("only_kernels")
def test_inputs_without_contiguous_memory():
    local, text, negatives = inputs(2, 33, 30, 6, 20)
    check(local[:, ::2], text.T.contiguous().T, negatives[::2], k=6)


def test_the_shipped_tile(monkeypatch):
    monkeypatch.setattr(kernels, "chunked", None)
    check(*inputs(1, 70, 130, 66, 40), k=[9, 1])


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.usefixtures("only_kernels")
def test_golden_values(k):
    golden = np.load(Path(__file__).parent / "golden" / "scores.npz")
    local, text, negatives = (torch.from_numpy(golden[f"in|{name}"]).float().to(DEVICE) for name in ("vl", "tl", "tn"))
    for key, given in (("star", None), ("paper", negatives)):
        found = topk_patch_softmax(local, text, given, k=k, backend="triton")
        for one, name in zip(found, (f"s_i2t_{key}", "s_t2i"), strict=True):
            expected = torch.from_numpy(golden[f"score|{name}|T1.0|k{k}"])
            torch.testing.assert_close(one.cpu().double(), expected, rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize(
    ("shape", "k", "kind"),
    [
        ((2, 9, 5, 3, 8), 45, torch.float32),  # k = P * C
        ((1, 9, 20, 3, 8), 40, torch.float32),  # more than the groups in one direction: 9 * 2 and 20 * 1
        ((1, 30, 40, 3, 8), 2, torch.float64),
    ],
)
def test_the_torch_backend_runs_where_kernels_save_nothing(monkeypatch, shape, k, kind):
    ran, match = [], chunked.match
    monkeypatch.setattr(shipped, "TILE", 16)
    monkeypatch.setattr(chunked, "match", lambda *given: ran.append(1) or match(*given))
    given = [x.to(kind) for x in inputs(*shape)]
    found = topk_patch_softmax(*(x.to(DEVICE) for x in given), k=k, backend="triton")
    expected = topk_patch_softmax(*(x.double() for x in given), k=k, backend="reference")
    assert ran == [1]
    torch.testing.assert_close(found.image_to_text.cpu().double(), expected.image_to_text, rtol=TOLERANCE, atol=0)
    torch.testing.assert_close(found.text_to_image.cpu().double(), expected.text_to_image, rtol=TOLERANCE, atol=0)


def test_backend_is_chosen_by_device_and_gradient(monkeypatch):
    def chosen(backend, *tensors):
        return backends.implementation(chunked.__package__, backend, *tensors, gradients=False)

    on_gpu, trained = (SimpleNamespace(is_cuda=True, requires_grad=x) for x in (False, True))
    assert chosen(None, on_gpu, on_gpu) is kernels
    assert chosen(None, on_gpu, trained) is chunked
    assert chosen(None, torch.ones(1)) is chunked
    assert chosen("torch", on_gpu) is chunked
    with torch.no_grad():
        assert chosen(None, on_gpu, trained) is kernels
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert chosen(None, on_gpu) is chunked


def test_refusals_say_what_to_do(monkeypatch):
    local, text, _ = inputs(1, 4, 3, 0, 8)
    with pytest.raises(ValueError, match="k=13"):
        topk_patch_softmax(local, text, k=13, backend="triton")
    with pytest.raises(ValueError, match=r"gives no gradients.*backend='torch'"):
        topk_patch_softmax(local.clone().requires_grad_(), text, k=1, backend="triton")
    monkeypatch.setattr(kernels, "compiled", lambda: True)
    with pytest.raises(ValueError, match=r"got cpu.*TRITON_INTERPRET=1"):
        topk_patch_softmax(local, text, k=1, backend="triton")
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed"):
        topk_patch_softmax(local, text, k=1, backend="triton")


# Ahead of time: every kernel for every target, with aligned sizes and with sizes of one, which Triton builds in.
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
KERNELS = ("tile_sums", "group_entries")
SIZES = ("P", "C", "M", "d", "R", "S", "k", "row_stride", "column_stride")
ALIGNED = ("d", "row_stride", "column_stride")


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory):
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    run = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("sizes", ["aligned", "ones"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiled_kernels_do_not_spill(machine_code, kernel, target, sizes):
    used = machine_code[f"{kernel} {target} {sizes}"]
    assert used["stack"] == 0
    assert used["spills"] == 0
    assert 0 < used["registers"] <= 255
    assert used["shared"] <= 48 * 1024


def _compile_all():
    return {
        f"{kernel} {name} {sizes}": _compile(
            getattr(import_module(f"{shipped.__package__}.{kernel}"), f"_{kernel}"), target, sizes
        )
        for kernel in KERNELS
        for name, target in TARGETS.items()
        for sizes in ("aligned", "ones")
    }


def _kernel(name):
    return getattr(import_module(f"{shipped.__package__}.{name}"), f"_{name}")


def _compile(kernel, target, sizes):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {"TILE": shipped.TILE, "DEPTH": shipped.DEPTH}
    if sizes == "ones":
        constants |= {name: 1 for name in kernel.arg_names if name in ("P", "C", "M", "R", "S", "k")}
    types = {"scale": "fp32", "groups": "*i64"} | dict.fromkeys(SIZES, "i32") | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
    aligned = ALIGNED if sizes == "aligned" else ()
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in aligned
    }
    source = ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget(*target), options=shipped.OPTIONS)
    used = _cuda_use(built.asm["cubin"]) if target[0] == "cuda" else _hip_use(built.asm["amdgcn"])
    return {**used, "shared": built.metadata.shared}


def _cuda_use(cubin):
    # cuobjdump's LOCAL stays 0 even when registers spill: STACK and the local loads and stores show it.
    tools, file = Path(triton.__file__).parent / "backends/nvidia/bin", Path(os.environ["TRITON_CACHE_DIR"]) / "cubin"
    file.write_bytes(cubin)
    usage, code = (
        subprocess.run([tools / tool, option, file], check=True, capture_output=True, text=True).stdout
        for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
    )
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    assert "FFMA" in code
    return {"registers": registers, "stack": stack, "spills": len(re.findall(r"\b(?:LDL|STL)\b", code))}


def _hip_use(code):
    names = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count")
    registers, stack, *spills = (int(re.search(rf"\.{name}:\s*(\d+)", code)[1]) for name in names)
    return {"registers": registers, "stack": stack, "spills": sum(spills)}


if __name__ == "__main__":
    print(json.dumps(_compile_all()))  # noqa: T201
