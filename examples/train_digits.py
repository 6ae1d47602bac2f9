"""Trains `digits_resnet` and writes `digits.pt` and `digits.npz` beside this file; about twenty seconds on one core.

python examples/train_digits.py
"""

from pathlib import Path

import numpy as np
import torch
from digits import digits_resnet
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent
SEED = 0
TEST_IMAGES = 500
EPOCHS = 40
BATCH = 64
PEAK_RATE = 0.1

Split = tuple[Tensor, Tensor, Tensor, Tensor]


def load_split() -> Split:
    """Train and test images, train and test labels; standardised by the training images alone."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    picked = train_test_split(np.arange(len(labels)), test_size=TEST_IMAGES, stratify=labels, random_state=SEED)
    train, test = (torch.from_numpy(indices) for indices in picked)
    std, mean = torch.std_mean(images[train])
    images = (images - mean) / std
    targets = torch.from_numpy(labels).long()
    return images[train], images[test], targets[train], targets[test]


def shifted(images: Tensor) -> Tensor:
    """Each image moved by up to one pixel each way; what comes in at the edge repeats the old edge."""
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    down, right = torch.randint(0, 3, (2, len(images), 1, 1))
    rows, columns = down + torch.arange(8)[:, None], right + torch.arange(8)
    return padded[torch.arange(len(images))[:, None, None], 0, rows, columns][:, None]


def train(net: nn.Module, images: Tensor, labels: Tensor) -> None:
    """The last epoch's weights are kept, so the test images choose nothing."""
    optimiser = torch.optim.SGD(net.parameters(), lr=PEAK_RATE, momentum=0.9, nesterov=True, weight_decay=5e-4)
    # A last batch of a few images would upset the running variances: leave it out.
    steps = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK_RATE, total_steps=EPOCHS * steps)
    net.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images))[: steps * BATCH].reshape(steps, BATCH):
            loss = F.cross_entropy(net(shifted(images[batch])), labels[batch], label_smoothing=0.05)
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    hits: Tensor = net.eval()(images).argmax(1) == labels
    return hits.double().mean().item()


def main() -> None:
    # One thread: sums are then added in one order, and a second run gives the same weights.
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    train_images, test_images, train_labels, test_labels = load_split()
    net = digits_resnet()
    train(net, train_images, train_labels)
    print(f"test accuracy {accuracy(net, test_images, test_labels):.2%} of {len(test_labels)} images")
    torch.save(net.state_dict(), HERE / "digits.pt")
    np.savez_compressed(HERE / "digits.npz", images=test_images.numpy(), labels=test_labels.numpy())


if __name__ == "__main__":
    main()
