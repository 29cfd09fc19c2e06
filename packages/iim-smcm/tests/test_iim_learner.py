import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ood_core import create_backbone
from ood_core.errors import UsageError
from ood_core.training import train
from ood_iim.functional import id_logits
from ood_iim.learner import PromptLearner, learning_rate

NAMES = ["dog", "polar bear", "great white shark"]


@pytest.fixture(scope="module")
def tiny():
    return create_backbone("tiny", dtype="float32")


def golden_learner(golden_clip, golden_steps):
    names = [str(name) for name in golden_steps["classnames"]]
    learner = PromptLearner(golden_clip, names, negatives=3)
    learner.load({name: torch.from_numpy(golden_steps[key]) for name, key in START.items()})
    return learner


START = {"context": "local_ctx0", "negative_context": "neg_ctx0"}
LEARNED = {"context": "local_ctx", "negative_context": "neg_ctx", "text_projection": "text_projection"}


def test_golden_learning_rates(golden_losses):
    ours = [learning_rate(epoch, peak=2.5e-4, epochs=50) for epoch in range(50)]
    np.testing.assert_allclose(ours, golden_losses["lr_per_epoch"], rtol=1e-9)


def test_golden_steps(golden_clip, golden_steps):
    """Two SGD steps of the released code: losses, gradients and parameters."""
    learner = golden_learner(golden_clip, golden_steps)
    local = F.normalize(torch.from_numpy(golden_steps["local_raw"]), dim=-1)
    labels, k = torch.from_numpy(golden_steps["label"]), int(golden_steps["topk"])
    optimizer = torch.optim.SGD(learner.learned().values(), lr=2.5e-4, momentum=0.9, weight_decay=5e-4)
    for step in range(2):
        terms = learner.losses(local, labels, k=k, form="released")
        diagonal = 1 / (len(learner.names) - 1) + 1 / 2  # the released L_div counts i = j
        ours = [terms["positive"], terms["negative"] / 5, terms["diversity"] / 0.5 + diagonal]
        expected = golden_steps["losses"][step]
        np.testing.assert_allclose(torch.stack(ours).detach(), expected[:3], rtol=1e-9, atol=1e-8)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        if step == 0:
            for name, key in LEARNED.items():
                gradient = dict(learner.named_parameters())[name].grad
                np.testing.assert_allclose(gradient, golden_steps[f"grad_{key}"], rtol=1e-9, atol=1e-8)
        optimizer.step()
        for name, key in LEARNED.items():
            value = dict(learner.named_parameters())[name].detach()
            np.testing.assert_allclose(value, golden_steps[f"{key}{step + 1}"], rtol=1e-9, atol=1e-9)


def test_golden_evaluation_logits(golden_clip, golden_steps):
    learner = golden_learner(golden_clip, golden_steps)
    local = F.normalize(torch.from_numpy(golden_steps["local_raw"]), dim=-1)
    with torch.no_grad():
        text, negatives = learner()
    np.testing.assert_allclose(100 * local @ text.T, golden_steps["eval_logits_local"], rtol=1e-9, atol=1e-8)
    np.testing.assert_allclose(100 * local @ negatives.T, golden_steps["eval_logits_neg"], rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_micro_batches_change_neither_features_nor_gradients(most):
    backbone = create_backbone("tiny", dtype="float64")
    whole, parts = (PromptLearner(backbone, NAMES, negatives=4, max_prompt_batch=b) for b in (None, most))
    for learner in (whole, parts):
        text, negatives = learner()
        torch.cat([text, negatives]).sin().sum().backward()
    torch.testing.assert_close(whole()[0], parts()[0], rtol=1e-10, atol=1e-12)
    for name, value in whole.named_parameters():
        torch.testing.assert_close(value.grad, dict(parts.named_parameters())[name].grad, rtol=1e-9, atol=1e-11)


def test_equal_seeds_start_equal_and_others_do_not(tiny):
    first, again, other = (PromptLearner(tiny, NAMES, negatives=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.context, again.context)
    assert not torch.equal(first.context, other.context)
    assert first.context.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(first.text_projection, tiny.text_projection)


def test_a_shared_context_is_the_same_for_every_class(tiny):
    shared = PromptLearner(tiny, NAMES, negatives=2, shared_context=True)
    assert shared.context.shape == (16, 192)
    assert shared()[0].shape == (3, 192)


def test_words_start_the_context(tiny):
    learner = PromptLearner(tiny, NAMES, negatives=2, context_init="a photo of a")
    assert learner.context.shape[1] == learner.negative_context.shape[1] == len("a photo of a")  # bytes are tokens
    assert torch.equal(learner.context[0], learner.context[1])
    text = tiny.encode_text([f"a photo of a{name}." for name in NAMES])
    torch.testing.assert_close(learner()[0].detach(), text, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="holds no word"):
        PromptLearner(tiny, NAMES, context_init="")


def test_a_frozen_projection_stays(tiny):
    learner = PromptLearner(tiny, NAMES, negatives=2, train_text_projection=False)
    assert set(learner.learned()) == {"context", "negative_context"}


def test_ten_steps_on_one_batch_reduce_the_loss(tiny):
    learner = PromptLearner(tiny, NAMES, negatives=5, seed=3)
    local = F.normalize(torch.randn(4, 16, 192, generator=torch.Generator().manual_seed(0)), dim=-1)
    labels = torch.tensor([0, 1, 2, 0])
    history = train(
        learner.learned(),
        lambda rows, epoch: learner.losses(local[rows], labels[rows], k=4),
        size=4,
        epochs=10,
        batch_size=4,
        optimizer=torch.optim.SGD(learner.learned().values(), lr=0.002, momentum=0.9),
        learning_rate=lambda epoch: 0.002,
        seed=0,
    )
    assert history[-1]["loss"] < history[0]["loss"]


def test_names_that_are_too_long_are_refused_at_once(tiny):
    with pytest.raises(ValueError, match="takes 77"):
        PromptLearner(tiny, ["dog", "cat " * 30])


def test_tensors_of_another_class_list_are_refused(tiny):
    learner = PromptLearner(tiny, NAMES, negatives=2)
    with pytest.raises(UsageError, match=r"context is \[4, 16, 192\], but 3 classes"):
        learner.load({"context": torch.zeros(4, 16, 192)})


def test_id_logits_need_no_learning(tiny):
    text, _ = PromptLearner(tiny, NAMES, negatives=0)()
    assert id_logits(text.detach(), text.detach()[:, None], text.detach(), text.detach(), k=1).argmax(1).tolist() == [
        0,
        1,
        2,
    ]
