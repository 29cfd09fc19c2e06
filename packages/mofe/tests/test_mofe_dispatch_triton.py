"""The Triton backend: compiled where there is a GPU, interpreted otherwise (conftest.py), and compiled ahead of time.

Started as a script, outside the interpreter, this file compiles every kernel and prints what the machine code uses.
"""

import json
import os
import re
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ood_core.ops import backend as backends
from ood_mofe import StackedExperts
from ood_mofe.ops import expert_class_token, expert_tokens
from ood_mofe.ops.expert_dispatch import torch as loop
from torch.utils._python_dispatch import TorchDispatchMode

triton = pytest.importorskip("triton")

from ood_mofe.ops.expert_dispatch import triton as kernels  # noqa: E402
from ood_mofe.ops.expert_dispatch.kernels import sizes  # noqa: E402
from ood_mofe.ops.expert_dispatch.kernels.grouped_linear import linear_options  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of float32 against float64 on the same float32 inputs, relative to the largest entry of a tensor.
TOLERANCE = 1e-5
functions = pytest.mark.parametrize("function", [expert_class_token, expert_tokens])


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stacked(count, width, heads, hidden, *, scaled=True, activation="gelu"):
    """Experts in float64 whose numbers are float32's."""
    vector, square = (count, width), (count, width, width)
    scales = [1 + 0.2 * random(*vector, seed=s) for s in (6, 7)] if scaled else [None, None]
    given = [
        1 + 0.2 * random(*vector, seed=1),
        0.2 * random(*vector, seed=2),
        2 * random(count, 3 * width, width, seed=3) / width**0.5,
        0.2 * random(count, 3 * width, seed=4),
        random(*square, seed=5) / width**0.5,
        0.2 * random(*vector, seed=8),
        scales[0],
        1 + 0.2 * random(*vector, seed=9),
        0.2 * random(*vector, seed=10),
        random(count, hidden, width, seed=11) / width**0.5,
        0.2 * random(count, hidden, seed=12),
        random(count, width, hidden, seed=13) / hidden**0.5,
        0.2 * random(*vector, seed=14),
        scales[1],
    ]
    rounded = [None if x is None else x.float().double() for x in given]
    return StackedExperts(*rounded, num_heads=heads, activation=activation).to(DEVICE)


def results(function, tokens, expert, experts, backend, *, trained=False):
    """Output, then gradients of all parameters and, if they are trained, of the tokens."""
    experts.zero_grad()
    tokens = tokens.to(DEVICE, experts.norm1_weight.dtype, copy=True).requires_grad_(trained)
    out = function(tokens, expert.to(DEVICE), experts, backend=backend)
    (out * random(*out.shape, seed=20).to(out)).sum().backward()
    found = {"out": out.detach()} | {name: p.grad.clone() for name, p in experts.named_parameters()}
    return found | ({"tokens": tokens.grad} if trained else {})


def check(function, tokens, expert, experts, *, trained=False, tolerance=TOLERANCE):
    tokens, expert = tokens.float().double(), torch.as_tensor(expert)
    expected = results(function, tokens, expert, experts.double(), "reference", trained=trained)
    found = results(function, tokens, expert, experts.float(), "triton", trained=trained)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == torch.float32
        largest = expected[name].abs().max().item()
        torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=tolerance * largest, msg=_says(name))


def _says(name):
    return lambda message: f"{name}: {message}"


def refuse(*_, **__):
    raise AssertionError("another form ran")


@pytest.fixture
def only_kernels(monkeypatch):
    """Small tiles, so that small inputs have several; and an error if the torch backend runs instead."""
    for name, size in {"COLUMNS": 32, "DEPTH": 16, "TILE": 16, "SUMMED": 16, "PLANNED": 4, "MANY": 32}.items():
        monkeypatch.setattr(sizes, name, size)
    for name in ("all_tokens", "class_token"):
        monkeypatch.setattr(kernels.loop, name, refuse)


ROUTINGS = {
    "balanced": [0, 1, 2, 0, 1, 2],
    "all to one": [1] * 5,
    "an empty expert": [0, 2, 2, 0, 2],
    "one image": [2],
}


@functions
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.usefixtures("only_kernels")
def test_routings(function, routing):
    expert = ROUTINGS[routing]
    check(function, random(len(expert), 7, 20), expert, stacked(3, 20, 2, 24))


@pytest.mark.parametrize("options", [{"scaled": False}, {"activation": "quick_gelu"}])
@functions
@pytest.mark.usefixtures("only_kernels")
def test_kinds_of_experts(function, options):
    check(function, random(3, 5, 20), [1, 0, 1], stacked(2, 20, 2, 24, **options))


@functions
@pytest.mark.usefixtures("only_kernels")
def test_several_tiles_in_every_direction(function):
    images = 18 if function is expert_class_token else 3
    expert = [1, 0, *[1] * (images - 2)]
    check(function, random(images, 33, 36), expert, stacked(2, 36, 3, 70))


@functions
@pytest.mark.usefixtures("only_kernels")
def test_multiples_of_the_tiles(function):
    check(function, random(4, 16, 32), [0, 0, 0, 0], stacked(1, 32, 2, 32))


@functions
def test_the_shipped_tiles(function, monkeypatch):
    monkeypatch.setattr(kernels.loop, "all_tokens", refuse)
    monkeypatch.setattr(kernels.loop, "class_token", refuse)
    check(function, random(2, 70, 72), [0, 0], stacked(1, 72, 2, 80))


@functions
@pytest.mark.usefixtures("only_kernels")
def test_trained_tokens(function):
    check(function, random(4, 7, 20), [1, 0, 1, 1], stacked(2, 20, 2, 24), trained=True)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.usefixtures("only_kernels")
def test_attention_runs_in_torch_exactly_if_tokens_are_trained(trained, monkeypatch):
    monkeypatch.setattr(kernels, "attend" if trained else "_attention_in_torch", refuse)
    experts = stacked(2, 20, 2, 24).float()
    tokens, expert = random(2, 5, 20).float().to(DEVICE), torch.tensor([1, 0], device=DEVICE)
    found = expert_class_token(tokens.requires_grad_(trained), expert, experts, backend="triton")
    assert found.requires_grad
    if trained:
        monkeypatch.setattr(kernels, "attend", kernels.attend_backward)
        with torch.no_grad(), pytest.raises(TypeError):
            expert_class_token(tokens, expert, experts, backend="triton")


@pytest.mark.usefixtures("only_kernels")
def test_tokens_far_from_zero_and_sharp_attention():
    tokens = random(2, 20, 36)
    # Squares of the tokens would swallow their spread: 1000 ** 2 has a resolution of 0.06.
    check(expert_class_token, tokens + 1000, [0, 0], stacked(1, 36, 3, 24), tolerance=1e-2)
    experts = stacked(1, 36, 3, 24)
    with torch.no_grad():
        experts.qkv_weight.mul_(5)
    check(expert_class_token, tokens, [0, 0], experts, tolerance=1e-4)


@functions
@pytest.mark.usefixtures("only_kernels")
def test_an_expert_without_images_has_no_say_and_no_gradient(function):
    experts = stacked(3, 20, 2, 24).float()
    tokens, expert = random(4, 5, 20).float(), torch.tensor([0, 2, 2, 0])
    before = results(function, tokens, expert, experts, "triton")
    for name, value in before.items():
        if name != "out":
            assert (value[1] == 0).all()
            assert (value[0] != 0).any()
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter[1] += 1
    after = results(function, tokens, expert, experts, "triton")
    assert all(torch.equal(after[name], before[name]) for name in before)


@functions
@pytest.mark.usefixtures("only_kernels")
def test_images_do_not_see_each_other(function):
    experts = stacked(3, 20, 2, 24).float()
    tokens, expert = random(6, 5, 20).float().to(DEVICE), torch.tensor([0, 2, 1, 1, 0, 2], device=DEVICE)
    order = torch.tensor([3, 5, 0, 4, 2, 1], device=DEVICE)
    with torch.no_grad():
        whole = function(tokens, expert, experts, backend="triton")
        permuted = function(tokens[order], expert[order], experts, backend="triton")
        alone = function(tokens[1:2], expert[1:2], experts, backend="triton")
    torch.testing.assert_close(permuted, whole[order], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(alone, whole[1:2], rtol=1e-6, atol=1e-6)


@functions
@pytest.mark.usefixtures("only_kernels")
def test_inputs_without_contiguous_memory(function):
    experts = stacked(2, 20, 2, 24)
    for name, value in list(experts.named_parameters()):
        setattr(experts, name, torch.nn.Parameter(value.detach().mT.contiguous().mT))
    assert not experts.out_weight.is_contiguous()
    check(function, random(20, 7, 3).mT.contiguous().mT.permute(2, 1, 0), [1, 0, 1], experts)


@functions
@pytest.mark.usefixtures("only_kernels")
def test_half_precision(function):
    experts, expert = stacked(2, 20, 2, 24).bfloat16(), torch.tensor([1, 0, 1])
    tokens = random(3, 5, 20).bfloat16()
    found = results(function, tokens, expert, experts, "triton")
    expected = results(function, tokens, expert, experts.double(), "reference")
    for name, value in found.items():
        assert value.dtype == torch.bfloat16
        largest = expected[name].abs().max().item()
        torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=0.02 * largest, msg=_says(name))


@functions
@pytest.mark.usefixtures("only_kernels")
def test_autocast_lowers_only_the_precision_of_products(function, monkeypatch):
    used = []
    launch = kernels.grouped_linear
    monkeypatch.setattr(kernels, "grouped_linear", lambda *given: used.append(given[5].precision) or launch(*given))
    experts = stacked(2, 20, 2, 24).float()
    tokens, expert = random(2, 5, 20).float().to(DEVICE), torch.tensor([1, 0], device=DEVICE)
    with torch.no_grad():
        expected = function(tokens, expert, experts, backend="reference")
        function(tokens, expert, experts, backend="triton")
        assert set(used) == {"ieee"}
        used.clear()
        with torch.autocast(DEVICE, torch.bfloat16):
            found = function(tokens, expert, experts, backend="triton")
    assert set(used) == {"tf32"}
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=5e-3)


def test_precision_is_that_of_torch(monkeypatch):
    one = torch.ones(1)
    assert kernels._precision(one) == "ieee"
    assert kernels._precision(one.bfloat16()) == "tf32"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert kernels._precision(one) == "tf32"


@functions
def test_float64_runs_in_torch(function, monkeypatch):
    monkeypatch.setattr(kernels, "planned", refuse)
    experts, tokens, expert = stacked(2, 20, 2, 24), random(2, 5, 20).to(DEVICE), torch.tensor([1, 0], device=DEVICE)
    found = function(tokens, expert, experts, backend="triton")
    assert found.dtype == torch.float64
    assert torch.equal(found, function(tokens, expert, experts, backend="torch"))


# ---- single kernels


@pytest.mark.parametrize(("images", "experts"), [(1, 1), (4, 3), (13, 5), (9, 16)])
def test_the_plan_is_a_stable_sort(images, experts, monkeypatch):
    monkeypatch.setattr(sizes, "PLANNED", 4)
    expert = torch.randint(experts, (images,), generator=torch.Generator().manual_seed(images))
    plan = kernels.planned(expert.to(DEVICE), experts, 1, "ieee")
    assert torch.equal(plan.order.cpu().long(), expert.sort(stable=True).indices)
    counts = torch.bincount(expert, minlength=experts)
    assert plan.offsets.tolist() == [0, *counts.cumsum(0).tolist()]


@pytest.mark.parametrize("counts", [[17, 1, 17], [16, 0, 32], [0, 0, 1], [33]])
@pytest.mark.usefixtures("only_kernels")
def test_tiles_are_enough_for_any_counts(counts, monkeypatch):
    monkeypatch.setattr(sizes, "MANY", 10**6)
    expert = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    expert = expert[torch.randperm(len(expert), generator=torch.Generator().manual_seed(0))]
    x, weight = random(len(expert), 3).float(), random(len(counts), 2, 3, seed=1).float()
    plan = kernels.planned(expert.to(DEVICE), len(counts), 1, "ieee")
    on_device = x[:, None, None].to(DEVICE), weight[:, None].to(DEVICE)
    with torch.no_grad():
        found = kernels._linear(*on_device, plan=plan)[:, 0, 0].cpu()
    torch.testing.assert_close(found, torch.einsum("bk,bnk->bn", x, weight[expert]), rtol=1e-5, atol=1e-5)


class _NoWaiting(TorchDispatchMode):
    """Refuses operations whose result or shape the host must know: each would wait for the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags):
            raise AssertionError(f"{function} waits for the device")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["class_token", "all_tokens"])
@pytest.mark.usefixtures("only_kernels")
def test_nothing_waits_for_the_device(name, monkeypatch):
    experts = stacked(2, 20, 2, 24).float()
    tokens, expert = random(3, 5, 20).float().to(DEVICE), torch.tensor([1, 0, 1], device=DEVICE)
    for reading in ("tolist", "cpu", "numpy", "item", "__int__", "__bool__", "__index__", "__float__"):
        monkeypatch.setattr(torch.Tensor, reading, refuse)
    mode = torch.cuda.set_sync_debug_mode if DEVICE == "cuda" else lambda _: None
    mode("error")
    try:
        with _NoWaiting():
            getattr(kernels, name)(tokens, expert, experts).sum().backward()
    finally:
        mode("default")
    assert experts.out_weight.grad is not None


def test_waiting_would_be_noticed():
    experts = stacked(2, 20, 2, 24).float()
    tokens, expert = random(3, 5, 20).float().to(DEVICE), torch.tensor([1, 0, 1], device=DEVICE)
    with _NoWaiting(), pytest.raises(AssertionError, match=r"nonzero.*waits"):
        loop.class_token(tokens, expert, experts)


@pytest.mark.usefixtures("only_kernels")
def test_nothing_is_kept_without_gradients(monkeypatch):
    kept = []
    launch = kernels.grouped_linear
    monkeypatch.setattr(kernels, "grouped_linear", lambda *given: kept.append(given[-1]) or launch(*given))
    experts = stacked(1, 20, 2, 24).float()
    tokens, expert = random(1, 5, 20).float().to(DEVICE), torch.tensor([0], device=DEVICE)
    with torch.no_grad():
        expert_class_token(tokens, expert, experts, backend="triton")
    assert kept == [False] * 6
    kept.clear()
    expert_class_token(tokens, expert, experts, backend="triton")
    assert kept == [False, True, False, True, True, True]  # query, key, value, output, up, down


# ---- choice of the backend


def test_backend_is_chosen_by_device(monkeypatch):
    on_gpu = SimpleNamespace(is_cuda=True)
    implementation = partial(backends.implementation, loop.__package__)
    assert implementation(None, on_gpu) is kernels
    assert implementation(None, torch.ones(1)) is loop
    assert implementation("torch", on_gpu) is loop
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert implementation(None, on_gpu) is loop


@functions
def test_refusals_say_what_to_do(function, monkeypatch):
    given = (torch.ones(1, 2, 20), torch.tensor([0]), stacked(1, 20, 2, 24).float().cpu())
    with pytest.raises(ValueError, match=r"'cuda'.*'triton'"):
        function(*given, backend="cuda")
    monkeypatch.setattr(kernels, "compiled", lambda: True)
    with pytest.raises(ValueError, match=r"got cpu.*TRITON_INTERPRET=1"):
        function(*given, backend="triton")
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed"):
        function(*given, backend="triton")


def test_triton_is_imported_only_where_it_runs():
    module = "ood_mofe.ops.expert_dispatch"
    code = f"import sys, {module}; print('triton' in sys.modules, '{module}.triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


# ---- ahead of time: every kernel for every target, with aligned sizes and with the sizes of one that occur

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
CLASS = {"T": 1, "G": 1, "weight_k": 1, "ACTIVATION": "gelu"}
HEADS = {"E": 1, "T": 1, "weight_n": 1, "ACTIVATION": "", "bias": None, "residual": None}
TOKENS = {"G": 1, "weight_k": 1, "ACTIVATION": "quick_gelu", "gain": None, "before": None}
FEW, MANY = ({"ROWS": rows} for rows in (sizes.FEW, sizes.MANY))
IEEE, TF32 = ({"PRECISION": word} for word in ("ieee", "tf32"))
VARIANTS = {
    "plan": ("plan", {}),
    "class token": ("grouped_linear", CLASS | FEW | IEEE),
    "class token, tf32": ("grouped_linear", CLASS | FEW | TF32),
    "heads": ("grouped_linear", HEADS | FEW | IEEE),
    "tokens": ("grouped_linear", TOKENS | MANY | IEEE),
    "tokens, tf32": ("grouped_linear", TOKENS | MANY | TF32),
    "weight gradient": ("weight_gradient", {"G": 1, "out_k": 1} | IEEE),
    "weight gradient of keys": ("weight_gradient", {"T": 1, "out_n": 1} | TF32),
    "row sums": ("row_sums", {}),
    "attention": ("attend", IEEE),
    "attention, tf32": ("attend", TF32),
    "attention backward": ("attend_backward", IEEE),
    "attention backward, tf32": ("attend_backward", TF32),
}
SIZES = ("B", "E", "T", "G", "N", "K", "H", "D", "tiles", "height")
STRIDES = tuple(f"{of}_{what}" for of in ("weight", "out") for what in ("expert", "group", "n", "k"))
ALIGNED = ("N", "K", "D", *STRIDES)


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory):
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    run = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_kernels_do_not_spill(machine_code, variant, target):
    used = machine_code[f"{variant} {target}"]
    assert used["stack"] == 0
    assert used["spills"] == 0
    assert 0 < used["registers"] <= 255
    assert used["shared"] <= 48 * 1024
    precision = VARIANTS[variant][1].get("PRECISION")
    assert used["matrix units"] == (precision == "tf32" or (precision == "ieee" and target == "gfx942"))


def _compile_all():
    return {
        f"{variant} {name}": _compile(*VARIANTS[variant], target)
        for variant in VARIANTS
        for name, target in TARGETS.items()
    }


def _compile(name, given, target):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module(f"{sizes.__package__}.{name}"), f"_{name}")
    words = {
        "EXPERTS": 8,
        "ROWS": sizes.PLANNED if name == "plan" else sizes.SUMMED,
        "COLUMNS": sizes.COLUMNS,
    }
    words |= {"HEADS": 16, "TILE": sizes.TILE, "DEPTH": sizes.DEPTH} | given
    constants = {key: value for key, value in words.items() if key in kernel.arg_names}
    types = {"expert": "*i64", "scale": "fp32", "eps": "fp32"}
    types |= dict.fromkeys(("order", "offsets", "tile_expert", "tile_row"), "*i32")
    if constants.get("PRECISION") == "tf32":  # that of parameters and tokens in half precision
        types |= dict.fromkeys(("weight", "bias", "gain", "tokens"), "*bf16")
    types |= dict.fromkeys((*SIZES, *STRIDES), "i32") | dict.fromkeys(constants, "constexpr")
    signature = {key: types.get(key, "*fp32") for key in kernel.arg_names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, key in enumerate(kernel.arg_names)
        if signature[key].startswith("*") or (key in ALIGNED and key not in constants)
    }
    options = linear_options(constants["ROWS"]) if name == "grouped_linear" else dict(sizes.OPTIONS)
    options.pop("ROWS", None)
    source = ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget(*target), options=options)
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
    matrix = re.search(r"\bHG?MMA", code) is not None
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    return {"registers": registers, "stack": stack, "spills": spills, "matrix units": matrix}


def _hip_use(code):
    names = ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count", "sgpr_spill_count")
    registers, stack, *spills = (int(re.search(rf"\.{name}:\s*(\d+)", code)[1]) for name in names)
    return {"registers": registers, "stack": stack, "spills": sum(spills), "matrix units": "v_mfma" in code}


if __name__ == "__main__":
    print(json.dumps(_compile_all()))  # noqa: T201
