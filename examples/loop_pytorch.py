"""A converted network in a loop of your own, in plain PyTorch: nothing is special about it.

python examples/loop_pytorch.py
"""

import torch
from digits import digits_resnet
from torch.nn import functional as F
from train_digits import accuracy, load_split

import normrewrite as nr

EPOCHS, BATCH, RATE = 5, 64, 0.1


def main() -> None:
    torch.manual_seed(0)
    images, test_images, labels, test_labels = load_split()
    model = nr.convert(digits_resnet(), to="l1")

    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
    steps = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=EPOCHS * steps)
    model.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images))[: steps * BATCH].split(BATCH):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()

    print(f"accuracy {100 * accuracy(model, test_images, test_labels):.2f} %")


if __name__ == "__main__":
    main()
