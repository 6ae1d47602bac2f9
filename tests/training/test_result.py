"""What a fine-tuning tells at its end."""

from normrewrite.training.progress import Epoch
from normrewrite.training.result import Finetuned


def _told(*epochs: Epoch) -> list[str]:
    return str(Finetuned("fp32", True, 4, 64, 2.0, 0, False, list(epochs))).splitlines()


def test_columns_of_validation_stand_there_where_there_was_one() -> None:
    head, titles, row = _told(Epoch(1, 4, 0.5, 0.75))
    assert head == "4 steps on labels in fp32: 64 inputs in 2 s, 32 a second"
    assert titles.split() == ["epoch", "step", "loss", "accuracy"] and row.split() == ["1", "4", "0.5", "75.00", "%"]
    _, titles, row = _told(Epoch(1, 4, 0.5, 0.75, 0.25, 0.875))
    assert titles.endswith("validation loss  accuracy") and row.split()[-3:] == ["0.25", "87.50", "%"]
