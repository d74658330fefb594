"""Nearest neighbours and retrieval metrics of 10,000 queries among 45,000 features, beside scikit-learn's and
pytorch-metric-learning's on the same features.

    pip install -e '.[benchmarks]' && python -m benchmarks.evaluation

Ours: the vote of the k nearest alone, as in `predict`, and with five more metrics in one pass, as in `test`.
scikit-learn's brute force: the vote of the same cosine neighbours, and of the Euclidean ones of normalised features,
which are the same and its fast path. pytorch-metric-learning's calculator: three metrics. The metrics must agree.
"""

import argparse

import torch
import torch.nn.functional as F
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from sklearn.neighbors import KNeighborsClassifier

from benchmarks.common import Rows, clusters, in_turn, run, seconds, summary
from lightning_modules.retrieval import STATISTICS, knn_probabilities, retrieval_statistics

VOTE = {"k": 20, "temperature": 0.07}
CALCULATED = ("precision_at_1", "r_precision", "mean_average_precision_at_r")  # pytorch-metric-learning's names
SHOWN = ("knn_accuracy", "precision_at_1", "r_precision", "map_at_r")  # ours
DRY_RUN = {"queries": 100, "bank": 400}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--queries", type=int, default=10_000, help="(default: %(default)s)")
    parser.add_argument("--bank", type=int, default=45_000, help="(default: %(default)s)")


def every_metric(x, y, bank, bank_labels) -> dict[str, float]:
    means = retrieval_statistics(x, y, bank, bank_labels, 10, **VOTE).mean(0)
    return dict(zip(STATISTICS, means.tolist()))


def vote(x, y, bank, bank_labels) -> dict[str, float]:
    shares = knn_probabilities(x, bank, bank_labels, 10, **VOTE)
    return {"knn_accuracy": float((shares.argmax(1) == y).float().mean())}


def scikit_learn(metric: str, x, y, bank, bank_labels) -> dict[str, float]:
    def weights(distance):
        similarity = 1 - distance if metric == "cosine" else 1 - distance**2 / 2
        return torch.from_numpy(similarity).div(VOTE["temperature"]).exp().numpy()

    nearest = KNeighborsClassifier(VOTE["k"], weights=weights, algorithm="brute", metric=metric, n_jobs=-1)
    nearest.fit(F.normalize(bank).numpy(), bank_labels.numpy())
    right = torch.from_numpy(nearest.predict(F.normalize(x).numpy())) == y
    return {"knn_accuracy": float(right.float().mean())}


def metric_learning(*data) -> dict[str, float]:
    knn = CustomKNN(CosineSimilarity(), batch_size=700)
    options = {"k": "max_bin_count", "knn_func": knn, "device": torch.device("cpu")}
    values = AccuracyCalculator(include=CALCULATED, **options).get_accuracy(*data, ref_includes_query=False)
    return dict(zip(SHOWN[1:], (values[name] for name in CALCULATED)))


def rows(options: argparse.Namespace) -> Rows:
    # Overlapping classes, of which kNN gets about nine in ten right.
    data = *clusters(options.queries, 128, apart=0.32, seed=1), *clusters(options.bank, 128, apart=0.32, seed=2)
    sides = {
        "ours, kNN": vote,
        "ours, all six metrics": every_metric,
        "scikit-learn, kNN, cosine": lambda *data: scikit_learn("cosine", *data),
        "scikit-learn, kNN, euclidean": lambda *data: scikit_learn("euclidean", *data),
        "pytorch-metric-learning, three": metric_learning,
    }
    metrics: dict[str, dict[str, float]] = {}

    def timed(name: str) -> float:
        return seconds(lambda: metrics.update({name: sides[name](*data)}))

    found = in_turn({name: (lambda name=name: timed(name)) for name in sides}, options.repetitions)
    beside = dict.fromkeys(sides, "ours, kNN") | {"pytorch-metric-learning, three": "ours, all six metrics"}
    return [{**row, **{key: metrics[row["name"]].get(key) for key in SHOWN}} for row in summary(found, "s", beside)]


if __name__ == "__main__":
    run("benchmarks.evaluation")
