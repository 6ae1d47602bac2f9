"""The architectures of monai."""

import functools
from typing import Any, ClassVar

from benchmarks.zoo_inputs import BATCH, draw, images
from benchmarks.zoo_trial import Architecture, Inputs


class Monai:
    """Its networks take a norm by name and so have no list; these are what its documentation shows, with norm=batch."""

    packages: ClassVar[tuple[str, ...]] = ("monai",)

    def names(self) -> list[str]:
        return sorted(self._recipes())

    def build(self, name: str) -> Architecture:
        from monai.networks import nets

        cls, dimensions, options = self._recipes()[name]
        sides = (32, 64, 96) if dimensions == 3 else (64, 128, 224)
        if cls == "HoVerNet":
            return Architecture(nets.HoVerNet(**options), images(270))
        inputs: list[Inputs] = [(draw(BATCH, options.get("in_channels", 1), *(side,) * dimensions),) for side in sides]
        return Architecture(getattr(nets, cls)(**options), inputs)

    @functools.cache  # noqa: B019  (one object a process)
    def _recipes(self) -> dict[str, tuple[str, int, dict[str, Any]]]:
        recipes = {}
        for d in (2, 3):
            for label, (cls, options) in self._of_dimension(d).items():
                recipes[f"{label}_{d}d"] = (cls, d, options)
        return recipes | self._fixed()

    def _of_dimension(self, d: int) -> dict[str, tuple[str, dict[str, Any]]]:
        space = {"spatial_dims": d}
        one = {"in_channels": 1, "out_channels": 2}
        unet = {"channels": (8, 16, 32, 64), "strides": (2, 2, 2)}
        recipes: dict[str, tuple[str, dict[str, Any]]] = {
            "UNet": ("UNet", {**space, **one, **unet, "norm": "batch"}),
            "UNet_residual": ("UNet", {**space, **one, **unet, "num_res_units": 2, "norm": "batch"}),
            "BasicUNet": ("BasicUNet", {**space, **one, "norm": ("batch", {})}),
            "BasicUNetPlusPlus": ("BasicUNetPlusPlus", {**space, **one, "norm": ("batch", {})}),
            "AttentionUnet": ("AttentionUnet", {**space, **one, **unet}),
            "FlexibleUNet": ("FlexibleUNet", {**space, **one, "backbone": "efficientnet-b0"}),
            "FlexibleUNet_resnet18": ("FlexibleUNet", {**space, **one, "backbone": "resnet18"}),
            "AutoEncoder": (
                "AutoEncoder",
                {**space, **one, "channels": (8, 16, 32), "strides": (2, 2, 2), "norm": "batch"},
            ),
            "HighResNet": ("HighResNet", {**space, **one}),
            "SegResNet": ("SegResNet", {**space, **one, "norm": ("batch", {})}),
            "SegResNetDS": ("SegResNetDS", {**space, **one, "norm": "batch"}),
            "SegResNetDS2": ("SegResNetDS2", {**space, **one, "norm": "batch"}),
            "DynUNet": ("DynUNet", {**space, **one, **_dynunet(), "norm_name": "batch"}),
            "DynUNet_residual": ("DynUNet", {**space, **one, **_dynunet(), "norm_name": "batch", "res_block": True}),
            "VNet": ("VNet", {**space, **one}),
            "EfficientNetBN": (
                "EfficientNetBN",
                {**space, "in_channels": 1, "model_name": "efficientnet-b0", "pretrained": False},
            ),
            **self._further(space, one),
        }
        for depth in (121, 169, 201, 264):
            recipes[f"DenseNet{depth}"] = (f"DenseNet{depth}", {**space, **one})
        for depth in (10, 18, 34, 50, 101, 152):
            recipes[f"resnet{depth}"] = (f"resnet{depth}", {**space, "n_input_channels": 1, "num_classes": 2})
        for label in ("SENet154", "SEResNet50", "SEResNet101", "SEResNet152", "SEResNext50", "SEResNext101"):
            recipes[label] = (label, {**space, "in_channels": 1, "num_classes": 2})
        for i in range(1, 5):
            options = {**space, "in_channels": 1, "model_name": f"efficientnet-b{i}", "pretrained": False}
            recipes[f"EfficientNetBN_b{i}"] = ("EfficientNetBN", options)
        return recipes

    def _further(self, space: dict[str, Any], one: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
        d = space["spatial_dims"]
        return {
            "UNETR": (
                "UNETR",
                {
                    **one,
                    "img_size": (32,) * d,
                    **space,
                    "hidden_size": 96,
                    "mlp_dim": 96,
                    "num_heads": 4,
                    "norm_name": "batch",
                },
            ),
            "SwinUNETR": ("SwinUNETR", {**one, **space, "feature_size": 12, "norm_name": "batch"}),
            "RegUNet": (
                "RegUNet",
                {**space, "in_channels": 1, "num_channel_initial": 8, "depth": 3, "out_channels": d},
            ),
            "LocalNet": (
                "LocalNet",
                {**space, "in_channels": 1, "num_channel_initial": 8, "extract_levels": (0, 1, 2), "out_channels": d},
            ),
            "PatchDiscriminator": ("PatchDiscriminator", {**space, "channels": 16, "in_channels": 1}),
            "MultiScalePatchDiscriminator": (
                "MultiScalePatchDiscriminator",
                {**space, "num_d": 1, "num_layers_d": 3, "channels": 16, "in_channels": 1},
            ),
            "VoxelMorphUNet": ("VoxelMorphUNet", {**space, **_voxelmorph()}),
        }

    def _fixed(self) -> dict[str, tuple[str, int, dict[str, Any]]]:
        return {
            "HoVerNet": ("HoVerNet", 2, {"in_channels": 3, "out_classes": 5, "mode": "original"}),
            "Quicknat": ("Quicknat", 2, {"num_channels": 1, "num_filters": 16, "se_block": None}),
            "AHNet_2d": ("AHNet", 2, {"spatial_dims": 2, "out_channels": 2, "pretrained": False}),
            "DAF3D": ("DAF3D", 3, {"in_channels": 1, "out_channels": 2, "visual_output": False}),
        }


def _voxelmorph() -> dict[str, Any]:
    widths = {"channels": (8, 16, 16, 16, 16, 16), "final_conv_channels": (8, 8)}
    return {"in_channels": 2, "unet_out_channels": 3, **widths, "norm": "batch"}


def _dynunet() -> dict[str, Any]:
    return {"kernel_size": (3, 3, 3, 3), "strides": (1, 2, 2, 2), "upsample_kernel_size": (2, 2, 2)}
