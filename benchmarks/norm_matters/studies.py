"""What the comparisons from scratch share, by budget. Arms of different claims that are the same run have one result."""

from benchmarks.norm_matters.run import Budget, Study, Task

SGD = {"optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4, "batch_size": 128, "flip": True}
DIGITS = Task("digits", 16, 512, 256)  # what smoke runs on: it comes with a package
CIFAR = Task("cifar10", 32, 50_000, 10_000)

SCRATCH: dict[Budget, Study] = {
    "smoke": Study("resnet8", DIGITS, SGD | {"crop": 2, "epochs": 1}, 1),
    "cpu": Study("resnet8", Task("cifar10", 16, 20_000, 10_000), SGD | {"crop": 2, "epochs": 5, "warmup": 50}, 3),
    "gpu": Study("resnet18", CIFAR, SGD | {"crop": 4, "epochs": 20, "warmup": 400}, 3),
}
