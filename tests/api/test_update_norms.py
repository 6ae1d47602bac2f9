"""update_norms: torch's norms as torch's update_bn, ours as a reference in float64; flags, momentum and failures."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

import normrewrite as nr
from normrewrite.backends import reference
from normrewrite.norms import metric
from tests.conftest import randomise

BATCHES = [torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(n)) * n + 1 for n in (8, 5, 11)]


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
    model = nn.Sequential(*layers)
    randomise(model)
    return model


def _statistics(model: nn.Module) -> list[Tensor]:
    return [value.clone() for value in model.buffers()]


def test_torchs_norms_are_updated_as_by_torch_to_the_bit() -> None:
    ours, torchs = _network().eval(), _network().eval()
    assert nr.update_norms(ours, BATCHES) is ours
    update_bn(BATCHES, torchs)
    assert all(map(torch.equal, _statistics(ours), _statistics(torchs)))


def _measured(model: nn.Sequential, to: str) -> dict[int, tuple[Tensor, Tensor]]:
    """By place, the mean over the batches of (mean, C * S) of each norm's input in training, in float64."""
    wide = copy.deepcopy(model).double()
    found: dict[int, list[tuple[Tensor, Tensor]]] = {1: [], 4: []}
    for batch in BATCHES:
        x = batch.double()
        for place, layer in enumerate(wide):
            if place not in found:
                x = layer(x)
                continue
            weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
            y, *pair = reference.batch_norm(x.detach().numpy(), metric(to), weight, bias)
            x = torch.from_numpy(y)
            found[place].append((torch.from_numpy(pair[0]), torch.from_numpy(pair[1])))
    return {
        place: (torch.stack([a for a, _ in pairs]).mean(0), torch.stack([b for _, b in pairs]).mean(0))
        for place, pairs in found.items()
    }


@pytest.mark.parametrize("to", ["l1", "linf", "topk:10", "range"])
def test_ours_are_the_average_of_what_training_measures(to: str) -> None:
    model = _network()
    twin = nr.convert(model, to=to)
    nr.update_norms(twin, BATCHES)
    for place, (mean, scale) in _measured(model, to).items():
        norm = twin[place]
        assert torch.allclose(norm.running_mean.double(), mean, 1e-5, 1e-5)
        assert torch.allclose(norm.running_scale.double(), scale, 1e-5, 1e-5)
        assert norm.num_batches_tracked == 3 and norm.momentum == model[place].momentum


def test_the_reference_would_show_one_percent() -> None:
    model = _network()
    scale, twin = _measured(model, "l1")[1][1], nr.convert(model, to="l1")
    nr.update_norms(twin, [batch * 1.01 for batch in BATCHES])
    assert not torch.allclose(twin[1].running_scale.double(), scale, 1e-5, 1e-5)


def test_mean_only_norms_are_updated() -> None:
    twin = nr.convert(_network(), to="wn:mean-bn")
    nr.update_norms(twin, BATCHES)
    means = [twin[0](batch).double().mean((0, 2, 3)) for batch in BATCHES]
    assert torch.allclose(twin[1].running_mean.double(), torch.stack(means).mean(0), 1e-5, 1e-5)


@pytest.mark.parametrize("schedule", [None, (1, 2, 3)])
def test_renorm_measures_uncorrected_and_keeps_its_schedule(schedule: tuple[int, int, int] | None) -> None:
    """Corrections towards statistics that were just thrown away would correct towards nothing."""
    model = _network()
    twin = nr.convert(model, to="renorm")
    for place in (1, 4):
        twin[place].schedule = schedule
        twin[place].num_batches_tracked.fill_(700)
    nr.update_norms(twin, BATCHES)
    for place, (mean, scale) in _measured(model, "l2").items():
        norm = twin[place]
        assert torch.allclose(norm.running_mean.double(), mean, 1e-5, 1e-5)
        assert torch.allclose(norm.running_scale.double(), scale, 1e-5, 1e-5)
        assert (norm.schedule, int(norm.num_batches_tracked), bool(norm.trained)) == (schedule, 700, True)


def test_an_averaged_twin_gets_statistics_of_its_own_weights() -> None:
    twin = nr.convert(_network(), to="l1").train()
    average = AveragedModel(twin)
    with torch.no_grad():
        twin[0].weight.mul_(3)
    average.update_parameters(twin)
    before = _statistics(average.module)
    update_bn(BATCHES, average)
    assert all(map(torch.equal, before, _statistics(average.module)))  # which is why there is update_norms
    nr.update_norms(average, [(batch, torch.zeros(len(batch))) for batch in BATCHES])
    expected = _measured(_plain(average.module), "l1")[1]
    assert torch.allclose(average.module[1].running_scale.double(), expected[1], 1e-5, 1e-5)


def _plain(twin: nn.Module) -> nn.Sequential:
    model = nr.revert(twin)
    assert isinstance(model, nn.Sequential)
    return model


def test_flags_come_back_and_what_training_holds_still_stays() -> None:
    model = nn.Sequential(*_network(), nn.Sequential(nn.BatchNorm2d(5)), nn.BatchNorm2d(5))
    twin = nr.convert(model.train(), to="l1", rules={"6": "frozen"})
    twin[1].eval()
    flags = [module.training for module in twin.modules()]
    frozen = _statistics(twin[6])
    nr.update_norms(twin, torch.cat(BATCHES), batch_size=8)
    assert [module.training for module in twin.modules()] == flags
    assert all(map(torch.equal, frozen, _statistics(twin[6])))
    assert twin[5][0].num_batches_tracked == 3


class _HoldsStill(nn.Sequential):
    def train(self, mode: bool = True) -> "_HoldsStill":
        super().train(mode)
        self[1].eval()
        return self


def test_a_norm_that_train_leaves_in_eval_or_no_batch_reaches_keeps_its_statistics() -> None:
    for model in (_HoldsStill(*_network()), _network()):
        twin = nr.convert(model, to="l1")
        twin.spare = nr.nn.BatchNorm2d(3)  # type: ignore[assignment]
        spare = twin.spare
        del twin._modules["spare"]
        twin[2].spare = spare.train()  # type: ignore[assignment]
        assert spare.running_mean is not None
        spare.running_mean.fill_(7)
        still = _statistics(twin[1])
        nr.update_norms(twin, BATCHES)
        assert (spare.running_mean == 7).all()
        assert all(map(torch.equal, still, _statistics(twin[1]))) == isinstance(model, _HoldsStill)
        assert twin[4].num_batches_tracked == 3


@pytest.mark.parametrize("bad", [[*BATCHES, torch.randn(4, 2, 6, 6)], [], [*BATCHES, torch.randn(4, 3, 1, 1)]])
def test_where_it_fails_nothing_has_changed(bad: list[Tensor]) -> None:
    twin = nr.convert(_network(), to="l1")
    before, momenta = _statistics(twin), [twin[1].momentum, twin[4].momentum]
    with pytest.raises(nr.NormRewriteError, match=r"can't run|no batch"):
        nr.update_norms(twin, bad)
    assert all(map(torch.equal, before, _statistics(twin)))
    assert [twin[1].momentum, twin[4].momentum] == momenta


def test_a_network_without_such_norms_is_told_so() -> None:
    with pytest.raises(nr.NormRewriteError, match="nothing to update"):
        nr.update_norms(nr.convert(_network(), to="group:1"), BATCHES)
