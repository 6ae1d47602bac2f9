"""Your own loop is Lightning's Trainer: a fresh network with Top-10 norms, in bf16, and an average of its weights.

pip install lightning
python examples/own_loop_lightning.py
"""

import sys

import torch
from digits import digits_resnet
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from train_digits import accuracy, load_split

import normrewrite as nr

EPOCHS, BATCH, RATE, ENOUGH = 5, 64, 0.1, 0.96


class Digits(LightningModule):
    """Nothing in it knows of the norms."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nr.convert(digits_resnet(), to="topk:10")

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> dict[str, object]:
        groups = nr.param_groups(self.network, weight_decay=5e-4, rest=0.0)
        optimizer = torch.optim.SGD(groups, RATE, momentum=0.9, nesterov=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> int:
    torch.manual_seed(0)
    train_images, test_images, train_labels, test_labels = load_split()
    loader = DataLoader(TensorDataset(train_images, train_labels), BATCH, shuffle=True, drop_last=True)
    model = Digits()
    trainer = Trainer(
        max_epochs=EPOCHS,
        precision="bf16-mixed",
        callbacks=[EMAWeightAveraging(decay=0.97)],  # running statistics too, unlike StochasticWeightAveraging
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader)
    reached = accuracy(model.network, test_images, test_labels)
    print(f"test accuracy {reached:.2%} of {len(test_labels)} images")
    return int(reached < ENOUGH)


if __name__ == "__main__":
    sys.exit(main())
