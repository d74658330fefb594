"""The same numbers as pytorch-metric-learning's, lightly's and scikit-learn's, on the same embeddings."""

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from pytorch_metric_learning import distances, miners
from pytorch_metric_learning import losses as peers
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from sklearn.neighbors import KNeighborsClassifier

from lightning_modules import losses
from lightning_modules.losses.distances import CosineDistance, EuclideanDistance
from lightning_modules.losses.triplets import active_counts
from lightning_modules.retrieval import STATISTICS, retrieval_statistics

MARGIN = 0.2
SPHERE = EuclideanDistance(normalize=True)  # the peer's default distance


def batch(size=96, classes=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 16, generator=generator)
    labels = torch.randint(classes, (size,), generator=generator)
    return centres[labels] + torch.randn(size, 16, generator=generator), labels


def assert_same(ours, theirs):
    gradients = []
    for loss in (ours, theirs):
        z, labels = batch()
        z.requires_grad_()
        value = loss(z, labels)
        value.backward()
        gradients.append((value.detach(), z.grad))
    assert gradients[0][0] > 0
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_all_triplets():
    assert_same(losses.TripletMarginLoss("all", MARGIN, SPHERE), peers.TripletMarginLoss(MARGIN))


def test_semihard_triplets():
    miner, loss = miners.TripletMarginMiner(MARGIN, type_of_triplets="semihard"), peers.TripletMarginLoss(MARGIN)
    assert_same(losses.TripletMarginLoss("semihard", MARGIN, SPHERE), lambda z, y: loss(z, y, miner(z, y)))
    z, labels = batch()
    expected = torch.zeros(len(z), len(z))
    anchors, positives, negatives = miner(z, labels)
    expected.index_put_((anchors, positives), torch.ones(len(anchors)), accumulate=True)
    expected.index_put_((anchors, negatives), -torch.ones(len(anchors)), accumulate=True)
    assert len(anchors) and torch.equal(active_counts(SPHERE.matrix(z), labels, MARGIN, semihard=True), expected)


def test_batch_hard_triplets():
    miner = miners.BatchHardMiner()
    loss = peers.TripletMarginLoss(MARGIN, reducer=peers.TripletMarginLoss().reducer.__class__())
    z, labels = batch()
    triplets = miner(z, labels)
    distance = SPHERE.matrix(z)
    active = distance[triplets[0], triplets[1]] - distance[triplets[0], triplets[2]] + MARGIN > 0
    assert active.all()  # so that the peer's mean over the losses above 0 is ours over all anchors
    assert_same(losses.TripletMarginLoss("hard", MARGIN, SPHERE), lambda z, y: loss(z, y, miner(z, y)))


def test_supcon_of_two_views_is_ntxent():
    z = torch.randn(48, 2, 16, generator=torch.Generator().manual_seed(0))
    ours, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    one = losses.SupConLoss(0.2)(ours.flatten(0, 1), torch.arange(48).repeat_interleave(2))
    two = NTXentLoss(0.2)(theirs[:, 0], theirs[:, 1])
    for value in (one, two):
        value.backward()
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_supcon():
    assert_same(losses.SupConLoss(0.1), peers.SupConLoss(0.1))


def test_cosine_distance_is_one_minus_theirs():
    z, _ = batch()
    torch.testing.assert_close(CosineDistance().matrix(z), 1 - distances.CosineSimilarity()(z), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queries, bank", [(40, 300), (7, 30)])
def test_nearest_neighbours_and_retrieval(queries, bank):
    (x, y), (ref, ref_labels) = batch(queries, seed=0), batch(bank, seed=0)
    ref = ref + 0.3 * torch.randn(ref.shape, generator=torch.Generator().manual_seed(1))
    found = dict(zip(STATISTICS, retrieval_statistics(x, y, ref, ref_labels, 6, k=9, temperature=0.2).T))
    calculator = AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r"),
        k="max_bin_count",
        knn_func=CustomKNN(distances.CosineSimilarity()),
        device=torch.device("cpu"),
    )
    theirs = calculator.get_accuracy(x, y, ref, ref_labels, ref_includes_query=False)
    for ours, name in (
        ("precision_at_1", "precision_at_1"),
        ("r_precision", "r_precision"),
        ("map_at_r", "mean_average_precision_at_r"),
    ):
        assert float(found[ours].mean()) == pytest.approx(theirs[name], abs=1e-6)
    assert 0 < float(found["map_at_r"].mean()) < 1

    def weights(cosine_distance):
        return torch.from_numpy((1 - cosine_distance) / 0.2).exp().numpy()

    nearest = KNeighborsClassifier(9, weights=weights, metric="cosine").fit(ref.numpy(), ref_labels.numpy())
    expected = torch.from_numpy(nearest.predict(x.numpy())) == y
    assert torch.equal(found["knn_accuracy"].bool(), expected)


def test_alignment_and_uniformity_equal_their_definition():
    (x, y), (ref, ref_labels) = batch(20), batch(50, seed=1)
    found = dict(zip(STATISTICS, retrieval_statistics(x, y, ref, ref_labels, 6).T))
    squares = torch.cdist(F.normalize(x).double(), F.normalize(ref).double()).square()
    same = y[:, None] == ref_labels
    torch.testing.assert_close(found["alignment"].double(), (squares * same).sum(1) / same.sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["uniformity"].double(), squares.mul(-2).exp().mean(1), rtol=1e-5, atol=1e-5)


def test_a_class_that_the_bank_lacks_and_fewer_images_than_neighbours():
    found = retrieval_statistics(torch.eye(3), torch.tensor([0, 1, 2]), torch.eye(3)[:2], torch.tensor([1, 1]), 3, k=20)
    assert found[:, 2:4].tolist() == [[0, 0], [1, 1], [0, 0]]
    assert found[:, 0].tolist() == [0, 1, 0]
