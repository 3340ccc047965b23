"Imbalanced data sets, losses by group, and blocks of one class against plain loops."
import math

import numpy as np
import pytest
import torch
from torch import nn

from curvlab.curvature import Hessian
from curvlab.lab import data as sets
from curvlab.lab.imbalance import Bigram, GroupLoss, barcoded, frequency_groups, group_losses, softmax_class_blocks, step_imbalanced, word_lm, zipf_one_hot, zipf_words
from curvlab.lab.problems import Problem
from curvlab.lab.train import train
from curvlab.objective import Objective


def test_one_hot_zipf_counts():
    data = zipf_one_hot(7, 20, dtype=torch.double)
    assert data.y_train.bincount().tolist() == [math.ceil(20 / k) for k in range(1, 8)] == data.info["counts"].tolist()
    assert torch.equal(data.x_train.argmax(1), data.y_train) and data.x_train.dtype == torch.double and float(data.x_train.sum()) == len(data)


@pytest.mark.parametrize("m", [1, 4])
def test_step_groups_hold_equal_shares(m):
    data = step_imbalanced(m)
    assert len(data) == m * 2**m and data.x_train.shape[1] == (m + 1) * 2**m and len(data.info["counts"]) == 2**m - 1
    assert torch.equal(data.y_train.bincount(), data.info["counts"])
    assert data.info["group"][data.y_train].bincount().tolist() == [2**m] * m
    assert not torch.equal(step_imbalanced(m, seed=1).x_train, data.x_train)


def test_bar_codes_can_be_read_and_images_are_shared_out():
    base = sets.digits(flat=False, test=0, dtype=torch.double)
    data = barcoded(base, bits=3, copies=2, per_class=20, seed=3)
    assert data.info["counts"].tolist() == [20] * 10 + [2] * 70 and len(data) == 340
    weights = torch.tensor([1, 2, 4])
    for image, label in zip(data.x_train, data.y_train):
        code = int(((image[0, 0, :3] == base.x_train.max()) * weights).sum())
        old = int(label) if code == 0 else (int(label) - 10) // 7
        assert int(label) == (old if code == 0 else 10 + 7 * old + code - 1)
        rest = base.x_train[base.y_train == old].clone()
        rest[:, 0, 0, :3] = image[0, 0, :3]
        assert (rest == image).flatten(1).all(1).any()
    without_code = data.x_train[:, 0, 1:].flatten(1)
    assert len(without_code.unique(dim=0)) == 340             # each image is used once while there are enough


def test_bar_codes_reuse_images_only_when_they_must():
    base = sets.digits(flat=False, test=0)
    assert len(barcoded(base, bits=5, copies=10)) == 1000 + 3100


def test_rows_of_words_follow_the_law_and_the_weights():
    n, draws = 4000, 10
    data = zipf_words(n, 40, draws, exponent=1.1, signal=1.5, seed=3, dtype=torch.double)
    law = np.arange(1, 41) ** -1.1
    expected = 1 - (1 - law / law.sum()) ** draws                                  # chance that a word is among the draws
    error = np.sqrt(expected * (1 - expected) / n)
    assert (np.abs(data.info["counts"].numpy() / n - expected) < 5 * error).all()
    assert torch.equal(data.info["counts"], data.x_train.sum(0).long())
    logits = data.x_train @ data.info["weights"]
    assert abs(float(logits.std(correction=0)) - 1.5) < 1e-5
    chance = (logits - logits.mean()).sigmoid()
    cut = chance.argsort().chunk(4)                                                # calibrated in each quarter
    for part in cut:
        assert abs(float(data.y_train[part].mean() - chance[part].mean())) < 5 * 0.5 / math.sqrt(len(part))
    assert not torch.equal(zipf_words(50, 40, seed=1).x_train, zipf_words(50, 40, seed=2).x_train)


@pytest.mark.parametrize("make, word", [
    (lambda: zipf_words(draws=0), "draws=0"), (lambda: zipf_words(1), "n=1"), (lambda: zipf_one_hot(1), "classes=1"), (lambda: step_imbalanced(0), "m=0"), (lambda: barcoded(sets.digits(test=0)), "images"),
    (lambda: barcoded(sets.digits(flat=False, test=0), bits=9), "bits=9"), (lambda: barcoded(sets.digits(flat=False, test=0), per_class=500), "per_class=500"),
    (lambda: word_lm("rnn", "python"), "rnn"), (lambda: GroupLoss(torch.zeros(3), 0), "every=0")])
def test_errors_name_the_argument(make, word):
    with pytest.raises(ValueError, match=word):
        make()


def test_groups_are_cut_where_the_examples_are():
    counts = torch.tensor([1, 50, 10, 1, 10, 20, 5, 3])
    group = frequency_groups(counts, 4)
    assert group.tolist() == [3, 1, 3, 3, 3, 2, 3, 3]          # middles, from frequent to rare: 25, 60, 75, 85, 92.5, 96.5, 98.5, 99.5 of 100; group 0 stays empty
    equal = frequency_groups(torch.ones(100), 10)
    assert equal.bincount().tolist() == [10] * 10 and equal.tolist() == sorted(equal.tolist())


@pytest.mark.parametrize("sequence", [False, True])
def test_group_losses_against_a_loop(sequence):
    torch.manual_seed(0)
    model = Bigram(6).double() if sequence else nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5)).double()
    nn.init.normal_(next(model.parameters()))
    x = torch.randint(6, (25, 5)) if sequence else torch.randn(25, 4).double()
    y = torch.randint(5, (25, 5) if sequence else (25,))       # class 5 never occurs
    group = torch.tensor([0, 2, 1, 2, 0, 3])
    found = group_losses(model, x, y, group, chunk=7)
    assert model.training
    logits = model.eval()(x).detach()
    rows = (logits.transpose(1, 2) if sequence else logits).reshape(-1, 6).log_softmax(1)
    for g in range(3):
        mine = [float(-row[c]) for row, c in zip(rows, y.flatten().tolist()) if group[c] == g]
        assert abs(float(found[g]) - np.mean(mine)) < 1e-12
    assert found[3].isnan()


def test_group_loss_follows_a_run():
    data = step_imbalanced(3, dtype=torch.double)
    problem = Problem("steps", data, lambda: nn.Linear(data.x_train.shape[1], 7), nn.CrossEntropyLoss())
    watch = GroupLoss(data.info["group"], every=4)
    records = train(problem, "SGD(lr=0.1)", 10, watch=[watch], evaluate_every=4)
    at, losses = watch.table()
    assert at.tolist() == [0, 4, 8] and losses.shape == (3, 3)
    assert np.allclose(losses.mean(1), records["loss"][:3], rtol=1e-12)      # the groups hold as many examples each


def test_class_blocks_against_the_hessian():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3).double(), torch.randn(20, 4).double(), torch.randint(3, (20,))
    objective = Objective(model, nn.CrossEntropyLoss())
    objective.at(x, y)()
    norms, traces = softmax_class_blocks(model(x).detach(), x, y)
    diagonal = Hessian(objective, x, y).to_dense().diagonal()[:12].reshape(3, 4)
    assert torch.allclose(norms, model.weight.grad.norm(dim=1), rtol=1e-12) and torch.allclose(traces, diagonal.sum(1), rtol=1e-12)


def test_word_problems():
    bigram, transformer = word_lm("bigram", "python", n=20), word_lm("transformer", "python", n=20)
    x, y = transformer.data.train
    assert x.shape == y.shape == (20, 16) and transformer.make_model()(x).shape == bigram.make_model()(x).shape == (20, 500, 16)
    assert abs(bigram.evaluate(bigram.make_model())["loss"] - math.log(500)) < 1e-6
    assert abs(transformer.evaluate(transformer.make_model())["loss"] - math.log(500)) < 0.1
    assert train(transformer, "Adam(lr=1e-2)", 15).final < 0.9 * math.log(500)
