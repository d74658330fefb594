"""The questions of `studies.buys`: what changes, and what each rival reaches then."""

import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc

from datamodules import CIFAR10DataModule, DigitsDataModule
from files import write
from lightning_modules.retrieval import CHUNK
from studies import rivals as fits
from studies.corruptions import KINDS, corrupted, mixed
from studies.rivals import Given, Study, computed, loaded

SHIFTED = 2000  # test images that are corrupted


class Found(NamedTuple):
    """An answer's cell: what a rival reaches in one draw."""

    column: str
    rival: str
    draw: int
    value: float


def labels(study: Study) -> Iterator[Found]:
    for few in (4, None) if study.digits else (4, 25, 45, 450, None):

        def give(draw: int, few: int | None = few) -> Given:
            if few is None:
                return study.all_labels(draw)
            given = [f"--data.labels_per_class={few}", f"--data.label_seed={draw}"]
            return Given(f"_{few}_draw_{draw}", 10 * few, given)

        for draw, rivals in study.draws(few is not None and few < 100):
            (tag, count, given), encoder = give(draw), rivals.free()
            runs = dict(study.everyone(rivals, draw, give, encoder))
            runs[fits.TUNED] = rivals.fine_tuned(tag, encoder.folder, count, given)
            if not study.digits:
                long = rivals.free("_ten_epochs", times=5)
                runs[fits.LONG] = rivals.probe(f"ten_epochs_probe{tag}", long.folder, count, given)
            for rival, run in runs.items():
                yield Found(f"{count:,} labels", rival, draw, rivals.accuracy(run))


def noise(study: Study) -> Iterator[Found]:
    confusions = [[3, 8], [8, 3]] if study.digits else [[3, 5], [5, 3], [9, 1], [2, 0], [4, 7]]
    levels = [(share, []) for share in ((0.0, 0.8) if study.digits else (0.0, 0.2, 0.4, 0.6, 0.8))]
    for share, pairs in [*levels, (0.4, confusions)]:

        def give(draw: int, share: float = share, pairs: list = pairs) -> Given:
            if not share:
                return study.all_labels(draw)
            given = [f"--data.label_noise={share}", f"--data.label_seed={draw}"]
            given += [f"--data.label_confusions={pairs}"] if pairs else []
            return Given(f"_noise_{share}{'_pairs' if pairs else ''}_draw_{draw}", len(study.labels), given)

        name = f"{share:.0%}, confused" if pairs else f"{share:.0%}"
        for draw, rivals in study.draws():
            for rival, run in study.everyone(rivals, draw, give, rivals.free()):
                yield Found(name, rival, draw, rivals.accuracy(run))
                yield Found(f"{name}, last epoch", rival, draw, rivals.accuracy(run, checkpoint="last.ckpt"))


def coarse(study: Study) -> Iterator[Found]:
    odd = {"even": [0, 2, 4, 6, 8], "odd": [1, 3, 5, 7, 9]}
    groups = odd if study.digits else {"vehicle": [0, 1, 8, 9], "animal": [2, 3, 4, 5, 6, 7]}
    given = Given("_coarse", len(study.labels), [f"--data.coarse={json.dumps(groups)}"])
    other, all_labels = ["--frozen_encoder.other_data=true"], study.all_labels(0)
    hundred = [] if study.digits else [*Path(study.data.root).glob("cifar100_train.npz")]
    for draw, rivals in study.draws():
        encoder = rivals.free()
        runs = dict(study.everyone(rivals, draw, lambda draw: given, encoder))
        for rival, run in runs.items():
            yield Found("two coarse classes", rival, draw, rivals.accuracy(run))
        for rival, path in study.encoders(rivals, given, encoder, runs[fits.ENTROPY]).items():
            name = f"fine_{fits.name_of(path)}"
            probe = rivals.probe(name, path, all_labels.count, other)
            yield Found("ten classes, by a probe", rival, draw, rivals.accuracy(probe))
            if hundred:
                probe = rivals.probe(f"hundred_{name}", path, 45000, [*other, "--data.dataset=cifar100"])
                yield Found("CIFAR-100, by a probe", rival, draw, rivals.accuracy(probe))
        for rival, run in (
            (fits.PIXELS, rivals.pixels(*all_labels)),
            (fits.PATCHES, study.patches(rivals, *all_labels)),
        ):
            yield Found("ten classes, by a probe", rival, draw, rivals.accuracy(run))


def unknown(study: Study) -> Iterator[Found]:
    choices = [torch.randperm(10, generator=torch.Generator().manual_seed(i))[:6].sort().values for i in range(5)]
    choices = [torch.arange(6)] if study.digits else choices[: len(study.seeds) + 2 * (len(study.seeds) > 1)]

    def give(draw: int) -> Given:
        known = choices[draw].tolist()
        tag = f"_known_{''.join(map(str, known))}"
        return Given(tag, int(torch.isin(study.labels, choices[draw]).sum()), [f"--data.classes={known}"])

    for draw, known in enumerate(choices):
        rivals = study.seeds[draw % len(study.seeds)]
        encoder = rivals.free(give(draw).tag, give(draw).options)
        images, of = study.data.split("test")
        sets = {"the other classes": images[~torch.isin(of, known)], **others(study)}
        for rival, run in study.everyone(rivals, draw, give, encoder):
            yield Found("accuracy on the known classes", rival, draw, rivals.accuracy(run))
            stage, data = loaded(run)
            networks = {"max. probability": stage.predictor()}
            if hasattr(stage, "encoder"):
                networks["neighbours"] = compared(stage)
            for how, network in networks.items():
                bank = computed(network, data.split("train").images) if how == "neighbours" else None
                own = strangeness(network, data.split("test").images, bank)
                for name, strange in sets.items():
                    scores = torch.cat([own, strangeness(network, strange, bank)])
                    target = (torch.arange(len(scores)) >= len(own)).long()
                    yield Found(f"{name}, {how}", rival, draw, float(binary_auroc(scores, target)))


def others(study: Study) -> dict[str, Tensor]:
    """Images (N, 32, 32, 3) of things that no class here is."""
    noise = torch.randint(0, 256, (1000, 32, 32, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    if study.digits:
        return {"noise": noise}
    found = {"digits": DigitsDataModule().split("test").images, "noise": noise}
    if [*Path(study.data.root).glob("cifar100_test.npz")]:
        found["CIFAR-100"] = CIFAR10DataModule(root=study.data.root, dataset="cifar100").split("test").images
    return found


def compared(stage: nn.Module) -> Callable[[Tensor], Tensor]:
    """Images (N, 3, 32, 32) → the features (N, width) that nearest neighbours read."""
    features, width = stage.predictor(features=True), stage.encoder.contrast_dim
    return lambda images: features(images)[:, :width]


def strangeness(network: nn.Module, images: Tensor, bank: Tensor | None, k: int = 50) -> Tensor:
    """(N,): 1 − the largest probability, or the distance to the k-th neighbour in `bank` (cosine; Y. Sun et al.,
    "Out-of-Distribution Detection with Deep Nearest Neighbors", 2022)."""
    found = computed(network, images)
    if bank is None:
        return 1 - found.max(1).values
    bank, found = (nn.functional.normalize(x, dim=1) for x in (bank, found))
    parts = found.split(max(1, CHUNK // len(bank)))
    return 1 - torch.cat([(part @ bank.T).topk(min(k, len(bank)), dim=1).values[:, -1] for part in parts])


def shift(study: Study) -> Iterator[Found]:
    images, of = study.data.split("test")
    sets = {"as they are": [(images[:SHIFTED], of[:SHIFTED])], **shifted(study, images[:SHIFTED], of[:SHIFTED])}
    file = study.out / f"{'digits' if study.digits else 'cifar10'}_corrupted.npz"
    train = study.data.load("train")
    arrays = {"images": mixed(train.images).numpy(), "labels": train.labels.numpy()}
    write(file, lambda out: np.savez(out, **arrays))
    own = ["--data=CIFAR10DataModule", f"--data.train_npz={file.absolute()}", f"--data.val_size={study.data.val_size}"]
    own += ["--frozen_encoder.other_data=true"]
    for draw, rivals in study.draws():
        encoder = rivals.free()
        runs = dict(study.everyone(rivals, draw, study.all_labels, encoder))
        for rival, path in study.encoders(rivals, study.all_labels(draw), encoder, runs[fits.ENTROPY]).items():
            probe = rivals.probe(f"corrupted_{fits.name_of(path)}", path, len(study.labels), own)
            runs[f"{rival}, probe on corrupted images"] = probe
        for rival, run in runs.items():
            network, means = loaded(run)[0].predictor(), []
            for kind, parts in sets.items():
                means.append(statistics.fmean(accuracy(network, *part) for part in parts))
                yield Found(kind, rival, draw, means[-1])
            yield Found("all corruptions", rival, draw, statistics.fmean(means[1 : 1 + len(KINDS)]))


def shifted(study: Study, images: Tensor, labels: Tensor) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """The five severities of each corruption; CIFAR-10-C's and CIFAR-10.1's files where they lie beside the data."""
    kinds = ["gaussian noise", "contrast"] if study.digits else list(KINDS)
    found = {kind: [(corrupted(images, kind, severity), labels) for severity in range(5)] for kind in kinds}
    root = Path(".") if study.digits else Path(study.data.root)
    for file in sorted((root / "CIFAR-10-C").glob("*.npy")):
        if file.stem != "labels":
            x, y = (torch.from_numpy(np.load(f)) for f in (file, file.with_name("labels.npy")))
            found[f"CIFAR-10-C {file.stem}"] = [
                (x[i : i + SHIFTED], y[i : i + SHIFTED]) for i in range(0, 50000, 10000)
            ]
    for file in sorted((root / "CIFAR-10.1").glob("*_v6_data.npy")):
        y = torch.from_numpy(np.load(file.with_name(file.name.replace("data", "labels"))))
        found["CIFAR-10.1"] = [(torch.from_numpy(np.load(file)), y)]
    return found


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((computed(network, images).argmax(1) == labels).float().mean())
