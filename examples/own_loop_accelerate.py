"""Your own loop with accelerate: the trained digits network with group norms in place of its batch norms, trained on.

python examples/own_loop_accelerate.py
torchrun --standalone --nproc-per-node 2 examples/own_loop_accelerate.py
"""

import sys

import torch
from accelerate import Accelerator
from digits import digits_resnet
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from train_digits import HERE, accuracy, load_split

import normrewrite as nr

EPOCHS, BATCH, RATE, ENOUGH = 3, 32, 0.02, 0.97


def main() -> int:
    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2, cpu=not torch.cuda.is_available())
    train_images, test_images, train_labels, test_labels = load_split()
    network = nr.load(HERE / "digits.pt", arch=digits_resnet())
    twin = nr.convert(network, to="group:4")  # norms of each image, which can't be exact: training repairs it
    before = accuracy(twin, test_images, test_labels)
    optimizer = torch.optim.SGD(nr.param_groups(twin, weight_decay=5e-4, rest=0.0), RATE, momentum=0.9, nesterov=True)
    loader = DataLoader(TensorDataset(train_images, train_labels), BATCH, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(twin.train(), optimizer, loader)
    for _ in range(EPOCHS):
        for images, labels in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(images), labels))
                accelerator.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
                optimizer.zero_grad()
    trained = accelerator.unwrap_model(model, keep_fp32_wrapper=False).cpu()
    reached = accuracy(trained, test_images, test_labels)
    accelerator.print(f"test accuracy {before:.2%} as converted, {reached:.2%} trained, of {len(test_labels)} images")
    return int(reached < ENOUGH)


if __name__ == "__main__":
    sys.exit(main())
