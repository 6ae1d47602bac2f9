"""Weight decay of scale-invariant weights is a learning rate: taken away, and put back as one."""

from dataclasses import replace
from typing import Any

from benchmarks.norm_matters import table
from benchmarks.norm_matters.claim import Claim
from benchmarks.norm_matters.curves import curves, ends
from benchmarks.norm_matters.judge import above, alike
from benchmarks.norm_matters.run import Arms, Budget, ByArm, Study, Task
from benchmarks.norm_matters.studies import CIFAR, DIGITS

NAMES = {
    "weight decay": "decay",
    "no weight decay": "none",
    "none, steps corrected": "correction",
    "none, norms scheduled": "norms",
}
SGD = {"lr": 0.1, "weight_decay": 5e-4, "rest": 5e-4, "batch_size": 128, "flip": True, "crop": 4}
# A short training sees what a long one does where lr * weight_decay * steps is no smaller.
STUDIES: dict[Budget, Study] = {
    "smoke": Study("vgg11_eighth", DIGITS, SGD | {"epochs": 1, "crop": 2}, 1, "decay"),
    "cpu": Study(
        "vgg11_eighth",
        Task("cifar10", 16, 10_000, 10_000),
        SGD | {"epochs": 25, "crop": 2, "weight_decay": 2e-3},
        3,
        "decay",
    ),
    "gpu": Study("vgg11", replace(CIFAR, side=32), SGD | {"epochs": 80}, 3, "decay"),
}


def arms(budget: Budget) -> Arms:
    return {name: STUDIES[budget].arm(rule=rule) for name, rule in NAMES.items()}


def draw(figure: Any, by_arm: ByArm) -> None:
    (accuracy, final), (norm, step) = figure.subplots(2, 2)
    curves(accuracy, by_arm, "val_accuracy", 100)
    accuracy.set(xlabel="epoch", ylabel="test accuracy (%)")
    ends(final, by_arm)
    final.set_xlabel("test accuracy at the end (%)")
    curves(norm, by_arm, "norm")
    norm.set(xlabel="epoch", ylabel="‖w‖ of a channel", yscale="log")
    doubles = [2.0**i for i in range(-3, 7)]
    shown = norm.get_ylim()
    norm.set_yticks(doubles, [f"{value:g}" for value in doubles])
    norm.minorticks_off()
    norm.set_ylim(shown)
    curves(step, by_arm, "step")
    step.set(xlabel="epoch", ylabel="effective step, lr / ‖w‖²", yscale="log")


CLAIM = Claim(
    6,
    "weight_decay",
    "Without weight decay accuracy falls; a correction of the step, or of the norm, brings it back",
    "CIFAR-10, VGG11, 80 epochs, accuracy (%): weight decay 90.5, none 89.2, none with corrected steps 90.4, norm schedule 90.3",
    arms,
    (
        above("weight decay", "no weight decay"),
        above("none, steps corrected", "no weight decay"),
        above("none, norms scheduled", "no weight decay"),
        alike("none, steps corrected", "weight decay"),
        alike("none, norms scheduled", "weight decay"),
    ),
    draw,
    table.turns,
    notes=(
        "Only convolutions in front of norms lose their weight decay; all else keeps 5e-4. Norms and effective steps are "
        "geometric means over channels. The cpu budget takes a sixteenth of the paper's steps, so four times its "
        "weight decay. Runs that follow norms take those of the run with weight decay and the same seed: "
        "their effective steps are its own by construction, and turns, which are measured, tell whether they do as much."
    ),
    remarks={
        "cpu": (
            "what the corrections are to do, they do: an epoch turns the weights as far as weight decay does, and accuracy "
            "follows its curve until the learning rate falls. That larger steps end higher did not come out in 25 epochs."
        )
    },
)
