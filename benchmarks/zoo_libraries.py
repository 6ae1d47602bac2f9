"""What architectures each library gives offline, how to build one, and what to feed it.

A library is a class with `names()` and `build(name)`; it imports its package when asked for either, as a worker needs
one or two of them only.
"""

import functools
import importlib
import os
import re
import socket
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from benchmarks.zoo_trial import Architecture, CouldNotRun, Inputs

BATCH = 2


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


def draw(*shape: int) -> Tensor:
    """Inputs of order one, always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def images(*sizes: int | Sequence[int], channels: int = 3) -> list[Inputs]:
    """One candidate for each size, each once; a single image where they are large."""
    shapes = [(size, size) if isinstance(size, int) else tuple(size) for size in sizes]
    return [(draw(BATCH if max(shape) < 192 else 1, channels, *shape),) for shape in dict.fromkeys(shapes)]


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
    kept: dict[str, str] = {}
    for name in sorted(names, key=lambda name: _rank(name, order)):
        stem = re.sub(f"_({'|'.join(order)})$", "", name)
        family = (
            stem
            if not re.search("quartznet15x5", stem)
            else re.sub(r"_(ca|de|en|es|fr|it|pl|ru|ru34|en_nr)$", "", stem)
        )
        small = name.endswith(("_cifar10", "_cifar100", "_svhn"))  # a network of its own: no strides at the entrance
        kept.setdefault(f"{family}{' for 32 x 32' if small else ''}", name)
    return sorted(kept.values())


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
        found = [path for path in self._files() if name in self._scales(path)]
        return found[0].with_name(name)

    def _class(self, tasks: Any, name: str, config: dict[str, Any]) -> Any:
        head = config["head"][-1][2]
        if head == "RTDETRDecoder":
            return tasks.RTDETRDetectionModel
        by_head = {"WorldDetect": "WorldModel", "YOLOEDetect": "YOLOEModel", "YOLOESegment": "YOLOESegModel"}
        by_task = {"detect": "DetectionModel", "segment": "SegmentationModel", "semantic": "SemanticSegmentationModel"}
        by_task |= {"classify": "ClassificationModel", "pose": "PoseModel", "obb": "OBBModel", "depth": "DepthModel"}
        return getattr(tasks, by_head.get(re.sub(r"\d+$", "", head)) or by_task[tasks.guess_model_task(config)])


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
        found = {}
        for d in (2, 3):
            for label, (cls, options) in self._of_dimension(d).items():
                found[f"{label}_{d}d"] = (cls, d, options)
        return found | self._fixed()

    def _of_dimension(self, d: int) -> dict[str, tuple[str, dict[str, Any]]]:
        space = {"spatial_dims": d}
        one = {"in_channels": 1, "out_channels": 2}
        unet = {"channels": (8, 16, 32, 64), "strides": (2, 2, 2)}
        found: dict[str, tuple[str, dict[str, Any]]] = {
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
        for depth in (121, 169, 201, 264):
            found[f"DenseNet{depth}"] = (f"DenseNet{depth}", {**space, **one})
        for depth in (10, 18, 34, 50, 101, 152):
            found[f"resnet{depth}"] = (f"resnet{depth}", {**space, "n_input_channels": 1, "num_classes": 2})
        for label in ("SENet154", "SEResNet50", "SEResNet101", "SEResNet152", "SEResNext50", "SEResNext101"):
            found[label] = (label, {**space, "in_channels": 1, "num_classes": 2})
        for i in range(1, 5):
            options = {**space, "in_channels": 1, "model_name": f"efficientnet-b{i}", "pretrained": False}
            found[f"EfficientNetBN_b{i}"] = ("EfficientNetBN", options)
        return found

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


class Transformers:
    """Every model class in a file that mentions a batch norm, from its default configuration with few layers."""

    packages: ClassVar[tuple[str, ...]] = ("transformers",)
    small: ClassVar[dict[str, int]] = {
        "num_hidden_layers": 2,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "vocab_size": 500,
    }
    # Without these a network of that folder has no batch norm, is too large, or lacks what it needs.
    own: ClassVar[dict[str, dict[str, Any]]] = {
        "beit": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
        "data2vec": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "hidden_size": 192, "num_attention_heads": 3},
        "dpt": {"use_batch_norm_in_fusion_residual": True},
        "efficientnet": {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280},
        "hubert": {"conv_pos_batch_norm": True, "num_hidden_layers": 2, "vocab_size": 32},
        "informer": {"prediction_length": 6, "context_length": 12, "num_time_features": 1, "encoder_layers": 2},
        "patchtsmixer": {"norm_mlp": "BatchNorm"},
        "wav2vec2_conformer": {"num_hidden_layers": 2, "vocab_size": 32},
        "zoedepth": {"use_batch_norm_in_fusion_residual": True},
    }

    def names(self) -> list[str]:
        import transformers

        folder = Path(transformers.__file__).parent / "models"
        files = [path for path in sorted(folder.glob("*/modeling_*.py")) if "BatchNorm" in path.read_text()]
        return [f"{path.parent.name}:{name}" for path in files for name in self._classes(path.parent.name, path.stem)]

    def _classes(self, folder: str, stem: str) -> list[str]:
        from transformers import PreTrainedModel

        try:
            module = importlib.import_module(f"transformers.models.{folder}.{stem}")
        except ImportError:  # the package that it needs is not installed
            return []
        named = [(name, getattr(module, name, None)) for name in module.__all__]
        models = [name for name, cls in named if isinstance(cls, type) and issubclass(cls, PreTrainedModel)]
        return [name for name in models if not name.endswith("PreTrainedModel")]

    def build(self, name: str) -> Architecture:
        import transformers

        folder, class_name = name.split(":")
        cls = getattr(transformers, class_name)
        config = self._config(folder, cls.config_class)
        return Architecture(cls(config), self._inputs(folder, cls, config))

    def _config(self, folder: str, config_class: Any) -> Any:
        reason = ""
        for options in self._options(folder, config_class):
            try:
                return config_class(**options)
            except Exception as error:
                reason = str(error)
        raise CouldNotRun(f"no configuration: {reason}")

    def _options(self, folder: str, config_class: Any) -> list[dict[str, Any]]:
        own = self.own.get(folder, {})
        defaults = config_class(**own)
        small = {key: value for key, value in self.small.items() if isinstance(getattr(defaults, key, None), int)}
        if hasattr(defaults, "use_timm_backbone"):
            own = {**own, "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
        return [{**small, **own}, own, {}]

    def _inputs(self, folder: str, cls: Any, config: Any) -> list[Inputs]:
        main = cls.main_input_name
        if not isinstance(main, str) or (main not in _MAKERS and folder not in _MAKERS):
            raise CouldNotRun(f"no inputs are known for {main}")
        own = folder in _MAKERS and main != "input_ids"
        return _MAKERS[folder if own else cls.__name__ if cls.__name__ in _MAKERS else main](config)


def _pixels(config: Any) -> list[Inputs]:
    default = getattr(config, "image_size", None)
    channels = getattr(config, "num_channels", 3)
    sides = dict.fromkeys((64, 128, default if isinstance(default, int) else 224, 224, 640))
    return [{"pixel_values": draw(BATCH, channels, side, side)} for side in sides]


def _pair(config: Any) -> list[Inputs]:
    return [{"pixel_values": draw(BATCH, 2, getattr(config, "num_channels", 3), 64, 64)}]


def _waves(config: Any) -> list[Inputs]:
    return [{"input_values": draw(BATCH, length)} for length in (4000, 16000)]


def _features(config: Any) -> list[Inputs]:
    width: int = getattr(config, "num_mel_bins", 0) or getattr(config, "input_dim", 80)
    return [{"input_features": draw(BATCH, 60, width)}]


def _spectrogram(config: Any) -> list[Inputs]:
    return [{"input_features": draw(BATCH, 1, 1001, 64), "is_longer": torch.zeros(BATCH, 1, dtype=torch.bool)}]


def _past(config: Any) -> list[Inputs]:
    return [{"past_values": draw(BATCH, config.context_length, config.num_input_channels)}]


def _tokens(config: Any) -> list[Inputs]:
    return [{"input_ids": torch.arange(BATCH * 12).view(BATCH, 12) % 23 + 3}]


def _spoken(config: Any) -> list[Inputs]:
    target = {"decoder_input_values": draw(BATCH, 8, 80), "speaker_embeddings": draw(BATCH, 512)}
    return [{"input_ids": torch.arange(BATCH * 12).view(BATCH, 12) % 23 + 3, **target}]


def _series(config: Any) -> list[Inputs]:
    past, future = config.context_length + max(config.lags_sequence), config.prediction_length
    return [
        {
            "past_values": draw(BATCH, past),
            "past_time_features": draw(BATCH, past, 1),
            "past_observed_mask": torch.ones(BATCH, past),
            "future_values": draw(BATCH, future),
            "future_time_features": draw(BATCH, future, 1),
        }
    ]


# By folder, by class, by the name of the main input.
_MAKERS: dict[str, Callable[[Any], list[Inputs]]] = {
    "efficientloftr": _pair,
    "superglue": _pair,
    "clap": _spectrogram,
    "informer": _series,
    "SpeechT5ForTextToSpeech": _spoken,
    "pixel_values": _pixels,
    "input_values": _waves,
    "input_features": _features,
    "past_values": _past,
    "input_ids": _tokens,
}


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
