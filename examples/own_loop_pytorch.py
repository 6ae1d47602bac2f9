"""Your own loop, plain PyTorch: a fresh network with L1 norms, mixed precision, and an average of its weights.

python examples/own_loop_pytorch.py
"""

import sys

import torch
from digits import digits_resnet
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from train_digits import accuracy, load_split

import normrewrite as nr

EPOCHS, BATCH, RATE, ENOUGH = 5, 64, 0.1, 0.96
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> int:
    torch.manual_seed(0)
    train_images, test_images, train_labels, test_labels = (values.to(DEVICE) for values in load_split())
    model = nr.convert(digits_resnet(), to="l1").to(DEVICE).train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.97), use_buffers=True)  # running statistics too
    optimizer = torch.optim.SGD(nr.param_groups(model, weight_decay=5e-4, rest=0.0), RATE, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, EPOCHS * (len(train_images) // BATCH))
    scaler = torch.amp.GradScaler(DEVICE, enabled=DEVICE == "cuda")
    half = torch.float16 if DEVICE == "cuda" else torch.bfloat16
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(train_images)).split(BATCH)[:-1]:  # the last batch is a small one
            with torch.autocast(DEVICE, half):
                loss = F.cross_entropy(model(train_images[rows]), train_labels[rows])
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            average.update_parameters(model)
    reached = accuracy(average.module, test_images, test_labels)
    print(f"test accuracy {reached:.2%} of {len(test_labels)} images")
    return int(reached < ENOUGH)


if __name__ == "__main__":
    sys.exit(main())
