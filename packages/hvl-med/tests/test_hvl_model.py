import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ood_hvl.functional import entropy, fuse, patch_probabilities, pseudo_ood
from ood_hvl.model import HVLModel, background

GOLDEN = {
    key: torch.from_numpy(value)
    for name in ("hvl_losses", "hvl_raw")
    for key, value in np.load(Path(__file__).parent / "golden" / f"{name}.npz").items()
}
cases = pytest.mark.parametrize("case", ["a", "b", "c"])


def loaded(case, **options):
    """(model, embeddings, labels) of a golden case in float64."""
    given = {key.split("/")[-1]: value for key, value in GOLDEN.items() if key.startswith(f"{case}/in/")}
    text = given["t"] if options.pop("raw_text", False) else F.normalize(given["t"], dim=-1)
    model = HVLModel(
        text, tau=float(given["tau"]), k=int(given["k"] if "k" in given else given["K"]), **options
    ).double()
    with torch.no_grad():
        model.adapter.copy_(given["W"])
        model.bias0.copy_(given["b0"])
        model.bias2.copy_(given["b2"])
    return model, given["v"], given["y"]


def random_model(classes=5, n=2, batch=4, width=16, seed=0, **options):
    rng = torch.Generator().manual_seed(seed)
    model = HVLModel(torch.randn(classes, width, generator=rng), tau=0.1, seed=seed, **options).double()
    with torch.no_grad():
        model.bias0.copy_(0.1 * torch.randn(classes, width, generator=rng))
        model.bias2.copy_(0.1 * torch.randn(classes, width, generator=rng))
    v = torch.randn(batch, 1 + 5 * n * n, width, generator=rng, dtype=torch.float64)
    return model, v, torch.randint(classes, (batch,), generator=rng)


@cases
def test_losses_and_scores_of_the_golden_cases(case):
    model, v, y = loaded(case)
    found = model.losses(v, y)
    torch.testing.assert_close(found["id"], GOLDEN[f"{case}/paper/L_id"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found["ood"], GOLDEN[f"{case}/paper/L_ood"], rtol=1e-10, atol=1e-10)
    scales = model(v)
    assert torch.equal(model.select(scales), GOLDEN[f"{case}/paper/topk"].long())
    for mean in ("paper", "kept"):
        p_id, score, predicted = scales.combined(mean)
        torch.testing.assert_close(p_id, GOLDEN[f"{case}/{mean}/p_id"], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(score, GOLDEN[f"{case}/{mean}/score"], rtol=1e-10, atol=1e-10)
        assert torch.equal(predicted, GOLDEN[f"{case}/{mean}/pred"].long())


@cases
def test_gradients_are_the_stored_central_differences(case):
    model, v, y = loaded(case)
    sum(model.losses(v, y).values()).backward()
    for name, parameter, index in (
        ("W", model.adapter, "W_idx"),
        ("b0", model.bias0, "b_idx"),
        ("b2", model.bias2, "b_idx"),
    ):
        gradient = parameter.grad.reshape(-1, parameter.shape[-1])
        places = GOLDEN[f"{case}/fd/{index}"].long()
        ours = gradient[places[:, 0], places[:, 1]]
        torch.testing.assert_close(ours, GOLDEN[f"{case}/fd/{name}"], rtol=1e-6, atol=1e-8)


@cases
def test_embeddings_and_texts_of_any_norm(case):
    model, v, y = loaded(case, normalize=False, raw_text=True)
    scales, found = model(v), model.losses(v, y)
    torch.testing.assert_close(scales.h2, GOLDEN[f"{case}/raw/h2"], rtol=1e-10, atol=1e-10)
    assert torch.equal(model.select(scales), GOLDEN[f"{case}/raw/topk"].long())
    torch.testing.assert_close(found["id"], GOLDEN[f"{case}/raw/L_id"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found["ood"], GOLDEN[f"{case}/raw/L_ood"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(scales.combined("paper")[1], GOLDEN[f"{case}/raw/score"], rtol=1e-10, atol=1e-10)


def test_with_unit_norm_the_length_of_an_embedding_says_nothing():
    normal, v, _ = loaded("a")
    lengths = torch.rand(v.shape[:2], dtype=v.dtype)[..., None] + 0.5
    torch.testing.assert_close(normal(v * lengths).h2, normal(v).h2, rtol=1e-12, atol=1e-12)


def test_training_starts_at_the_model_itself_with_live_units():
    rng = torch.Generator().manual_seed(0)
    text, labels = F.normalize(torch.randn(7, 64, generator=rng), dim=-1), torch.arange(50) % 7
    noise = 0.15 * torch.randn(50, 21, 64, generator=rng)
    model, v = HVLModel(text), F.normalize(text[labels][:, None] + noise, dim=-1)
    scales = model(v)
    assert F.cosine_similarity(scales.u0, v[:, 0]).min() > 0.99
    agree = (scales.log_p[0].argmax(1) == (v[:, 0] @ text.T).argmax(1)).float().mean()
    assert agree > 0.95
    sum(model.losses(v, labels).values()).backward()
    assert all((parameter.grad != 0).any() for parameter in model.parameters())


def test_the_middle_bias_is_tied():
    model, v, y = random_model()
    log_p1 = model(v).log_p[1]
    F.nll_loss(log_p1.mean(1), y).backward()  # only the middle scale
    torch.testing.assert_close(model.bias0.grad, model.bias2.grad, rtol=1e-12, atol=1e-15)
    assert model.bias0.grad.abs().max() > 0


def test_without_fusion_tiles_are_those_of_the_adapter():
    model, v, _ = random_model(csf=False)
    fused, _, _ = random_model()
    with torch.no_grad():
        plain, other = model(v), fused(v)
    h1, h2 = fuse(plain.u0, plain.h1, plain.h2)
    torch.testing.assert_close(other.h1, h1)
    torch.testing.assert_close(other.h2, h2)


def test_an_adapter_per_scale():
    model, v, _ = random_model(adapter="per_scale", csf=False)
    assert model.adapter.shape == (3, 16, 16)
    scales, unit = model(v), F.normalize(v, dim=-1)
    torch.testing.assert_close(scales.u0, torch.relu(unit[:, 0] @ model.adapter[0]) + unit[:, 0])
    torch.testing.assert_close(scales.h1, torch.relu(unit[:, 1:5] @ model.adapter[1]) + unit[:, 1:5])
    torch.testing.assert_close(scales.h2, torch.relu(unit[:, 5:] @ model.adapter[2]) + unit[:, 5:])


def test_equal_gains_choose_the_lower_tile():
    model, v, _ = random_model(k=3)
    v[:] = v[:, :1]  # every tile the same: no gain anywhere
    assert model.select(model(v)).tolist() == [[0, 1, 2]] * 4


def test_all_tiles_may_be_chosen_and_no_more():
    model, v, y = random_model(k=16)
    chosen = model.select(model(v))
    assert chosen.sort(1).values.tolist() == [list(range(16))] * 4
    with pytest.raises(ValueError, match=r"k=17 is more than the 16 fine tiles"):
        random_model(k=17)[0].losses(v, y)


def test_background_selection_by_hand():
    model, v, y = random_model(selection="background", batch=6)
    scales = model(v)
    outside = background(scales.log_p[2], y)
    texts = model.texts()
    expected = []
    for image in range(6):
        p2 = scales.log_p[2][image].exp()
        rows = [j for j in range(16) if int(p2[j].argmax()) != int(y[image])]  # top max(1, 5 // 5) = 1
        assert outside[image].nonzero()[:, 0].tolist() == rows
        q = pseudo_ood(*(x[image : image + 1] for x in (scales.u0, scales.h1, scales.h2)), torch.tensor([rows]))
        entropies = [entropy(patch_probabilities(x, t, tau=0.1)) for x, t in zip(q, texts, strict=True)]
        expected.append(-sum(entropies).mean())
    torch.testing.assert_close(model.losses(v, y)["ood"], torch.stack(expected).mean())
    certain = torch.log(torch.eye(5, dtype=torch.float64)[torch.full((1, 16), 2)].clamp_min(1e-9))
    assert not background(certain, torch.tensor([2])).any()


def test_no_tile_outside_counts_as_zero():
    model, v, _ = random_model(selection="background", classes=2)
    with torch.no_grad():
        model.text[0] = 0.0
        model.bias0.zero_()
        model.bias2.zero_()
    predicted = model(v).log_p[2].argmax(-1)
    for label in (0, 1):
        inside = (predicted == label).all(1)
        alone = (
            model.losses(v[inside], torch.full((int(inside.sum()),), label))
            if inside.any()
            else {"ood": torch.zeros(())}
        )
        assert alone["ood"].item() == 0


def test_without_lower_scales_all_embeddings_are_those_of_the_fine_tiles():
    model, v, y = random_model(lower_scales=False)
    scales = model(v)
    h2 = scales.h2.gather(1, model.select(scales)[..., None].expand(-1, -1, 16))
    expected = -sum(entropy(patch_probabilities(h2, text, tau=0.1)) for text in model.texts()).mean()
    torch.testing.assert_close(model.losses(v, y)["ood"], expected)


def test_weight_and_absence_of_the_ood_loss():
    model, v, y = random_model()
    once, thrice = model.losses(v, y), model.losses(v, y, ood_weight=3.0)
    torch.testing.assert_close(thrice["ood"], 3 * once["ood"])
    assert set(model.losses(v, y, ood_weight=0.0)) == {"id"}
    assert set(random_model(selection="none")[0].losses(v, y)) == {"id"}


def test_a_hot_temperature_gives_the_limits_of_both_losses():
    model, v, y = random_model()
    model.tau = 1e9
    found, scales = model.losses(v, y), model(v)
    kept = [math.log(4) - scales.keep1.sum(1).log(), math.log(16) - scales.keep2.sum(1).log()]
    torch.testing.assert_close(found["ood"].item(), -3 * math.log(5), rtol=1e-6, atol=0)
    torch.testing.assert_close(found["id"].item(), float(3 * math.log(5) + sum(kept).mean()), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"selection": "worst"}, "selection='worst'"),
        ({"adapter": "two"}, "adapter='two'"),
        ({"tau": 0.0}, "tau=0"),
        ({"k": 0}, "k=0"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        HVLModel(torch.eye(3), **options)
