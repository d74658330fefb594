"""Muon: stochastic gradient descent whose steps are orthogonal matrices, for the filters of convolutions."""

from collections.abc import Callable

import torch
from torch import Tensor


class Muon(torch.optim.SGD):
    """torch's SGD, but in groups with a `muon_momentum` each step of a filter W (out, in · k · k) is orthogonalised.

    The momentum with Nesterov's term is G = U S Vᵀ. The step is about U Vᵀ (K. Jordan et al., "Muon: An optimizer
    for hidden layers in neural networks", 2024). Before it, W is scaled to the Frobenius norm √out. Where BatchNorm
    follows, that changes nothing but the size of the step beside W (K. Jordan's airbench94_muon.py, 2024).
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group.get("muon_momentum") is None:
                continue
            for weight in group["params"]:
                if weight.grad is not None:
                    self._orthogonalise(weight, group["muon_momentum"])
        super().step()
        return loss

    def _orthogonalise(self, weight: Tensor, momentum: float) -> None:
        """Puts the step in the gradient's place: SGD without momentum then takes it."""
        state = self.state[weight]
        if "filter_momentum" not in state:
            state["filter_momentum"] = torch.zeros_like(weight)
        moving = state["filter_momentum"].mul_(momentum).add_(weight.grad)
        step = orthogonal(weight.grad.add(moving, alpha=momentum).flatten(1)).view_as(weight)
        weight.grad.copy_(step)
        weight.mul_(len(weight) ** 0.5 / weight.norm().clamp_min(1e-7))


def orthogonal(matrix: Tensor, steps: int = 3) -> Tensor:
    """G (m, n) = U S Vᵀ → about U Vᵀ, singular values between about 0.3 and 1.2, where those of G are not tiny.

    Newton–Schulz iterations of x ← a x + b x³ + c x⁵ on the singular values (K. Jordan et al., 2024).
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if tall else x
