"""A converted network in Lightning: a LightningModule as any other. Needs `pip install lightning`.

python examples/loop_lightning.py
"""

from typing import Any

import lightning
import torch
from digits import digits_resnet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from train_digits import accuracy, load_split

import normrewrite as nr

EPOCHS, BATCH, RATE = 5, 64, 0.1


class Digits(lightning.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    lightning.seed_everything(0)
    images, test_images, labels, test_labels = load_split()
    module = Digits(nr.convert(digits_resnet(), to="l1"))
    data = DataLoader(TensorDataset(images, labels), BATCH, shuffle=True, drop_last=True)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=EPOCHS, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, data)
    print(f"accuracy {100 * accuracy(module.model, test_images, test_labels):.2f} %")


if __name__ == "__main__":
    main()
