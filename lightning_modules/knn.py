"""k nearest neighbours: what an encoder knows before any probe is trained."""

import torch
import torch.nn.functional as F
from torch import Tensor


def knn_classify(
    queries: Tensor, bank: Tensor, bank_labels: Tensor, num_classes: int, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """Classes (Q,) of `queries` (Q, D) by a vote of the `k` most similar rows of `bank` (N, D), `bank_labels` (N,).

    Cosine similarity s, votes weighted by exp(s / τ) (Wu et al., "Unsupervised Feature Learning via Non-Parametric
    Instance Discrimination", 2018, section 3.4). `k` is cut to N. Works through 1,000 queries at a time.
    """
    bank = F.normalize(bank, dim=1)
    classes = []
    for chunk in F.normalize(queries, dim=1).split(1000):
        similarity, neighbours = (chunk @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(chunk), num_classes, device=bank.device)
        votes.scatter_add_(1, bank_labels[neighbours], (similarity / temperature).exp())
        classes.append(votes.argmax(1))
    return torch.cat(classes)
