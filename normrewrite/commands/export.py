"""The command `export`."""

from collections.abc import Callable

from normrewrite.api.export import Exported
from normrewrite.api.export import export as export_model
from normrewrite.commands.job import Job
from normrewrite.commands.source import Source, inputs_of, opened
from normrewrite.data import argument_names
from normrewrite.options.export import Export, ExportOptions
from normrewrite.options.fields import part
from normrewrite.provenance.ranges import of_record


def export(source: Source, options: Export, progress: Callable[..., object]) -> Exported:
    """Write a model file as ONNX; the example input comes from --data or has --input-shape, or else from --calibrate.

    Ranges that an int8 training left in the file are used for int8.
    """
    job = Job(source, options, "")
    job.check("an ONNX file")
    file = source.read()
    names = argument_names(file.model)
    seen = None if options.calibrate is None else opened(options.calibrate, file.model, options)
    missing = "what goes in? Give --input-shape 1,3,32,32 or --data FILE."
    inputs = inputs_of(options, names, missing, options.calibrate)
    return export_model(
        file.model,
        inputs.first(2).positional(names),
        job.output,
        calibrate=seen,
        learned=of_record(file.manifest, str(source.path)),
        **part(options, ExportOptions),
    )
