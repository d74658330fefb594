"""What an encoder knows before any probe is trained: nearest neighbours, retrieval, alignment and uniformity."""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2**25  # similarities held at once

# Columns of `retrieval_statistics`. Their means over the queries are the metrics, but for uniformity, a log of a mean.
STATISTICS = ("knn_accuracy", "precision_at_1", "r_precision", "map_at_r", "alignment", "uniformity")


@torch.no_grad()
def retrieval_statistics(
    queries: Tensor,
    labels: Tensor,
    bank: Tensor,
    bank_labels: Tensor,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """What is nearest to each of the `queries` (Q, D) among the `bank` (N, D), by cosine similarity s: (Q, 6).

    - knn_accuracy: 1 where the k nearest vote for the query's class, weighted by exp(s / τ) (Z. Wu et al.,
      "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", 2018, section 3.4). k is cut to N.
    - precision_at_1: 1 where the nearest is of the query's class.
    - r_precision, map_at_r: with R images of the query's class in the bank, the share of its class among the R
      nearest, and the mean over the R places of the precision up to each place that holds its class (K. Musgrave et
      al., "A Metric Learning Reality Check", 2020, section 3.2). 0 where R is 0.
    - alignment: mean of ‖x − y‖² over the bank's y of the query's class, on the unit sphere; uniformity: mean of
      exp(−2 ‖x − y‖²) over the whole bank (T. Wang & P. Isola, 2020, equations 2 and 3, between two sets).
    `labels` (Q,) and `bank_labels` (N,) int64 in [0, num_classes).
    """
    if not len(queries):
        return bank.new_zeros(0, len(STATISTICS))
    bank, members = F.normalize(bank, dim=1), bank_labels.bincount(minlength=num_classes)
    places = max(int(members[labels.unique()].max()), min(k, len(bank)))
    # ‖x − y‖² = 2 − 2 s on the sphere, and the mean of s over a class is x times the class's mean.
    means = bank.new_zeros(num_classes, bank.shape[1]).index_add_(0, bank_labels, bank) / members.clamp_min(1)[:, None]
    place, blocks = torch.arange(1, places + 1, device=bank.device), []
    for x, y in zip(*(t.split(max(1, CHUNK // len(bank))) for t in (F.normalize(queries, dim=1), labels))):
        similarity, size = x @ bank.T, members[y]
        nearest, index = similarity.topk(places, dim=1)
        votes = _votes(nearest[:, :k], bank_labels[index[:, :k]], num_classes, temperature)
        of_class = bank_labels[index] == y[:, None]
        hits = (of_class & (place <= size[:, None])).long()
        columns = (
            votes.argmax(1) == y,
            of_class[:, 0],
            hits.sum(1) / size.clamp_min(1),
            (hits.cumsum(1) / place * hits).sum(1) / size.clamp_min(1),
            (2 - 2 * (x * means[y]).sum(1)).clamp_min(0) * (size > 0),
            similarity.sub_(1).mul_(4).clamp_max_(0).exp_().mean(1),  # exp(−2 ‖x − y‖²)
        )
        blocks.append(torch.stack([column.float() for column in columns], dim=1))
    return torch.cat(blocks)


@torch.no_grad()
def knn_probabilities(
    queries: Tensor, bank: Tensor, bank_labels: Tensor, num_classes: int, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Each class's share (Q, num_classes) of the votes of the k nearest, as in `retrieval_statistics`' knn_accuracy."""
    bank, k, shares = F.normalize(bank, dim=1), min(k, len(bank)), []
    for x in F.normalize(queries, dim=1).split(max(1, CHUNK // len(bank))):
        with torch.autocast(x.device.type, enabled=False):  # as `retrieval_statistics`, outside an evaluation's steps
            nearest, index = (x @ bank.T).topk(k, dim=1)
        votes = _votes(nearest, bank_labels[index], num_classes, temperature)
        shares.append(votes / votes.sum(1, keepdim=True))
    return torch.cat(shares)


def _votes(nearest: Tensor, neighbours: Tensor, num_classes: int, temperature: float) -> Tensor:
    """Similarities (Q, k) and classes (Q, k) of the nearest → votes (Q, num_classes), up to a factor a query."""
    weights = ((nearest - nearest[:, :1]) / temperature).exp()  # of the nearest 1, so that the sum is above 0
    return weights.new_zeros(len(nearest), num_classes).scatter_add_(1, neighbours, weights)


def retrieval_metrics(means: Tensor) -> dict[str, float]:
    """The metrics by name, from the mean (6,) of `retrieval_statistics` over all queries."""
    return {**dict(zip(STATISTICS, means.tolist())), "uniformity": float(means[-1].clamp_min(1e-38).log())}
