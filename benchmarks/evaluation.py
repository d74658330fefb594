"""Nearest neighbours and retrieval metrics of 10,000 queries among 45,000 features, beside scikit-learn's and
pytorch-metric-learning's on the same features.

    pip install -e '.[benchmarks]' && python -m benchmarks.evaluation

Ours: the vote of the k nearest alone, as `predict` takes it, and with precision@1, R-precision, MAP@R, alignment and
uniformity in one pass, as `validate` and `test` do. scikit-learn's brute force: the vote of the same cosine neighbours
(`metric="cosine"`), and of the Euclidean ones of features normalised before, which are the same and its fast path.
pytorch-metric-learning's calculator: three retrieval metrics. The last rows are what the vote cannot do without: the
similarities in float32, and their k largest. The metrics must agree.
"""

import statistics
import time

import torch
import torch.nn.functional as F
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from sklearn.neighbors import KNeighborsClassifier

from benchmarks.common import arguments, in_turn, machine, median_ratio, show
from lightning_modules.retrieval import CHUNK, STATISTICS, knn_probabilities, retrieval_statistics

CLASSES, WIDTH, K, TEMPERATURE = 10, 128, 20, 0.07


def features(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and labels of overlapping classes, of which kNN gets about nine in ten right."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(0))
    return 0.32 * centres[labels] + torch.randn(count, WIDTH, generator=generator), labels


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--bank", type=int, default=45_000)
    options = parser.parse_args()
    (x, y), (bank, bank_labels) = features(options.queries, 1), features(options.bank, 2)
    found: dict[str, dict[str, float]] = {}

    def ours() -> float:
        start = time.perf_counter()
        means = retrieval_statistics(x, y, bank, bank_labels, CLASSES, K, TEMPERATURE).mean(0)
        found["ours, all six metrics"] = dict(zip(STATISTICS, means.tolist()))
        return time.perf_counter() - start

    def vote() -> float:
        start = time.perf_counter()
        shares = knn_probabilities(x, bank, bank_labels, CLASSES, K, TEMPERATURE)
        found["ours, kNN"] = {"knn_accuracy": float((shares.argmax(1) == y).float().mean())}
        return time.perf_counter() - start

    def parts(name: str) -> float:
        left, right, seconds = F.normalize(x, dim=1), F.normalize(bank, dim=1), 0.0
        found[name] = {}
        for rows in left.split(CHUNK // len(bank)):
            start = time.perf_counter()
            similarity = rows @ right.T
            if name == "of it, the k largest":
                start = time.perf_counter()
                similarity.topk(K, dim=1)
            seconds += time.perf_counter() - start
        return seconds

    def scikit_learn(metric: str) -> float:
        def weights(distance):
            similarity = 1 - distance if metric == "cosine" else 1 - distance**2 / 2
            return torch.from_numpy(similarity).div(TEMPERATURE).exp().numpy()

        start = time.perf_counter()
        nearest = KNeighborsClassifier(K, weights=weights, algorithm="brute", metric=metric, n_jobs=-1)
        nearest.fit(F.normalize(bank).numpy(), bank_labels.numpy())
        right = torch.from_numpy(nearest.predict(F.normalize(x).numpy())) == y
        found[f"scikit-learn, kNN, {metric}"] = {"knn_accuracy": float(right.float().mean())}
        return time.perf_counter() - start

    def metric_learning() -> float:
        names = {
            "precision_at_1": "precision_at_1",
            "r_precision": "r_precision",
            "mean_average_precision_at_r": "map_at_r",
        }
        knn = CustomKNN(CosineSimilarity(), batch_size=700)
        calculator = AccuracyCalculator(
            include=tuple(names), k="max_bin_count", knn_func=knn, device=torch.device("cpu")
        )
        start = time.perf_counter()
        values = calculator.get_accuracy(x, y, bank, bank_labels, ref_includes_query=False)
        found["pytorch-metric-learning, three"] = {ours: values[theirs] for theirs, ours in names.items()}
        return time.perf_counter() - start

    sides = {
        "ours, kNN": vote,
        "ours, all six metrics": ours,
        "scikit-learn, kNN, cosine": lambda: scikit_learn("cosine"),
        "scikit-learn, kNN, euclidean": lambda: scikit_learn("euclidean"),
        "pytorch-metric-learning, three": metric_learning,
        **{name: (lambda name=name: parts(name)) for name in ("of it, the similarities", "of it, the k largest")},
    }
    seconds = in_turn(sides, options.repetitions)
    own, rows = {"pytorch-metric-learning, three": "ours, all six metrics"}, []
    for name, times in seconds.items():
        metrics = {key: found[name].get(key) for key in STATISTICS[:4]}
        under = own.get(name, "ours, kNN")
        ratio = median_ratio(times, seconds[under])
        rows.append({"": name, "seconds": statistics.median(times), "over": under, "ratio": ratio, **metrics})
    print(machine())
    show(rows, options.json)


if __name__ == "__main__":
    main()
