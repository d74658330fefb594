"""Muon against its definition, spelled out."""

import pytest
import torch
from torch import nn

from lightning_modules import FastEncoder, SupConLoss, TripletEncoder
from lightning_modules.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (16, 16)])
def test_singular_values_follow_the_polynomial_and_their_vectors_stay(shape):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    x = values / matrix.norm()
    for _ in range(3):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    found = orthogonal(matrix)
    torch.testing.assert_close(found, left @ torch.diag(x) @ right)
    assert 0.3 < torch.linalg.svdvals(found)[len(x) // 2] and torch.linalg.matrix_norm(found, 2) < 1.3


def test_a_step_scales_the_filter_and_takes_nesterovs_direction():
    generator = torch.Generator().manual_seed(0)
    weight, bias = (nn.Parameter(torch.randn(*s, generator=generator)) for s in ((4, 3, 3, 3), (4,)))
    filters = {"params": [weight], "lr": 0.1, "muon_momentum": 0.6, "momentum": 0.0, "nesterov": False}
    muon = Muon([{"params": [bias]}, filters], lr=0.2, momentum=0.9, nesterov=True)
    expected, moving = weight.detach().clone(), torch.zeros_like(weight)
    plain = nn.Parameter(bias.detach().clone())
    sgd = torch.optim.SGD([plain], lr=0.2, momentum=0.9, nesterov=True)
    for _ in range(3):
        gradient, slope = torch.randn(4, 3, 3, 3, generator=generator), torch.randn(4, generator=generator)
        weight.grad, bias.grad, plain.grad = gradient.clone(), slope.clone(), slope.clone()
        muon.step()
        sgd.step()
        moving = 0.6 * moving + gradient
        direction = orthogonal((gradient + 0.6 * moving).view(4, 27)).view(4, 3, 3, 3)
        expected = expected * 4**0.5 / expected.norm() - 0.1 * direction
        torch.testing.assert_close(weight.detach(), expected)
        torch.testing.assert_close(bias, plain)


def test_muon_gets_the_filters_and_sgd_all_else():
    model = TripletEncoder(FastEncoder([8, 8, 16]), SupConLoss(), optimizer="muon", lr=0.2, muon_lr=0.05, z_hidden=8)
    *others, filters = model.configure_optimizers()["optimizer"].param_groups
    assert [p.shape[0] for p in filters["params"]] == [8, 8, 8, 8, 16, 16] and filters["lr"] == 0.05
    left = {id(p) for group in others for p in group["params"]}
    assert left | {id(p) for p in filters["params"]} == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(group["lr"] == 0.2 and group.get("muon_momentum") is None for group in others)


def test_muon_is_refused_where_nothing_has_filters(refused):
    refused("fit", "softmax_regression", "--model.optimizer=muon", words=["model.optimizer muon", "filters"])


def test_muon_is_refused_where_the_encoder_has_its_own_rate(run, refused):
    run("fit", "triplet_encoder", "--model.encoder.init_args.widths=[8,8,8]")
    refused("fit", "fine_tune", "--model.optimizer=muon", words=["model.optimizer muon", "FineTune", "its own rate"])
