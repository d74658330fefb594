"""Nearest neighbours and retrieval metrics of 10,000 queries among 45,000 features, beside scikit-learn's and
pytorch-metric-learning's on the same features.

    pip install -e '.[benchmarks]' && python -m benchmarks.evaluation

Ours: the vote of the k nearest alone, as `predict` takes it, and with precision@1, R-precision, MAP@R, alignment and
uniformity in one pass, as `validate` and `test` do. scikit-learn's brute force: the vote of the same cosine neighbours
(`metric="cosine"`), and of the Euclidean ones of features normalised before, which are the same and its fast path.
pytorch-metric-learning's calculator: three retrieval metrics. The last row is what no vote can do without: the
similarities in float32 and their k largest. The metrics must agree.
"""

import argparse
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from benchmarks.common import Rows, in_turn, run, seconds, summary
from lightning_modules.retrieval import CHUNK, STATISTICS, knn_probabilities, retrieval_statistics

CLASSES, WIDTH, K, TEMPERATURE = 10, 128, 20, 0.07
PEERS = {
    "precision_at_1": "precision_at_1",
    "r_precision": "r_precision",
    "map_at_r": "mean_average_precision_at_r",
}  # our names → pytorch-metric-learning's
DRY_RUN = {"queries": 100, "bank": 400}


class Features(NamedTuple):
    """Features (N, 128) and labels (N,) of queries and of the bank that their neighbours are sought in."""

    x: Tensor
    y: Tensor
    bank: Tensor
    bank_labels: Tensor


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--queries", type=int, default=10_000, help="(default: %(default)s)")
    parser.add_argument("--bank", type=int, default=45_000, help="(default: %(default)s)")


def features(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Overlapping classes, of which kNN gets about nine in ten right."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(0))
    return 0.32 * centres[labels] + torch.randn(count, WIDTH, generator=generator), labels


def every_metric(data: Features) -> dict[str, float]:
    means = retrieval_statistics(*data, CLASSES, K, TEMPERATURE).mean(0)
    return dict(zip(STATISTICS, means.tolist()))


def vote(data: Features) -> dict[str, float]:
    shares = knn_probabilities(data.x, data.bank, data.bank_labels, CLASSES, K, TEMPERATURE)
    return {"knn_accuracy": float((shares.argmax(1) == data.y).float().mean())}


def scikit_learn(data: Features, metric: str) -> dict[str, float]:
    def weights(distance):
        similarity = 1 - distance if metric == "cosine" else 1 - distance**2 / 2
        return torch.from_numpy(similarity).div(TEMPERATURE).exp().numpy()

    nearest = KNeighborsClassifier(K, weights=weights, algorithm="brute", metric=metric, n_jobs=-1)
    nearest.fit(F.normalize(data.bank).numpy(), data.bank_labels.numpy())
    right = torch.from_numpy(nearest.predict(F.normalize(data.x).numpy())) == data.y
    return {"knn_accuracy": float(right.float().mean())}


def metric_learning(data: Features) -> dict[str, float]:
    knn = CustomKNN(CosineSimilarity(), batch_size=700)
    options = {"k": "max_bin_count", "knn_func": knn, "device": torch.device("cpu")}
    calculator = AccuracyCalculator(include=tuple(PEERS.values()), **options)
    values = calculator.get_accuracy(*data, ref_includes_query=False)
    return {ours: values[theirs] for ours, theirs in PEERS.items()}


def similarities(data: Features) -> dict[str, float]:
    left, right = F.normalize(data.x), F.normalize(data.bank)
    for block in left.split(max(1, CHUNK // len(right))):
        (block @ right.T).topk(K, dim=1)
    return {}


def rows(options: argparse.Namespace) -> Rows:
    data = Features(*features(options.queries, 1), *features(options.bank, 2))
    sides = {
        "ours, kNN": vote,
        "ours, all six metrics": every_metric,
        "scikit-learn, kNN, cosine": lambda data: scikit_learn(data, "cosine"),
        "scikit-learn, kNN, euclidean": lambda data: scikit_learn(data, "euclidean"),
        "pytorch-metric-learning, three": metric_learning,
        "similarities, k largest": similarities,
    }
    metrics: dict[str, dict[str, float]] = {}

    def timed(name: str) -> float:
        return seconds(lambda: metrics.update({name: sides[name](data)}))

    found = in_turn({name: (lambda name=name: timed(name)) for name in sides}, options.repetitions)
    beside = dict.fromkeys(sides, "ours, kNN") | {"pytorch-metric-learning, three": "ours, all six metrics"}
    return [
        {**row, **{key: metrics[row["name"]].get(key) for key in ("knn_accuracy", *PEERS)}}
        for row in summary(found, "s", beside)
    ]


if __name__ == "__main__":
    run("benchmarks.evaluation")
