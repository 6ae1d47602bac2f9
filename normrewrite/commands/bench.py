"""The command `bench`."""

from collections.abc import Callable

from normrewrite.api.bench import Bench as Timed
from normrewrite.api.bench import bench as bench_networks
from normrewrite.commands.source import Source, inputs_of, networks_of
from normrewrite.options.bench import Bench, BenchOptions
from normrewrite.options.fields import part


def bench(source: Source, options: Bench, progress: Callable[..., object]) -> Timed:
    """Time two files, torch or ONNX, on the same batch. The source's architecture serves both."""
    networks, names = networks_of(source, options.other)
    missing = "timed on what? Give --input-shape 1,3,32,32 for random inputs, or --data FILE."
    inputs = inputs_of(options, names, missing)
    batch = inputs.first(options.batch_size if options.input_shape is None else 1 << 30)
    return bench_networks(*networks, batch.inputs, progress=progress, **part(options, BenchOptions))
