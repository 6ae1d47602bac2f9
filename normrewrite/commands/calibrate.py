"""The command `calibrate`."""

from collections.abc import Callable

from normrewrite.api.calibrate import calibrate_
from normrewrite.commands.job import Job
from normrewrite.commands.results import Calibrated
from normrewrite.commands.source import Source, opened
from normrewrite.options.calibrate import Calibrate


def calibrate(source: Source, options: Calibrate, progress: Callable[..., object]) -> Calibrated:
    """Bring a twin's training nearer to the original's eval on unlabelled data, and write it beside."""
    job = Job(source, options, "calibrated")
    job.check()
    file = source.read()
    data = opened(options.data, file.model, options)
    twin, calibration = calibrate_(file.model, data, batch_size=options.batch_size, progress=progress)
    job.save(file, twin, job.came(file))
    return Calibrated(calibration, str(job.output))
