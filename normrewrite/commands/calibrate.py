"""The command `calibrate`."""

from collections.abc import Callable

from torch import nn

from normrewrite.api.calibrate import Calibration, calibrate_
from normrewrite.api.correct_biases import BiasCorrection, correct_biases_
from normrewrite.api.reestimate import Reestimation, reestimate_
from normrewrite.commands.job import Job
from normrewrite.commands.results import Calibrated
from normrewrite.commands.source import Source, opened
from normrewrite.options.calibrate import Calibrate


def calibrate(source: Source, options: Calibrate, progress: Callable[..., object]) -> Calibrated:
    """Bring a twin's training nearer to the original's eval on unlabelled data, and write it beside."""
    job = Job(source, options, "calibrated")
    job.check()
    file, *originals = source.read_all(source.path, *([] if options.biases is None else [options.biases]))
    result = _calibrated(file.model, [each.model for each in originals], options, progress)
    job.save(file, file.model, job.came(file))
    return Calibrated(result, str(job.output))


def _calibrated(
    model: nn.Module, originals: list[nn.Module], options: Calibrate, progress: Callable[..., object]
) -> Calibration | Reestimation | BiasCorrection:
    """In place, what was asked for."""
    data, size = opened(options.data, model, options), options.batch_size
    if options.statistics:
        return reestimate_(model, data, batch_size=size, progress=progress)
    for original in originals:
        return correct_biases_(model, original, data, batch_size=size)
    return calibrate_(model, data, batch_size=size, progress=progress)[1]
