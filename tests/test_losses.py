import math

import pytest
import torch

from errors import InputError
from lightning_modules.losses import (
    MultiNegativeLoss,
    RandomTripletMarginLoss,
    multi_negative_loss,
    random_triplets,
    triplet_margin_loss,
)


def batch(size=14, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    return z, torch.randint(classes, (size,), generator=generator)


def slow_multi_negative(z, labels, tau):
    """The definition, pair by pair."""
    s = torch.nn.functional.cosine_similarity(z[:, None], z[None], dim=2)
    pairs = []
    for a in range(len(z)):
        negatives = [n for n in range(len(z)) if labels[n] != labels[a]]
        for p in range(len(z)):
            if p != a and labels[p] == labels[a]:
                pairs.append(torch.log(1 + sum(torch.exp((s[a, n] - s[a, p]) / tau) for n in negatives)))
    return torch.stack(pairs).mean()


@pytest.mark.parametrize("tau", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("classes", [2, 4, 9])
def test_multi_negative_loss_equals_its_definition(tau, classes):
    z, labels = batch(classes=classes)
    x, y = z.clone().requires_grad_(), z.clone().requires_grad_()
    fast, slow = multi_negative_loss(x, labels, tau), slow_multi_negative(y, labels, tau)
    fast.backward()
    slow.backward()
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-12)


def test_multi_negative_loss_is_finite_where_exp_overflows():
    z = torch.tensor([[1.0, 0], [-1, 0], [1, 1e-3]], requires_grad=True)
    loss = multi_negative_loss(z, torch.tensor([0, 0, 1]), 0.001)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all() and loss > 900


def test_triplet_margin_loss_equals_its_definition():
    z, labels = batch()
    x, y = z.clone().requires_grad_(), z.clone().requires_grad_()
    triplets = random_triplets(labels, torch.Generator().manual_seed(1))
    fast = triplet_margin_loss(x, triplets, margin=0.7)
    terms = [max(torch.tensor(0.0), (y[a] - y[p]).norm() - (y[a] - y[n]).norm() + 0.7) for a, p, n in zip(*triplets)]
    slow = sum(terms) / len(terms)
    fast.backward()
    slow.backward()
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)  # torch adds 1e-6 to the differences
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)


def test_random_triplets_are_triplets_and_uniform():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])  # the last one has no positive
    seen = {}
    for seed in range(600):
        anchors, positives, negatives = random_triplets(labels, torch.Generator().manual_seed(seed))
        assert anchors.tolist() == [0, 1, 2, 3, 4]
        assert (labels[anchors] == labels[positives]).all() and (anchors != positives).all()
        assert (labels[anchors] != labels[negatives]).all()
        for key in ((0, "p", int(positives[0])), (3, "n", int(negatives[3]))):
            seen[key] = seen.get(key, 0) + 1
    positives = [n for (_, kind, _), n in seen.items() if kind == "p"]
    negatives = [n for (_, kind, _), n in seen.items() if kind == "n"]
    assert len(positives) == 2 and min(positives) > 240  # 300 expected, standard deviation 12
    assert len(negatives) == 4 and min(negatives) > 100  # 150 expected, standard deviation 11


def test_random_triplets_follow_the_generator():
    labels = torch.arange(40) % 4
    draw = [random_triplets(labels, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(draw[0], draw[1]))
    assert not torch.equal(draw[0][1], draw[2][1])


@pytest.mark.parametrize("loss", [MultiNegativeLoss(), RandomTripletMarginLoss()])
@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2]])
def test_without_triplets_loss_and_gradient_are_zero(loss, labels):
    z = torch.randn(3, 4, requires_grad=True)
    value = loss(z, torch.tensor(labels))
    value.backward()
    assert value == 0 and torch.equal(z.grad, torch.zeros(3, 4))


def test_anchor_without_negatives_or_positives_is_left_out_not_nan():
    z, _ = batch(4)
    value = multi_negative_loss(z, torch.tensor([0, 0, 1, 2]), 0.1)
    s = torch.nn.functional.cosine_similarity(z[:, None], z[None], dim=2) / 0.1
    expected = [math.log(1 + sum(math.exp(s[a, n] - s[a, p]) for n in (2, 3))) for a, p in ((0, 1), (1, 0))]
    assert value.item() == pytest.approx(sum(expected) / 2)


@pytest.mark.parametrize("make", [lambda: MultiNegativeLoss(0), lambda: RandomTripletMarginLoss(-1)])
def test_impossible_settings_are_refused(make):
    with pytest.raises(InputError, match="must be above 0"):
        make()
