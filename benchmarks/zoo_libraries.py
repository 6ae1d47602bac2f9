"""What architectures each library gives offline, how to build one, and what to feed it.

A library is a class with `names()` and `build(name)`; it imports its package when asked for either, as a worker needs
one or two of them only.
"""

import functools
import importlib
import os
import re
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from benchmarks.zoo_inputs import BATCH, draw, images
from benchmarks.zoo_monai import Monai
from benchmarks.zoo_transformers import Transformers
from benchmarks.zoo_trial import Architecture, Inputs


class Library(Protocol):
    packages: ClassVar[tuple[str, ...]]

    def names(self) -> list[str]: ...

    def build(self, name: str) -> Architecture: ...


def offline() -> None:
    """No library may load or install anything: an attempt fails at once, where it would else wait for a network."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "YOLO_OFFLINE": "true",
        "YOLO_AUTOINSTALL": "false",
    }
    os.environ |= {"YOLO_VERBOSE": "false", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}

    def refuse(*_: object, **__: object) -> None:
        raise OSError("the network is not to be used here")

    socket.socket.connect = refuse  # type: ignore[method-assign]
    socket.create_connection = refuse  # type: ignore[assignment]


_KEPT: list[torch.library.Library] = []  # an operator lives as long as its library object


def declare_torchvision_operators() -> None:
    """torchvision's own wheel is built for CUDA: without these two, it can't be imported beside a CPU-only torch."""
    if not _KEPT:
        _KEPT.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            _KEPT[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


class Timm:
    packages: ClassVar[tuple[str, ...]] = ("timm",)

    def names(self) -> list[str]:
        import timm

        return list(timm.list_models(pretrained=False))

    def build(self, name: str) -> Architecture:
        import timm

        model = timm.create_model(name, pretrained=False)
        config = model.pretrained_cfg or {}
        channels, *default = config.get("input_size", (3, 224, 224))
        smaller = [] if config.get("fixed_input_size") else [64, 128]
        return Architecture(model, images(*smaller, default, 224, 256, channels=channels))


class Torchvision:
    packages: ClassVar[tuple[str, ...]] = ("torchvision",)

    def names(self) -> list[str]:
        from torchvision import models

        return [name for name in models.list_models() if name != "raft_small"]  # instance norms alone

    def build(self, name: str) -> Architecture:
        from torchvision import models

        is_detector = name in models.list_models(models.detection)
        named = {"weights_backbone": None} if is_detector or name in models.list_models(models.segmentation) else {}
        model = models.get_model(name, weights=None, **named)
        if is_detector:
            _uncompile_roi_align()
            return Architecture(_DetectorHeads(model), [(draw(1, 3, 128, 128),), (draw(1, 3, 320, 320),)])
        if name in models.list_models(models.video):
            return Architecture(
                model, [(draw(BATCH, 3, frames, side, side),) for frames, side in ((8, 64), (16, 112), (16, 224))]
            )
        if name in models.list_models(models.optical_flow):
            return Architecture(model, [(draw(1, 3, 128, 128), draw(1, 3, 128, 128).flip(-1), 2)])
        return Architecture(model, images(64, 128, 224, 299))


def _uncompile_roi_align() -> None:
    """torchvision gives its Python form of the operator to torch.compile, which takes half a minute and a C++ compiler."""
    module: Any = importlib.import_module("torchvision.ops.roi_align")
    module._roi_align = getattr(module._roi_align, "__wrapped__", module._roi_align)


class _DetectorHeads(nn.Module):
    """All that holds weights in a torchvision detector, without the search for boxes (an operator that is missing here)."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector = detector
        boxes = torch.tensor([[4.0, 4.0, 60.0, 60.0], [10.0, 30.0, 120.0, 100.0]])
        self.register_buffer("boxes", boxes)

    def forward(self, x: Tensor) -> list[object]:
        features = self.detector.backbone(x)
        named = {"0": features} if isinstance(features, Tensor) else features
        if not hasattr(self.detector, "rpn"):
            return [self.detector.head(list(named.values()))]
        return [self.detector.rpn.head(list(named.values())), *self._regions(named, (x.shape[-2], x.shape[-1]))]

    def _regions(self, features: dict[str, Tensor], size: tuple[int, int]) -> Iterable[object]:
        heads = self.detector.roi_heads
        boxes, sizes = [self.boxes], [size]
        pooled = heads.box_roi_pool(features, boxes, sizes)
        yield heads.box_predictor(heads.box_head(pooled))
        for kind in ("mask", "keypoint"):
            if getattr(heads, f"{kind}_head", None) is not None:
                pooled = getattr(heads, f"{kind}_roi_pool")(features, boxes, sizes)
                yield getattr(heads, f"{kind}_predictor")(getattr(heads, f"{kind}_head")(pooled))


class Pytorchcv:
    packages: ClassVar[tuple[str, ...]] = ("pytorchcv",)

    def names(self) -> list[str]:
        from pytorchcv.model_provider import _models

        return _one_of_each_data_set(sorted(_models))

    def build(self, name: str) -> Architecture:
        from pytorchcv.model_provider import get_model

        model = get_model(name, pretrained=False)
        last = getattr(getattr(model, "features", None), "final_pool", None)
        if isinstance(last, nn.AvgPool2d) and last.stride == 1:  # 7 x 7 to one: the same as this, for 224 x 224 only
            model.features.final_pool = nn.AdaptiveAvgPool2d(1)
        return Architecture(model, self._inputs(name, model))

    def _inputs(self, name: str, model: Any) -> list[Inputs]:
        if re.match("jasper|quartznet", name):
            first = next(module for module in model.modules() if isinstance(module, nn.Conv1d))
            return [(draw(BATCH, first.in_channels, 400), torch.full((BATCH,), 400))]
        if name.startswith("raft"):
            return [(draw(1, 3, 128, 128), draw(1, 3, 128, 128).flip(-1))]
        if name.startswith("voca"):
            return [(draw(BATCH, 1, 16, 29), torch.tensor([3, 5]))]
        if name.startswith("nvpattexp"):
            return [(draw(BATCH, model.seq_len, 500, 24), torch.zeros(BATCH, dtype=torch.long))]
        if name.startswith("visemenet"):
            return [(draw(BATCH, 8, 195), draw(BATCH, 16))]
        size = getattr(model, "in_size", None) or (224, 224)
        side = 32 if size == (32, 32) else 64
        channels = 1 if name == "superpointnet" else getattr(model, "in_channels", 3)
        return images(side, 128, size, (320, 240), 256, channels=channels)


def _one_of_each_data_set(names: list[str]) -> list[str]:
    """The same network is listed for several data sets, with another number of classes: cifar10, coco or cub stay."""
    order = ("cifar10", "cub", "coco", "voc", "cityscapes", "ade20k", "cifar100", "svhn")
    first: dict[str, str] = {}
    for name in sorted(names, key=lambda name: _rank(name, order)):
        stem = re.sub(f"_({'|'.join(order)})$", "", name)
        family = (
            stem
            if not re.search("quartznet15x5", stem)
            else re.sub(r"_(ca|de|en|es|fr|it|pl|ru|ru34|en_nr)$", "", stem)
        )
        small = name.endswith(("_cifar10", "_cifar100", "_svhn"))  # a network of its own: no strides at the entrance
        first.setdefault(f"{family}{' for 32 x 32' if small else ''}", name)
    return sorted(first.values())


def _rank(name: str, order: tuple[str, ...]) -> tuple[int, str]:
    return next((i for i, word in enumerate(order) if name.endswith(f"_{word}")), -1), name


class SegmentationModels:
    packages: ClassVar[tuple[str, ...]] = ("segmentation-models-pytorch",)
    decoders = (
        "Unet",
        "UnetPlusPlus",
        "MAnet",
        "Linknet",
        "FPN",
        "PSPNet",
        "PAN",
        "DeepLabV3",
        "DeepLabV3Plus",
        "UPerNet",
        "Segformer",
    )
    encoders = (
        "resnet18",
        "resnet34",
        "resnext50_32x4d",
        "densenet121",
        "vgg11_bn",
        "mobilenet_v2",
        "efficientnet-b0",
        "se_resnet50",
        "timm-regnetx_002",
        "timm-mobilenetv3_large_100",
        "mobileone_s0",
        "mit_b0",
        "timm-resnest14d",
        "xception",
        "tu-resnet10t",
        "tu-mobilenetv4_conv_small",
        "tu-hrnet_w18_small",
    )
    transformers = ("tu-vit_tiny_patch16_224", "tu-deit_small_patch16_224")  # what DPT takes

    def names(self) -> list[str]:
        import segmentation_models_pytorch as smp

        known = smp.encoders.get_encoder_names()
        pairs = [f"Unet+{encoder}" for encoder in known]
        pairs += [f"{decoder}+{encoder}" for decoder in self.decoders for encoder in self.encoders]
        return list(dict.fromkeys(pairs + [f"DPT+{encoder}" for encoder in self.transformers]))

    def build(self, name: str) -> Architecture:
        import segmentation_models_pytorch as smp

        decoder, encoder = name.split("+", 1)
        model = getattr(smp, decoder)(encoder, encoder_weights=None, classes=4)
        return Architecture(model, images(64, 128, 224, 256))


class EfficientNetPytorch:
    packages: ClassVar[tuple[str, ...]] = ("efficientnet_pytorch",)

    def names(self) -> list[str]:
        from efficientnet_pytorch.model import VALID_MODELS

        return list(VALID_MODELS)

    def build(self, name: str) -> Architecture:
        from efficientnet_pytorch import EfficientNet

        return Architecture(EfficientNet.from_name(name), images(64, 128, 224))


class Ultralytics:
    packages: ClassVar[tuple[str, ...]] = ("ultralytics",)

    def names(self) -> list[str]:
        """Every configuration at every scale that it lists, as `YOLO(name)` takes them."""
        return sorted(name for path in self._files() for name in self._scales(path))

    def build(self, name: str) -> Architecture:
        from ultralytics.nn import tasks

        config = tasks.yaml_model_load(self._file(name))
        config["scale"] = tasks.guess_model_scale(name)
        model = self._class(tasks, name, config)(config, ch=3, verbose=False)
        return Architecture(model, images(64, 128, 320))

    def _files(self) -> list[Path]:
        import ultralytics

        return sorted((Path(ultralytics.__file__).parent / "cfg" / "models").rglob("*.yaml"))

    def _scales(self, path: Path) -> list[str]:
        import yaml

        scales = list(yaml.safe_load(path.read_text(errors="ignore")).get("scales", {}))
        stem = re.match(r"yolo(e-)?v?\d+", path.stem)
        if stem is None or len(scales) < 2:
            return [path.name]
        return [f"{stem[0]}{scale}{path.stem[stem.end() :]}.yaml" for scale in scales]

    def _file(self, name: str) -> Path:
        files = [path for path in self._files() if name in self._scales(path)]
        return files[0].with_name(name)

    def _class(self, tasks: Any, name: str, config: dict[str, Any]) -> Any:
        head = config["head"][-1][2]
        if head == "RTDETRDecoder":
            return tasks.RTDETRDetectionModel
        by_head = {"WorldDetect": "WorldModel", "YOLOEDetect": "YOLOEModel", "YOLOESegment": "YOLOESegModel"}
        by_task = {"detect": "DetectionModel", "segment": "SegmentationModel", "semantic": "SemanticSegmentationModel"}
        by_task |= {"classify": "ClassificationModel", "pose": "PoseModel", "obb": "OBBModel", "depth": "DepthModel"}
        return getattr(tasks, by_head.get(re.sub(r"\d+$", "", head)) or by_task[tasks.guess_model_task(config)])


LIBRARIES: dict[str, type[Library]] = {
    "timm": Timm,
    "torchvision": Torchvision,
    "pytorchcv": Pytorchcv,
    "segmentation_models_pytorch": SegmentationModels,
    "transformers": Transformers,
    "monai": Monai,
    "ultralytics": Ultralytics,
    "efficientnet_pytorch": EfficientNetPytorch,
}


@functools.cache
def library(name: str) -> Library:
    declare_torchvision_operators()
    return LIBRARIES[name]()
