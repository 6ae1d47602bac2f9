"""A converted network in a loop of your own, with accelerate: alone, or on several processes.

python examples/loop_accelerate.py
accelerate launch --cpu --num_processes 2 examples/loop_accelerate.py

`synchronised` has the processes' batches measured as one, as torch.nn.SyncBatchNorm does, on any device.
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from digits import digits_resnet
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from train_digits import accuracy, load_split

import normrewrite as nr

EPOCHS, BATCH, RATE = 5, 64, 0.1


def main() -> None:
    set_seed(0)
    images, test_images, labels, test_labels = load_split()
    network = nn.SyncBatchNorm.convert_sync_batchnorm(digits_resnet())
    model = nr.convert(network, to="l1")  # synchronised, as it was

    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
    data = DataLoader(TensorDataset(images, labels), BATCH // accelerator.num_processes, shuffle=True, drop_last=True)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    model.train()
    for _ in range(EPOCHS):
        for inputs, targets in data:
            loss = F.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()

    found = accuracy(accelerator.unwrap_model(model), test_images, test_labels)
    accelerator.print(f"accuracy {100 * found:.2f} %")
    accelerator.end_training()


if __name__ == "__main__":
    main()
