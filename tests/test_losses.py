"""Every loss against its definition, written out pair by pair and triplet by triplet in float64."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cosine_similarity

from errors import InputError
from lightning_modules import FastEncoder, TripletEncoder, losses
from lightning_modules.losses import functional
from lightning_modules.losses.distances import CosineDistance, EuclideanDistance, MahalanobisDistance
from lightning_modules.losses.functional import numbered_by_place
from lightning_modules.losses.triplets import Classes, active_counts, hardest_triplets, random_triplets
from lightning_modules.triplet_encoder import nearest_labels

DISTANCES = {
    "euclidean": EuclideanDistance(),
    "squared": EuclideanDistance(squared=True),
    "sphere": EuclideanDistance(normalize=True),
    "cosine": CosineDistance(),
    "mahalanobis": MahalanobisDistance(5),
}
EVERY_LOSS = [
    *(losses.TripletMarginLoss(triplets, 0.5) for triplets in ("random", "hard", "semihard", "all")),
    *(losses.SoftMarginTripletLoss(triplets) for triplets in ("random", "hard")),
    losses.LMNNLoss(),
    losses.MultiNegativeLoss(),
    losses.SupConLoss(),
    losses.SupConLoss(decoupled=True),
    losses.PrototypicalLoss(),
    losses.PairwiseContrastiveLoss(),
]
NAMES = [f"{type(loss).__name__} {getattr(loss, 'triplets', '')}" for loss in EVERY_LOSS]


def batch(size=14, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    return z, torch.randint(classes, (size,), generator=generator)


def every_triplet(labels):
    labels, indices = labels.tolist(), range(len(labels))
    for a in indices:
        for p in indices:
            for n in indices:
                if p != a and labels[p] == labels[a] and labels[n] != labels[a]:
                    yield a, p, n


def slow_distance(name, x, y):
    if name == "cosine":
        return 1 - (x @ y) / (x.norm() * y.norm())
    if name == "sphere":
        x, y = x / x.norm(), y / y.norm()
    if name == "mahalanobis":
        x, y = DISTANCES[name].factor @ x, DISTANCES[name].factor @ y
    return (x - y).square().sum() if name == "squared" else (x - y).norm()


def check(fast, slow, z):
    """Compares value and gradient of fast(z) and slow(z)."""
    x, y = z.clone().requires_grad_(), z.clone().requires_grad_()
    one, two = fast(x), slow(y)
    one.backward()
    two.backward()
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-8, atol=1e-11)
    return float(two.detach())


@pytest.fixture(autouse=True, scope="module")
def oblique_metric():
    metric = DISTANCES["mahalanobis"].double()
    with torch.no_grad():
        metric.factor.copy_(torch.randn(5, 5, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("name", DISTANCES)
def test_distances_equal_their_definition(name):
    z, _ = batch()
    pairs = [(i, j) for i in range(len(z)) for j in range(len(z)) if i != j]
    i, j = map(list, zip(*pairs))
    weights = torch.rand(len(pairs), dtype=torch.float64)

    def slow(z):
        return (weights * torch.stack([slow_distance(name, z[a], z[b]) for a, b in pairs])).sum()

    check(lambda z: (weights * DISTANCES[name].matrix(z)[i, j]).sum(), slow, z)
    check(lambda z: (weights * DISTANCES[name].pairs(z[i], z[j])).sum(), slow, z)


@pytest.mark.parametrize("name", DISTANCES)
def test_equal_embeddings_have_a_finite_gradient(name):
    z = torch.ones(4, 5, dtype=torch.float64, requires_grad=True)
    (DISTANCES[name].matrix(z).sum() + DISTANCES[name].pairs(z[:2], z[2:]).sum()).backward()
    assert z.grad.isfinite().all()


def test_close_points_far_from_the_origin_keep_their_distance_in_float32():
    z = 1000 + torch.tensor([[0.0, 0], [3e-2, 4e-2]])
    assert float(EuclideanDistance().matrix(z)[0, 1]) == pytest.approx(5e-2, rel=1e-2)


def test_mahalanobis_is_a_metric_of_a_positive_semidefinite_matrix_and_euclidean_behind_a_linear_layer():
    metric = DISTANCES["mahalanobis"]
    factor, (z, _) = metric.factor.detach(), batch()
    m = factor.T @ factor
    assert torch.linalg.eigvalsh(m).min() >= 0 and torch.equal(m, m.T)
    linear = torch.nn.Linear(5, 5, bias=False, dtype=torch.float64)
    linear.weight.data.copy_(factor)
    torch.testing.assert_close(metric.matrix(z), EuclideanDistance().matrix(linear(z)))
    difference = z[0] - z[1]
    assert float(metric.matrix(z)[0, 1].detach()) == pytest.approx(float((difference @ m @ difference).sqrt()))
    losses.TripletMarginLoss("all", 1.0, metric)(*batch()).backward()
    assert metric.factor.grad.norm() > 0  # learned


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("triplets", ["semihard", "all"])
def test_dense_margin_loss_equals_the_cube(name, classes, triplets):
    z, labels = batch(classes=classes)
    margin = 0.3

    def slow(z):
        d = [[slow_distance(name, x, y) if x is not y else 0.0 for y in z] for x in z]
        terms = [
            d[a][p] - d[a][n] + margin for a, p, n in every_triplet(labels) if triplets == "all" or d[a][n] > d[a][p]
        ]
        active = [t for t in terms if t > 0]
        assert 0 < len(active) < len(terms)
        return torch.stack(active).mean()

    check(lambda z: losses.TripletMarginLoss(triplets, margin, DISTANCES[name])(z, labels), slow, z)


@pytest.mark.parametrize("block", [1, 30, 2**21])
@pytest.mark.parametrize(
    "options, ties",
    [({}, False), ({"semihard": True}, False), ({"neighbours": 2}, False), ({}, True), ({"semihard": True}, True)],
)
def test_active_counts_equal_a_count(options, ties, block, monkeypatch):
    """With `ties`, whole numbers: distances that are equal, or differ by the margin."""
    monkeypatch.setattr("lightning_modules.losses.triplets.ROW_BLOCK", block)
    z, labels = batch(20, 3, seed=5)
    d, margin = EuclideanDistance().matrix(z), 0.4
    if ties:
        x = z[:, :1].mul(3).round()
        d, margin = (x - x.T).abs(), 2
    expected, to, names = torch.zeros_like(d), d.tolist(), labels.tolist()
    for a, p, n in every_triplet(labels):
        nearer = sum(names[q] == names[a] and q != a and to[a][q] < to[a][p] for q in range(20))
        if to[a][p] - to[a][n] + margin > 0 and not (options.get("semihard") and to[a][n] <= to[a][p]):
            if nearer < options.get("neighbours", 99):
                expected[a, p] += 1
                expected[a, n] -= 1
    assert torch.equal(active_counts(d, labels, margin, **options), expected)
    assert expected.any()


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize(
    "loss", [losses.TripletMarginLoss("hard", 0.5), losses.SoftMarginTripletLoss("hard")], ids=["margin", "soft"]
)
def test_batch_hard_equals_its_definition(name, loss):
    z, labels = batch()
    loss.distance = DISTANCES[name]

    def slow(z):
        terms = []
        for a in range(len(z)):
            to = {j: slow_distance(name, z[a], z[j]) for j in range(len(z)) if j != a}
            same = [d for j, d in to.items() if labels[j] == labels[a]]
            other = [d for j, d in to.items() if labels[j] != labels[a]]
            if same and other:
                terms.append(max(same) - min(other))
        terms = torch.stack(terms)
        return (terms + 0.5).relu().mean() if isinstance(loss, losses.TripletMarginLoss) else terms.exp().log1p().mean()

    check(lambda z: loss(z, labels), slow, z)


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize(
    "loss", [losses.TripletMarginLoss("random", 0.5), losses.SoftMarginTripletLoss("random")], ids=["margin", "soft"]
)
def test_random_triplets_losses_equal_their_definition(name, loss):
    z, labels = batch()
    loss.distance = DISTANCES[name]
    drawn = zip(range(len(labels)), *(x.tolist() for x in random_triplets(labels, torch.Generator().manual_seed(1))))
    triplets = [(a, p, n) for a, p, n, valid in drawn if valid]
    assert 0 < len(triplets)

    def slow(z):
        terms = torch.stack([slow_distance(name, z[a], z[p]) - slow_distance(name, z[a], z[n]) for a, p, n in triplets])
        return (terms + 0.5).relu().mean() if isinstance(loss, losses.TripletMarginLoss) else terms.exp().log1p().mean()

    check(lambda z: loss(z, labels, torch.Generator().manual_seed(1)), slow, z)


@pytest.mark.parametrize("neighbours", [1, 2, 50])
def test_lmnn_equals_its_definition(neighbours):
    z, labels = batch()

    def slow(z):
        pull, push, pairs = 0.0, 0.0, 0
        for i in range(len(z)):
            d = [slow_distance("squared", z[i], x) for x in z]
            same = [j for j in range(len(z)) if j != i and labels[j] == labels[i]]
            for j in sorted(same, key=lambda j: float(d[j].detach()))[:neighbours]:
                pairs += 1
                pull = pull + d[j]
                push = push + sum((1.5 + d[j] - d[x]).relu() for x in range(len(z)) if labels[x] != labels[i])
        return (0.7 * pull + 0.3 * push) / pairs

    check(lambda z: losses.LMNNLoss(1.5, 0.3, neighbours)(z, labels), slow, z)


@pytest.mark.parametrize("tau", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("classes", [2, 4, 9])
def test_multi_negative_loss_equals_its_definition(tau, classes):
    z, labels = batch(classes=classes)

    def slow(z):
        s = cosine_similarity(z[:, None], z[None], dim=2)
        pairs = {(a, p): [] for a, p, _ in every_triplet(labels)}
        for a, p, n in every_triplet(labels):
            pairs[a, p].append(torch.exp((s[a, n] - s[a, p]) / tau))
        return torch.stack([torch.log(1 + sum(terms)) for terms in pairs.values()]).mean()

    check(lambda z: functional.multi_negative_loss(z, labels, tau), slow, z)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("tau", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("classes", [2, 4, 9])
def test_supcon_equals_its_definition_with_the_mean_outside_the_logarithm(tau, classes, decoupled):
    z, labels = batch(classes=classes)

    def slow(z):
        s = cosine_similarity(z[:, None], z[None], dim=2) / tau
        terms = []
        for a in range(len(z)):
            left_out = [k for k in range(len(z)) if k == a or decoupled and labels[k] == labels[a]]
            others = torch.stack([s[a, k].exp() for k in range(len(z)) if k not in left_out]).sum()
            logs = [(s[a, p].exp() / others).log() for p in range(len(z)) if p != a and labels[p] == labels[a]]
            if logs:
                terms.append(-sum(logs) / len(logs))
        return torch.stack(terms).mean()

    check(lambda z: functional.supcon_loss(z, labels, tau, decoupled), slow, z)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("tau", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("classes", [2, 4, 9])
def test_prototypical_loss_equals_its_definition(tau, classes, smoothing):
    z, labels = batch(classes=classes)
    present = sorted(set(labels.tolist()))

    def slow(z):
        unit, terms = z / z.norm(dim=1, keepdim=True), []
        for a in range(len(z)):
            logits = {}
            for c in present:
                others = [unit[i] for i in range(len(z)) if labels[i] == c and i != a]
                if others:
                    logits[c] = cosine_similarity(z[a], sum(others), dim=0) / tau
            if int(labels[a]) in logits:
                log_p = {c: x - sum(y.exp() for y in logits.values()).log() for c, x in logits.items()}
                spread = sum(log_p.values()) / len(present)
                terms.append(-(1 - smoothing) * log_p[int(labels[a])] - smoothing * spread)
        return torch.stack(terms).mean()

    check(lambda z: functional.prototypical_loss(z, labels, tau, smoothing), slow, z)


def test_prototypical_loss_has_a_bounded_gradient_where_a_class_points_everywhere():
    z = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0.1, 1]], requires_grad=True)
    functional.prototypical_loss(z, torch.tensor([0, 0, 1, 1]), 0.1).backward()
    assert z.grad.norm() < 1e5


@pytest.mark.parametrize("tau", [0.1, 1.0])
@pytest.mark.parametrize("classes", [2, 4, 9])
def test_pairwise_contrastive_loss_equals_the_reports_equation_2(tau, classes):
    z, labels = batch(classes=classes)

    def slow(z):
        s = cosine_similarity(z[:, None], z[None], dim=2) / tau
        terms = {True: [], False: []}
        for i in range(len(z)):
            total = sum(s[i, k].exp() for k in range(len(z)) if k != i)
            for j in range(len(z)):
                if i != j:
                    p = s[i, j].exp() / total
                    same = bool(labels[i] == labels[j])
                    terms[same].append(-p.log() if same else -(1 - p).log())
        return sum(torch.stack(t).mean() for t in terms.values())

    check(lambda z: functional.pairwise_contrastive_loss(z, labels, tau), slow, z)


def test_pairwise_contrastive_loss_is_exact_where_a_probability_nears_one():
    # The nearest image is a negative, all others are far: 1 − p is the share of the others, far below one unit of p.
    z = torch.tensor([[1.0, 0], [1, 0], [-1, 0], [-1, 1e-3]], requires_grad=True)
    loss = functional.pairwise_contrastive_loss(z, torch.tensor([0, 1, 0, 1]), 0.05)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all()
    # Of the eight negative pairs, 0–1 and 2–3 in both directions have 1 − p = 2 exp(−40) / (1 + 2 exp(−40)),
    # the other four p = exp(−40); the four positive pairs have −log p = 40.
    assert float(loss.detach()) == pytest.approx(40 + 4 * (40 - math.log(2)) / 8, rel=1e-4)


@pytest.mark.parametrize(
    "function, least",
    [
        (functional.multi_negative_loss, 900),
        (functional.supcon_loss, 900),
        (functional.prototypical_loss, 400),
        (functional.pairwise_contrastive_loss, 900),
    ],
)
def test_finite_where_exp_overflows(function, least):
    z = torch.tensor([[1.0, 0], [-1, 0], [1, 1e-3], [0, 1]], requires_grad=True)
    loss = function(z, torch.tensor([0, 0, 1, 1]), 0.001)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all() and loss > least


@pytest.mark.parametrize("loss", EVERY_LOSS, ids=NAMES)
@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 2, 3]], ids=["one class", "no class twice"])
def test_without_triplets_gradients_are_finite_and_pull_nothing_apart(loss, labels):
    z = torch.randn(4, 5, requires_grad=True, generator=torch.Generator().manual_seed(0))
    value = loss(z, torch.tensor(labels), torch.Generator().manual_seed(0))
    value.backward()
    if isinstance(loss, losses.SupConLoss) and labels[1] == 0 and not loss.decoupled:
        assert value > 0  # the paper's denominator needs no negatives
    else:
        assert value == 0 and torch.equal(z.grad, torch.zeros(4, 5))


def test_a_process_without_images_evaluates_too(monkeypatch):
    module = TripletEncoder(FastEncoder([8, 8, 8]), EVERY_LOSS[0], z_dim=5).eval()
    module.trainer, logged = SimpleNamespace(state=SimpleNamespace(fn="fit")), []
    monkeypatch.setattr(module, "log", lambda name, *args, **options: logged.append(name))
    seen = module.evaluation_step("val", (torch.zeros(0, 3, 32, 32), torch.zeros(0, dtype=torch.long)), 0)
    assert seen["features"].shape == (0, 8) and logged == ["val/loss", "val/accuracy"]
    assert all(module.means[name].count == 0 for name in logged)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("loss", EVERY_LOSS, ids=NAMES)
def test_gradients_have_the_same_bits_every_time(loss, two_threads):
    # From 2¹⁵ numbers on, a CPU's threads share the work, and the default's batch of 256 × 128 has as many.
    # If `rows` were z[index], the first two or three of these gradients would differ.
    z, labels = torch.randn(512, 128, generator=torch.Generator().manual_seed(0)), torch.arange(512) % 10
    gradients = set()
    for _ in range(10):
        x = z.clone().requires_grad_()
        loss(x, labels, torch.Generator().manual_seed(0)).backward()
        gradients.add(x.grad.numpy().tobytes())
    assert len(gradients) == 1


@pytest.mark.parametrize("loss", EVERY_LOSS, ids=NAMES)
def test_embeddings_that_are_not_numbers_are_not_hidden(loss):
    z, labels = batch()
    z[3, 2] = float("nan")
    assert loss(z, labels, torch.Generator().manual_seed(0)).isnan()


@pytest.mark.parametrize("loss", [loss for loss in EVERY_LOSS if getattr(loss, "triplets", "") != "random"])
def test_order_of_the_batch_does_not_matter(loss):
    z, labels = batch()
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss(z, labels), loss(z[order], labels[order]), rtol=1e-10, atol=1e-12)


def test_anchor_without_negatives_or_positives_is_left_out_not_nan():
    z, _ = batch(4)
    value = functional.multi_negative_loss(z, torch.tensor([0, 0, 1, 2]), 0.1)
    s = cosine_similarity(z[:, None], z[None], dim=2) / 0.1
    expected = [math.log(1 + sum(math.exp(s[a, n] - s[a, p]) for n in (2, 3))) for a, p in ((0, 1), (1, 0))]
    assert value.item() == pytest.approx(sum(expected) / 2)


def test_random_triplets_are_triplets_and_uniform():
    labels = torch.tensor([0, 1, 0, 2, 1, 0])[torch.tensor([0, 2, 5, 1, 4, 3])]  # the last one has no positive
    order, seen = torch.tensor([0, 1, 2, 3, 4, 5]), {}
    for seed in range(600):
        positives, negatives, valid = random_triplets(labels, torch.Generator().manual_seed(seed))
        assert valid.tolist() == [True] * 5 + [False] and positives[5] == negatives[5] == 5
        anchors, drawn, others = order[valid], positives[valid], negatives[valid]
        assert (labels[anchors] == labels[drawn]).all() and (anchors != drawn).all()
        assert (labels[anchors] != labels[others]).all()
        for key in ((0, "p", int(positives[0])), (3, "n", int(negatives[3]))):
            seen[key] = seen.get(key, 0) + 1
    positives = [n for (_, kind, _), n in seen.items() if kind == "p"]
    negatives = [n for (_, kind, _), n in seen.items() if kind == "n"]
    assert len(positives) == 2 and min(positives) > 240  # 300 expected, standard deviation 12
    assert len(negatives) == 4 and min(negatives) > 100  # 150 expected, standard deviation 11


@pytest.mark.parametrize("loss", [loss for loss in EVERY_LOSS if getattr(loss, "triplets", "") != "random"], ids=str)
@pytest.mark.parametrize("order", ["shuffled", "by class"])
def test_blocks_of_anchors_give_the_same_value_and_gradient(loss, order, monkeypatch):
    z, labels = batch(23, 4, seed=7)
    labels = labels.sort()[0] if order == "by class" else labels
    values = []
    for matrix in (2**26, 23 * 3):  # all anchors at once, and three at a time
        monkeypatch.setattr("lightning_modules.losses.triplets.MATRIX", matrix)
        x = z.clone().requires_grad_()
        value = loss(x, labels)
        value.backward()
        values.append((value.detach(), x.grad))
    assert values[0][1].any()
    torch.testing.assert_close(*values, rtol=1e-12, atol=1e-14)


def test_blocks_of_anchors_give_a_learned_metric_the_same_gradient(monkeypatch):
    z, labels = batch(23, 4, seed=7)
    metric = DISTANCES["mahalanobis"]
    gradients = []
    for matrix in (2**26, 23 * 3):
        monkeypatch.setattr("lightning_modules.losses.triplets.MATRIX", matrix)
        loss = losses.TripletMarginLoss("all", 0.5, metric)(z, labels)
        gradients += torch.autograd.grad(loss, metric.factor)
    assert gradients[0].any()
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


def test_random_triplets_follow_the_generator():
    labels = torch.arange(40) % 4
    draw = [random_triplets(labels, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(draw[0], draw[1]))
    assert not torch.equal(draw[0][1], draw[2][1])


def test_random_triplets_of_a_large_batch_are_few_numbers():
    labels = torch.arange(2**20) % 1000  # a matrix of pairs would have 2⁴⁰ numbers
    positives, negatives, valid = random_triplets(labels, torch.Generator().manual_seed(0))
    assert valid.all() and (labels[positives] == labels).all() and (labels[negatives] != labels).all()
    assert (positives != torch.arange(2**20)).all()


@pytest.mark.parametrize("loss", EVERY_LOSS, ids=NAMES)
def test_a_devices_bounds_give_the_same_value_and_gradient(loss, monkeypatch):
    """A GPU's host does not know how many classes there are, or how large they are: places are left empty."""
    z, labels = batch(23, 4, seed=7)
    values = []
    for of_a_gpu in (False, True):
        if of_a_gpu:
            monkeypatch.setattr(Classes, "largest", lambda self: len(self.size))
            monkeypatch.setattr("lightning_modules.losses.functional.number_classes", numbered_by_place)
        x = z.clone().requires_grad_()
        value = loss(x, labels, torch.Generator().manual_seed(0))
        value.backward()
        values.append((value.detach(), x.grad))
    assert values[0][1].any()
    torch.testing.assert_close(*values, rtol=1e-12, atol=1e-14)


def test_hardest_triplets_leave_out_anchors_without_a_positive_or_a_negative():
    z, _ = batch(5)
    positives, negatives, valid = hardest_triplets(EuclideanDistance().matrix(z), torch.tensor([0, 0, 1, 1, 2]))
    assert valid.tolist() == [True] * 4 + [False] and positives[:4].tolist() == [1, 0, 3, 2]
    assert not hardest_triplets(EuclideanDistance().matrix(z), torch.zeros(5))[2].any()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: losses.TripletMarginLoss(margin=0), "TripletMarginLoss margin 0: must be above 0"),
        (lambda: losses.TripletMarginLoss(margin=2, distance=CosineDistance()), "below 2, the largest CosineDistance"),
        (lambda: losses.TripletMarginLoss(margin=4, distance=EuclideanDistance(True, True)), "below 4"),
        (lambda: losses.LMNNLoss(margin=-1), "LMNNLoss margin -1"),
        (lambda: losses.LMNNLoss(push=1), "push 1"),
        (lambda: losses.LMNNLoss(neighbours=0), "neighbours 0"),
        (lambda: losses.MultiNegativeLoss(0), "temperature 0: must be above 0"),
        (lambda: losses.SupConLoss(-0.1), "temperature -0.1"),
        (lambda: losses.PrototypicalLoss(0), "temperature 0"),
        (lambda: losses.PrototypicalLoss(label_smoothing=1), "label_smoothing 1"),
        (lambda: losses.PairwiseContrastiveLoss(float("nan")), "temperature nan"),
        (lambda: MahalanobisDistance(0), "dim 0"),
    ],
)
def test_impossible_settings_are_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_an_image_alone_in_its_batch_has_no_neighbour():
    labels = torch.tensor([3])
    assert nearest_labels(torch.ones(1, 4), labels, 0, 1).tolist() == [-1]
    assert nearest_labels(torch.ones(2, 4), torch.tensor([3, 5]), 1, 1).tolist() == [3]
