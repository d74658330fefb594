"""What the triplets of a batch look like (`measure`), and what is wrong with them (`diagnose`)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.losses import BatchLoss
from lightning_modules.losses.triplets import active_counts, pair_masks

ALIKE = 1e-3  # share of misordered triplets below which views, in the first epoch, are too easy
PAIRS = 2**15  # distances that a histogram is made of: those of the batch's first anchors


@torch.no_grad()
def measure(loss: BatchLoss, z: Tensor, labels: Tensor, value: Tensor) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Numbers and histograms' values of embeddings `z` (B, D), `labels` (B,), under the loss's own distance.

    `value` is the loss (no dimensions), among the numbers too. Both are empty where it or an embedding is not finite. A
    histogram without values, such as d_an in a batch of one class, is left out, since TensorBoard takes none.
    """
    distances = loss.distance.matrix(z)
    positive, negative = pair_masks(labels)
    triplets = (positive.sum(1) * negative.sum(1)).sum()
    violating = active_counts(distances, labels, loss.margin or 0.0).clamp_min(0).sum()
    misordered = active_counts(distances, labels, 0.0).clamp_min(0).sum() if loss.margin else violating
    means = [distances.where(mask, 0).sum() / mask.sum().clamp_min(1) for mask in (positive, negative)]
    numbers = torch.stack([x.to(z.dtype) for x in (value, triplets, violating, misordered, *means)])
    first = slice(max(1, PAIRS // len(z)))
    numbers, z, distances, positive, negative = to_host(numbers, z, distances[first], positive[first], negative[first])
    value, triplets, violating, misordered, *means = numbers
    if not (value.isfinite() and z.isfinite().all()):
        return {}, {}
    histograms = {
        "d_ap": distances[positive > 0],
        "d_an": distances[negative > 0],
        "spread_by_dimension": z.std(0, correction=0),
    }
    measured = {
        "loss": value,
        "triplets": triplets,
        "active": violating / triplets.clamp_min(1),
        "misordered": misordered / triplets.clamp_min(1),
        **dict(zip(("positive", "negative"), means)),
        "norm": z.norm(dim=1).mean(),
        "spread": histograms["spread_by_dimension"].mean(),
        # Between 0 (all embeddings alike) and 1 (their mean is the origin).
        "relative_spread": z.var(0, correction=0).sum().sqrt() / z.square().sum(1).mean().sqrt().clamp_min(1e-30),
        "effective_rank": effective_rank(z),
    }
    if getattr(loss, "triplets", None) == "semihard":
        measured["ignored"] = misordered / violating.clamp_min(1)
    return {name: float(value) for name, value in measured.items()}, {k: v for k, v in histograms.items() if len(v)}


def to_host(*tensors: Tensor) -> list[Tensor]:
    """The tensors as float32 (float64 where one of them is) in main memory, by a single copy.

    A host waits for each copy from a GPU until that has done all its work.
    """
    kind = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    parts = torch.cat([x.detach().flatten().to(kind) for x in tensors]).cpu().split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors)]


def effective_rank(z: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of the centred z (B, D): between 1 and min(B, D), and 0
    where all rows are alike (O. Roy & M. Vetterli, "The Effective Rank", 2007)."""
    z = (z - z.mean(0)).double()
    values = torch.linalg.eigvalsh(z.T @ z).clamp_min(0).sqrt()
    total = values.sum()
    shares = values / total.clamp_min(1e-300)
    return torch.special.entr(shares).sum().exp() * (total > 0)


@torch.no_grad()
def view_statistics(features: Tensor) -> dict[str, float]:
    """What features (2 N, D) of two views of each image, behind each other, look like; no label is asked.

    - view_alignment: mean of ‖x − y‖² over the two views of an image, on the unit sphere (T. Wang & P. Isola,
      2020, equation 2).
    - view_uniformity: log of the mean of exp(−2 ‖x − y‖²) over the first views of two images (equation 3).
    - effective_rank: of all features (see `effective_rank`), which tells without labels which of two encoders
      is better (Q. Garrido et al., "RankMe", 2023).
    """
    first, second = F.normalize(features.float(), dim=1).unflatten(0, (-1, 2)).unbind(1)
    nearness = (4 * (first @ first.T - 1)).exp().fill_diagonal_(0).sum() / max(1, len(first) * (len(first) - 1))
    return {
        "view_alignment": float((first - second).square().sum(1).mean()),
        "view_uniformity": float(nearness.clamp_min(1e-38).log()),
        "effective_rank": float(effective_rank(features.float())),
    }


def diagnose(
    loss: BatchLoss, measured: dict[str, float], views: bool = False, first_epoch: bool = False
) -> dict[str, str]:
    """What is wrong with a batch: by kind, a sentence that says what to change. `views`: the positives are views."""
    if not measured["triplets"]:
        return {"triplets": "the batch has no triplets (one class, or no class twice): raise data.batch_size"}
    found = collapse(loss, measured)
    if measured.get("ignored", 0) > 0.4 and measured["active"] > 0.1:
        found["ignored"] = (
            f"semi-hard mining leaves out {measured['ignored']:.0%} of the triplets that violate the margin, whose"
            " negative is nearer than the positive, so classes that lie on each other stay so; choose triplets: all, or"
            " PrototypicalLoss"
        )
    elif not found and measured["misordered"] > 0.35:
        easier = (
            "weaken the views (a larger data.crop_scale, less data.color_jitter)"
            if views
            else "choose PrototypicalLoss"
        )
        found["misordered"] = (
            f"{measured['misordered']:.0%} of all triplets have the negative nearer than the positive, where chance"
            f" gives a half: the embeddings hardly tell {'images' if views else 'classes'} apart; lower model.lr (or"
            f" raise it, if it is tiny), or {easier}"
        )
    elif not found and views and first_epoch and measured["misordered"] < ALIKE:
        found["alike"] = (
            f"in the first epoch already, {1 - measured['misordered']:.2%} of all negatives are farther away than the"
            " positive: the views of an image are too alike to learn from; strengthen them (data.crop_scale from 0.2"
            " on, data.color_jitter 0.5, data.greyscale 0.2)"
        )
    return found | out_of_range(loss, measured)


def collapse(loss: BatchLoss, measured: dict[str, float]) -> dict[str, str]:
    """Embeddings that are all alike, lie on a line, or keep the loss at the value of such."""
    easier = "lower model.lr, or choose easier triplets (all or random instead of hard), or PrototypicalLoss"
    positive, negative, value, pinned = *(measured[k] for k in ("positive", "negative", "loss")), loss.pinned_at
    if measured["relative_spread"] < 0.02:
        spread = f"spread {measured['relative_spread']:.1e} of their norm, loss {value:.3g}"
        return {"collapsed": f"collapsed: all embeddings are nearly alike ({spread}): {easier}"}
    if measured["effective_rank"] < 1.5:
        rank = f"effective rank {measured['effective_rank']:.2f}"
        return {"collapsed": f"collapsed: the embeddings lie on a line ({rank}): {easier}"}
    if pinned is not None and abs(value - pinned) < 0.02 * pinned and abs(positive - negative) < 0.05 * negative:
        where = "ln 2" if loss.margin is None else f"the margin {loss.margin:g}"
        return {"pinned": f"the loss is pinned at {where}: positives are as far away as negatives: {easier}"}
    return {}


def out_of_range(loss: BatchLoss, measured: dict[str, float]) -> dict[str, str]:
    """A margin or a temperature that leaves nothing to learn."""
    name, margin, temperature, negative = type(loss).__name__, loss.margin, loss.temperature, measured["negative"]
    found = {}
    if margin is not None and measured["active"] == 0:
        found["inactive"] = (
            f"nothing is active any more: every negative is farther away than every positive by more than {margin:g};"
            " raise the margin of model.loss, or stop here"
        )
    elif margin is not None and not 0.005 * negative <= margin <= 10 * negative:
        found["margin"] = (
            f"margin {margin:g} of {name} is out of range: negatives are {negative:.2g} away on average; give a margin"
            " between a tenth of that and that"
        )
    if temperature is not None and not 0.01 <= temperature <= 1:
        what = "all pairs weigh alike" if temperature > 1 else "only each anchor's hardest pair has a gradient"
        found["temperature"] = f"temperature {temperature:g} of {name} is out of range ({what}): give 0.05 … 0.5"
    return found
