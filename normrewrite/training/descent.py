"""Ranges of 8-bit activations that follow the gradient of the loss.

>>> descent = Descent()
>>> descent.begin("conv1", x.abs().amax())
>>> scale = scale_of(descent.reach("conv1"))
>>> loss.backward(); descent.step()

Jain et al., Trained Quantization Thresholds (arXiv:1903.08066): a step is Adam's, of the logarithm, so that a range of 0.1 and
one of 100 move alike. The gradient is that of products.py.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Adam

LR = 0.02  # of a logarithm: a step is 2 % of the range


class Descent:
    """The ranges' logarithms by name, with an Adam of their own."""

    def __init__(self) -> None:
        self.logs: dict[str, nn.Parameter] = {}
        self.optimizer: Adam | None = None

    def begin(self, name: str, reach: Tensor) -> None:
        """reach: above zero, finite."""
        self._add(name, reach.detach().log())

    def _add(self, name: str, log: Tensor) -> None:
        self.logs[name] = parameter = nn.Parameter(log)
        if self.optimizer is None:
            self.optimizer = Adam([parameter], LR)
        else:
            self.optimizer.param_groups[0]["params"].append(parameter)

    def reach(self, name: str) -> Tensor:
        """How far an activation reaches, (), with a gradient."""
        return self.logs[name].exp()

    def step(self, factor: float = 1.0) -> dict[str, Tensor]:
        """One update by the gradients that came in, averaged over processes; returns the ranges that it changed. factor: of
        the learning rate. Gradients that are not finite change nothing."""
        changed = {name: log for name, log in self.logs.items() if log.grad is not None}
        if self.optimizer is None or not changed:
            return {}
        finite = self._averaged([log.grad for log in changed.values()])
        if finite:
            self.optimizer.param_groups[0]["lr"] = LR * factor
            self.optimizer.step()
        self.optimizer.zero_grad()  # the next backward adds to what stands here: NaN would stay for ever
        return {name: log.detach().exp() for name, log in changed.items()} if finite else {}

    @staticmethod
    def _averaged(gradients: list[Any]) -> bool:
        """In place; whether all of it is finite."""
        joined = torch.stack(gradients)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(joined.div_(dist.get_world_size()))
        for mine, of_all in zip(gradients, joined, strict=True):
            mine.copy_(of_all)
        return bool(joined.isfinite().all())

    def state_dict(self) -> dict[str, Any]:
        logs = {name: log.detach().clone() for name, log in self.logs.items()}
        return {"logs": logs, "adam": None if self.optimizer is None else self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.logs, self.optimizer = {}, None
        for name, log in state["logs"].items():
            self._add(name, log.clone())
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["adam"])
