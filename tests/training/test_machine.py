"""What a training runs on: launches that can't serve, and connections that are lost. tests/test_launch.py runs several."""

import pytest
from torch import distributed, nn

from normrewrite import NormRewriteError
from normrewrite.training.machine import accelerator, lost_connection
from normrewrite.training.recipe import Recipe

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:39861. This is typical"


def test_a_lost_connection_is_found_in_what_it_led_to() -> None:
    lost = RuntimeError(GLOO)
    told = NormRewriteError("step-00000002: RuntimeError.")
    told.__cause__ = lost
    assert lost_connection(lost) is lost and lost_connection(told) is lost
    assert lost_connection(distributed.DistNetworkError("timed out")) is not None
    assert lost_connection(RuntimeError("Application timeout caused pair closure")) is not None  # gloo's, too
    assert lost_connection(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


@pytest.mark.parametrize("error", [RuntimeError(GLOO), NormRewriteError("the data")])
def test_it_is_told_in_one_message_and_nothing_else_is_touched(error: Exception) -> None:
    with pytest.raises(NormRewriteError) as found, accelerator(nn.Linear(1, 1), Recipe(timeout=7)):
        raise error
    wanted = "process ?: another process died, or kept this one waiting for more than 7 s (Connection closed by peer "
    assert str(found.value).startswith(wanted if isinstance(error, RuntimeError) else "the data")
    assert found.value.exit_code == (1 if isinstance(error, RuntimeError) else 2)


LAUNCHES = {
    "deepspeed": ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "--use_deepspeed: finetune runs under DDP and FSDP alone"),
    "fsdp": ({"ACCELERATE_USE_FSDP": "true"}, {}, "FSDP's first version .* Add --fsdp_version 2"),
    "ema": ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, {"ema": 0.9}, "--ema beside --use_fsdp"),
}


@pytest.mark.parametrize("case", LAUNCHES)
def test_launches_that_cannot_serve_are_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment, options, message = LAUNCHES[case]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(NormRewriteError, match=message), accelerator(nn.Linear(1, 1), Recipe(**options)):
        pass


def test_processes_that_accelerate_does_not_know_of_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 3)
    message = r"runs 3 processes, and accelerate sees 1\. Set RANK"
    with pytest.raises(NormRewriteError, match=message), accelerator(nn.Linear(1, 1), Recipe()):
        pass
