"""Torch's own batch norm, for inputs of any rank."""

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


class AnyBatchNorm(_BatchNorm):
    """torch.nn.BatchNorm1d, 2d and 3d in one: (N, C, *), any rank from 2. What a call of F.batch_norm is lifted to."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Every rank that F.batch_norm takes."""
