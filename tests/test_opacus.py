"""Opacus takes twins as they are: its gradients are each sample's own, and the way back stays."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import normrewrite as nr
from tests.conftest import randomise
from tests.forms import same_bits

pytest.importorskip("opacus", reason="opacus is not installed: pip install opacus --no-deps")
pytestmark = pytest.mark.filterwarnings("ignore")  # Opacus's own: of secure randomness, of hooks

TAKEN = ["group:4", "layer", "instance", "rms", "frozen", "none"]
FORGETTING = ["wn", "wn:l1"]  # a checksum of the weights would be a buffer
REFUSED = ["l1", "renorm", "wn:mean-bn", "bwn"]


def trained() -> nn.Module:
    layers = (
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(288, 4),
    )
    model = randomise(nn.Sequential(*layers)).train()
    for _ in range(10):
        model(torch.randn(16, 3, 8, 8))
    return model.eval()


def data(count: int = 16) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, 8, 8), torch.arange(count) % 4


def private(twin: nn.Module, **options: Any) -> Any:
    from opacus import PrivacyEngine

    optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.1)
    loader = DataLoader(TensorDataset(*data()), batch_size=8)
    how = {"noise_multiplier": 0.0, "max_grad_norm": 1e6, "poisson_sampling": False} | options
    return PrivacyEngine().make_private(module=twin, optimizer=optimizer, data_loader=loader, **how)


@pytest.mark.parametrize("to", TAKEN + FORGETTING)
@pytest.mark.parametrize("mode", ["hooks", "functorch"])
def test_gradients_are_those_of_each_sample_alone(to: str, mode: str) -> None:
    twin = nr.convert(trained(), to).train()
    twin = nr.forget(twin) if to in FORGETTING else twin
    alone = copy.deepcopy(twin)
    network, _, _ = private(twin, grad_sample_mode=mode)
    x, y = data()
    cross_entropy(network(x), y).backward()
    for place in range(3):
        alone.zero_grad()
        cross_entropy(alone(x[place : place + 1]), y[place : place + 1]).backward()
        for (name, parameter), own in zip(network._module.named_parameters(), alone.parameters(), strict=True):
            if own.requires_grad:
                torch.testing.assert_close(parameter.grad_sample[place], own.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("to", TAKEN)
def test_a_private_step_moves_it_and_files_take_it(to: str, tmp_path: Any) -> None:
    model = trained()
    twin = nr.convert(model, to).train()
    assert to == "none" or same_bits(nr.revert(twin), model)
    network, optimizer, loader = private(twin, noise_multiplier=1.0, max_grad_norm=1.0, poisson_sampling=True)
    before = copy.deepcopy(twin.state_dict())
    for x, y in loader:
        optimizer.zero_grad()
        cross_entropy(network(x), y).backward()
        optimizer.step()
    plain = network.to_standard_module()
    kept = [name for name in before if ".origin." in name]
    assert not torch.equal(before["0.weight"], plain.state_dict()["0.weight"])
    assert all(torch.equal(before[name], plain.state_dict()[name]) for name in kept)
    nr.save(plain, tmp_path / "private.pt")
    again = nr.load(tmp_path / "private.pt", arch=trained).eval()
    x, _ = data()
    assert torch.equal(again(x), plain.eval()(x))


@pytest.mark.parametrize("to", REFUSED)
def test_norms_of_a_batch_and_fixed_lengths_are_refused(to: str) -> None:
    """Rightly the norms of a batch; rho of a bounded weight norm is a buffer that the network computes with."""
    for twin in (nr.convert(trained(), to), nr.forget(nr.convert(trained(), to))):
        with pytest.raises(NotImplementedError, match="trainable layer with buffers"):
            private(twin.train())
