"""The training loop: against a loop written out here, resumed, damaged, and shared among processes."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from ood_core.errors import DataError, UsageError
from ood_core.training import train
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

SIZE, WIDTH = 11, 4
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1.0, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1.0, weight_decay=1e-2),
}
optimizers = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def rate(epoch):
    return 0.05 / (1 + epoch)


class Regression:
    """Linear regression; the second term is no mean over the batch."""

    def __init__(self, *, fails_in=None):
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = (torch.randn(SIZE, n, generator=generator) for n in (WIDTH, 1))
        self.parameters = {
            "weight": nn.Parameter(torch.randn(WIDTH, 1, generator=generator)),
            "bias": nn.Parameter(torch.zeros(1)),
        }
        self.fails_in, self.seen = fails_in, []

    def losses(self, rows, epoch):
        if epoch == self.fails_in:
            raise KeyboardInterrupt
        self.seen.append((epoch, rows.tolist()))
        error = self.x[rows] @ self.parameters["weight"] + self.parameters["bias"] - self.y[rows]
        return {"error": error.square().mean(), "norm": 0.1 * self.parameters["weight"].square().sum()}

    def train(self, *, optimizer="sgd", epochs=4, batch_size=4, seed=3, **options):
        made = OPTIMIZERS[optimizer](self.parameters.values())
        return train(
            self.parameters,
            self.losses,
            size=SIZE,
            epochs=epochs,
            batch_size=batch_size,
            optimizer=made,
            learning_rate=rate,
            seed=seed,
            **options,
        )

    @property
    def values(self):
        return torch.cat([value.detach().flatten() for value in self.parameters.values()])


def test_a_pair_counts_as_the_quotient_over_the_batch():
    class Pooled(Regression):
        """Squares of even rows, averaged over these; 0 in a batch without one."""

        pair = True

        def losses(self, rows, epoch):
            even = rows % 2 == 0
            squares = (self.x[rows] @ self.parameters["weight"]).square()[:, 0]
            total, count = squares[even].sum(), even.sum()
            return {"even": (total, count) if self.pair else total / max(1, count.item())}

    for batch_size in (1, 4):
        ours, plain = Pooled(), Pooled()
        plain.pair = False
        assert ours.train(batch_size=batch_size) == plain.train(batch_size=batch_size)
        assert torch.equal(ours.values, plain.values)


@optimizers
def test_it_is_the_plain_loop(optimizer):
    ours, plain = Regression(), Regression()
    history = ours.train(optimizer=optimizer)
    made = OPTIMIZERS[optimizer](plain.parameters.values())
    for epoch in range(4):
        for group in made.param_groups:
            group["lr"] = rate(epoch)
        steps = []
        for rows in (rows for at, rows in ours.seen if at == epoch):
            made.zero_grad()
            terms = plain.losses(torch.tensor(rows), epoch)
            sum(terms.values()).backward()
            made.step()
            steps.append({name: term.item() for name, term in terms.items()})
        means = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
        assert history[epoch] == pytest.approx(
            means | {"loss": sum(means.values()), "learning_rate": rate(epoch)}, rel=1e-6
        )
    torch.testing.assert_close(ours.values, plain.values, rtol=1e-6, atol=0)


def test_every_epoch_visits_every_row_once_in_an_order_of_its_own():
    run, again, other = Regression(), Regression(), Regression()
    run.train()
    again.train()
    other.train(seed=4)
    orders = [[row for at, rows in run.seen if at == epoch for row in rows] for epoch in range(4)]
    assert all(sorted(order) == list(range(SIZE)) for order in orders)
    assert len(set(map(tuple, orders))) == 4
    assert [len(rows) for _, rows in run.seen[:3]] == [4, 4, 3]
    assert again.seen == run.seen
    assert other.seen != run.seen


def test_what_an_epoch_will_ask_for_is_announced():
    announced, asked = [], []
    weight = nn.Parameter(torch.ones(1))

    def losses(rows, epoch):
        asked.append((epoch, rows.tolist()))
        return {"square": weight.square().sum()}

    def before(epoch, batches):
        announced.extend((epoch, rows.tolist()) for rows in batches)
        assert len(asked) == epoch * 3

    optimizer = torch.optim.SGD([weight], lr=0.1)
    options = {"size": 11, "epochs": 2, "batch_size": 4, "optimizer": optimizer, "learning_rate": rate, "seed": 0}
    train({"weight": weight}, losses, **options, before_epoch=before)
    assert announced == asked
    assert len(asked) == 6


@pytest.mark.parametrize(
    ("batch_size", "drop_last", "sizes"),
    [(4, True, [4, 4]), (5, True, [5, 5]), (11, True, [11]), (32, True, [11]), (32, False, [11]), (1, True, [1] * 11)],
)
def test_drop_last_leaves_out_a_smaller_batch_unless_it_is_the_only_one(batch_size, drop_last, sizes):
    run = Regression()
    run.train(epochs=1, batch_size=batch_size, drop_last=drop_last)
    assert [len(rows) for _, rows in run.seen] == sizes


def test_a_parameter_without_gradient_still_decays():
    # As in several processes, where an absent gradient cannot be told from that of rows computed elsewhere.
    run = Regression()
    run.parameters["idle"] = nn.Parameter(torch.ones(1))
    run.train(epochs=1, batch_size=SIZE)
    assert run.parameters["idle"].item() == pytest.approx(1 - rate(0) * 1e-2)


def test_the_rate_may_change_with_every_step():
    asked = []

    def cosine(epoch):
        asked.append(epoch)
        return 0.1 * (1 - epoch / 2)

    plain = nn.Parameter(torch.ones(1))
    history = train(
        {"w": plain},
        lambda rows, epoch: {"w": plain.sum()},
        size=3,
        epochs=2,
        batch_size=2,
        optimizer=torch.optim.SGD([plain], lr=1.0),
        learning_rate=cosine,
        per_step=True,
        seed=0,
    )
    assert asked == [0, 0.5, 1, 1.5]
    assert plain.item() == pytest.approx(1 - 0.1 * (1 + 0.75 + 0.5 + 0.25))
    assert history[-1]["learning_rate"] == pytest.approx(0.025)


def test_nothing_to_train_on():
    parameter = nn.Parameter(torch.ones(1))
    with pytest.raises(UsageError, match="at least one labelled image"):
        train(
            {"x": parameter},
            lambda rows, epoch: {"x": parameter.sum()},
            size=0,
            epochs=1,
            batch_size=1,
            optimizer=torch.optim.SGD([parameter]),
            learning_rate=rate,
            seed=0,
        )


# ---- checkpoints


@optimizers
@pytest.mark.parametrize("stopped_in", [1, 3])
def test_a_resumed_run_is_bit_identical(optimizer, stopped_in, tmp_path):
    file, whole = tmp_path / "runs" / "checkpoint.safetensors", Regression()
    history = whole.train(optimizer=optimizer)
    stopped = Regression(fails_in=stopped_in)
    with pytest.raises(KeyboardInterrupt):
        stopped.train(optimizer=optimizer, checkpoint=file)
    resumed = Regression()
    assert resumed.train(optimizer=optimizer, checkpoint=file) == history
    assert {epoch for epoch, _ in resumed.seen} == set(range(stopped_in, 4))
    assert torch.equal(resumed.values, whole.values)
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_finished_run_is_read_back_and_goes_on_to_more_epochs(tmp_path):
    file, run, again, longer, whole = tmp_path / "checkpoint", *(Regression() for _ in range(4))
    history = run.train(checkpoint=file)
    assert again.train(checkpoint=str(file)) == history
    assert not again.seen
    assert torch.equal(again.values, run.values)
    longer.train(checkpoint=file, epochs=6)
    whole.train(epochs=6)
    assert torch.equal(longer.values, whole.values)
    with pytest.raises(UsageError, match="holds 6 epochs, more than the 2 asked for"):
        Regression().train(checkpoint=file, epochs=2)


def test_without_resume_it_starts_anew(tmp_path):
    file, run = tmp_path / "checkpoint", Regression()
    run.train(checkpoint=file, seed=1)
    anew = Regression()
    anew.train(checkpoint=file, seed=2, resume=False)
    assert len(anew.seen) == 4 * 3
    with safe_open(file, "pt") as saved:
        assert json.loads(saved.metadata()["recipe"])["seed"] == 2


@pytest.mark.parametrize(
    ("optimizer", "state"),
    [("sgd", ["momentum_buffer"]), ("adamw", ["exp_avg", "exp_avg_sq", "step"])],
)
def test_a_checkpoint_holds_the_parameters_and_the_optimisers_state_only(optimizer, state, tmp_path):
    run = Regression()
    history = run.train(optimizer=optimizer, checkpoint=tmp_path / "checkpoint", recipe={"rate": 0.1})
    tensors = load_file(tmp_path / "checkpoint")
    expected = {"parameter.weight", "parameter.bias"} | {f"optimizer.{i}.{name}" for i in range(2) for name in state}
    assert set(tensors) == expected
    assert torch.equal(tensors["parameter.weight"], run.parameters["weight"])
    with safe_open(tmp_path / "checkpoint", "pt") as saved:
        metadata = saved.metadata()
    assert json.loads(metadata["history"]) == history
    assert json.loads(metadata["recipe"])["rate"] == 0.1


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"seed": 4}, "seed"),
        ({"batch_size": 5}, "batch_size"),
        ({"drop_last": True}, "drop_last"),
        ({"optimizer": "adamw"}, "optimizer"),
        ({"recipe": {"classes": ["dog", "cat"], "k": 4}}, "classes"),
        ({"recipe": {"classes": ["dog"], "k": 5, "alpha": 1}}, "alpha, k"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_by_name(changed, named, tmp_path):
    usual = {"recipe": {"classes": ["dog"], "k": 4}, "checkpoint": tmp_path / "checkpoint"}
    Regression().train(epochs=1, **usual)
    before = (tmp_path / "checkpoint").read_bytes()
    with pytest.raises(UsageError, match=rf"other settings \({named}\): remove it, or give another"):
        Regression().train(**usual | changed)
    assert (tmp_path / "checkpoint").read_bytes() == before


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path):
    Regression().train(epochs=1, checkpoint=tmp_path / "checkpoint")
    wider = Regression()
    wider.parameters["bias"] = nn.Parameter(torch.zeros(2))
    with pytest.raises(UsageError, match=r"other settings \(parameters\)"):
        wider.train(checkpoint=tmp_path / "checkpoint")


def _text(file):
    file.write_text("not a checkpoint")


def _cut(file):
    file.write_bytes(file.read_bytes()[:-10])


def _foreign(file):
    save_file({"weight": torch.ones(WIDTH, 1)}, file)


def _other_metadata(file):
    save_file(load_file(file), file, {"format": "pt"})


@pytest.mark.parametrize("damage", [_text, _cut, _foreign, _other_metadata])
def test_a_file_that_is_no_checkpoint_is_said_to_be_none(damage, tmp_path):
    file, run = tmp_path / "checkpoint", Regression()
    Regression().train(epochs=1, checkpoint=file)
    damage(file)
    before = run.values
    with pytest.raises(DataError, match=r"checkpoint is no checkpoint of a training .*: remove it to start anew"):
        run.train(checkpoint=file)
    assert torch.equal(run.values, before)


# ---- divergence


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_longer_finite_stops_the_run(bad, tmp_path):
    class Diverging(Regression):
        def losses(self, rows, epoch):
            terms = super().losses(rows, epoch)
            return terms | {"error": terms["error"] * (bad if epoch == 2 else 1)}

    file = tmp_path / "checkpoint"
    words = rf"The loss is no longer finite in epoch 3 .*lower the learning rate \({rate(2):g} now\)"
    with pytest.raises(DataError, match=words):
        Diverging().train(checkpoint=file)
    with safe_open(file, "pt") as saved:
        assert len(json.loads(saved.metadata()["history"])) == 2
    assert all(tensor.isfinite().all() for tensor in load_file(file).values())


def test_a_parameter_that_is_no_longer_finite_stops_the_run(tmp_path):
    class Steep(Regression):
        def losses(self, rows, epoch):
            return {"root": (self.parameters["bias"] * 0).sqrt().sum()}  # 0 with an infinite slope

    with pytest.raises(DataError, match="parameter 'bias' is no longer finite in epoch 1"):
        Steep().train(epochs=1, batch_size=SIZE, checkpoint=tmp_path / "checkpoint")
    assert not list(tmp_path.iterdir())


# ---- several processes

_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from test_training import SIZE, Regression
from safetensors.torch import save_file
import torch.distributed as dist

for batch_size in (5, 10):
    run = Regression()
    run.parameters["idle"] = torch.nn.Parameter(torch.ones(1))
    history = run.train(batch_size=batch_size, checkpoint=f"{sys.argv[2]}/{batch_size}")
    assert all(len(rows) <= batch_size // 2 + 1 for _, rows in run.seen)
    rank, resumed = dist.get_rank(), Regression()
    resumed.parameters["idle"] = torch.nn.Parameter(torch.zeros(1))
    assert resumed.train(batch_size=batch_size, checkpoint=f"{sys.argv[2]}/{batch_size}") == history
    assert not resumed.seen
    assert torch.equal(resumed.values, run.values)
    save_file({"values": run.values, "loss": torch.tensor([epoch["loss"] for epoch in history], dtype=torch.float64)},
        f"{sys.argv[2]}/{batch_size}-{rank}")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    """Batches of 5, 5 and 1 row, and of 10 and 1: shares differ, and the last batch has fewer rows than processes."""
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    here = os.path.dirname(__file__)
    done = subprocess.run(
        [sys.executable, *launcher, script, here, tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for batch_size in (5, 10):
        alone = Regression()
        alone.parameters["idle"] = nn.Parameter(torch.ones(1))
        history = alone.train(batch_size=batch_size)
        losses = torch.tensor([epoch["loss"] for epoch in history], dtype=torch.float64)
        for rank in range(2):
            saved = load_file(tmp_path / f"{batch_size}-{rank}")
            torch.testing.assert_close(saved["values"], alone.values, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(saved["loss"], losses, rtol=1e-6, atol=0)


def test_only_the_first_process_draws_a_bar(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr("ood_core.training._join_processes", lambda device: (1, 1))
    for progress in (None, True):
        Regression().train(epochs=1, progress=progress)
    assert not capsys.readouterr().err
    monkeypatch.setattr("ood_core.training._join_processes", lambda device: (0, 1))
    Regression().train(epochs=1, progress=False)
    assert not capsys.readouterr().err
    Regression().train(epochs=1, progress=True)
    assert "norm" in capsys.readouterr().err
