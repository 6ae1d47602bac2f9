"""The architectures of transformers, and what each is fed."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch

from benchmarks.zoo_inputs import BATCH, draw
from benchmarks.zoo_trial import Architecture, CouldNotRun, Inputs


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
