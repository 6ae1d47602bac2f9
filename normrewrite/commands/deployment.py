"""The commands of deployment: export, build, verify, bench."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from normrewrite.api.bench import Bench, Runtime
from normrewrite.api.bench import bench as bench_networks
from normrewrite.api.export import OPSET, Deploy, Exported
from normrewrite.api.export import export as export_model
from normrewrite.api.verify import verify as verify_networks
from normrewrite.commands.results import Listed, Verified
from normrewrite.commands.source import Source
from normrewrite.data import Batch, Data, argument_names, open_data
from normrewrite.data import example as example_input
from normrewrite.deploy.precision import Precision
from normrewrite.deploy.quantise import Ranges
from normrewrite.diagnostics.comparison import Comparison
from normrewrite.diagnostics.layers import compare_layers
from normrewrite.errors import NormRewriteError
from normrewrite.execution import Network
from normrewrite.plugins.runtimes import RUNTIMES
from normrewrite.provenance.ranges import of_record

if TYPE_CHECKING:
    from normrewrite.api.build import Built

Numbers = Sequence[float] | None


def export(
    source: Source,
    output: Path,
    *,
    input_shape: str | None = None,
    data: str | None = None,
    mean: Numbers = None,
    std: Numbers = None,
    opset: int = OPSET,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    deploy: Deploy = "fold",
    live_stats: bool = False,
    bodies: bool = True,
    precision: Precision = "fp32",
    calibrate: str | None = None,
    ranges: Ranges = "percentile",
    keep_io_types: bool = False,
    force: bool = False,
) -> Exported:
    """Write a model file as ONNX; the example input comes from `data` or has `input_shape`, or else from `calibrate`.

    Ranges that an int8 training left in the file are used for int8.
    """
    source.check_outputs({"-o": output}, force, {"--data": data, "--calibrate": calibrate}, "an ONNX file")
    file = source.read()
    model, names = file.model, argument_names(file.model)
    seen = None if calibrate is None else open_data(calibrate, names, mean=mean, std=std)
    inputs = _inputs(
        names, input_shape, data or calibrate, mean, std, "what goes in? Give --input-shape 1,3,32,32 or --data FILE."
    )
    return export_model(
        model,
        inputs.first(2).positional(names),
        output,
        opset=opset,
        dynamic_batch=dynamic_batch,
        dynamic_size=dynamic_size,
        deploy=deploy,
        live_stats=live_stats,
        bodies=bodies,
        precision=precision,
        calibrate=seen,
        ranges=ranges,
        learned=of_record(file.manifest, str(source.path)),
        keep_io_types=keep_io_types,
        force=force,
    )


def build(
    model: Path,
    output: Path,
    *,
    runtime: str = "rtx",
    gpu: str = "",
    shapes: dict[str, tuple[str, ...]] | None = None,
    timing_cache: Path | None = None,
    plugins: str = "off",
    force: bool = False,
    each: Callable[..., object] = lambda phase, **_: None,
) -> "Built":
    """Build an engine from an ONNX file. gpu: names with commas, as in `sm86,sm89`."""
    from normrewrite.api.build import (
        build as build_engine,
    )  # it imports onnx, for which the other commands don't wait

    gpus = [name.strip() for name in gpu.split(",") if name.strip()]
    return build_engine(
        model,
        output,
        runtime=runtime,
        gpus=gpus,
        shapes=shapes,
        timing_cache=timing_cache,
        plugins=plugins,
        force=force,
        each=each,
    )


def plugins_list() -> Listed:
    """The operators that there are plugins for."""
    from normrewrite.plugins import OPS  # as above
    from normrewrite.plugins.built import place

    operators = {
        op.name: {"computes": ", ".join(op.metrics)} | {a.name: f"{a.kind}, {a.range.words}" for a in op.attributes}
        for op in OPS.values()
    }
    here = {name: find_spec(runtime.module) is not None for name, runtime in RUNTIMES.items()}
    return Listed(operators, here, str(place()) if place().is_file() else None)


def verify(
    source: Source,
    other: Path,
    *,
    data: str | None = None,
    input_shape: str | None = None,
    mean: Numbers = None,
    std: Numbers = None,
    batch_size: int = 250,
    tolerance: float | None = None,
    min_snr: float | None = None,
    min_agreement: float | None = None,
    layers: bool = False,
    each: Callable[..., object] = lambda done, **_: None,
) -> Comparison | Verified:
    """Compare two files, torch or ONNX, on the same inputs. `source`'s architecture serves both."""
    networks, names = _networks(source, other)
    missing = "compared on what? Give --data FILE, or --input-shape 1,3,32,32 for random inputs."
    inputs = _inputs(names, input_shape, data, mean, std, missing)
    compared = verify_networks(
        *networks,
        inputs,
        batch_size=batch_size,
        tolerance=tolerance,
        min_snr=min_snr,
        min_agreement=min_agreement,
        each=each,
    )
    if not layers:
        return compared
    return Verified(compared, compare_layers(*networks, inputs.first(8)))


def bench(
    source: Source,
    other: Path,
    *,
    data: str | None = None,
    input_shape: str | None = None,
    mean: Numbers = None,
    std: Numbers = None,
    batch_size: int = 1,
    runtime: Runtime = "torch",
    rounds: int = 50,
    each: Callable[..., object] = lambda done, **_: None,
) -> Bench:
    """Time two files, torch or ONNX, on the same batch. `source`'s architecture serves both."""
    networks, names = _networks(source, other)
    missing = "timed on what? Give --input-shape 1,3,32,32 for random inputs, or --data FILE."
    inputs = _inputs(names, input_shape, data, mean, std, missing)
    batch = inputs.first(batch_size if input_shape is None else 1 << 30)
    return bench_networks(*networks, batch.inputs, runtime=runtime, rounds=rounds, each=each)


def _networks(source: Source, other: Path) -> tuple[tuple[Network, Network], list[str]]:
    """Both networks, and the names of their arguments where torch tells them."""
    plain = (".onnx", ".engine")
    paths = (source.path, other)
    read = iter(source.read_all(*(path for path in paths if path.suffix not in plain)))
    a, b = (path if path.suffix in plain else next(read).model for path in paths)
    return (a, b), next((argument_names(network) for network in (a, b) if isinstance(network, nn.Module)), [])


def _inputs(
    names: list[str], input_shape: str | None, data: str | None, mean: Numbers, std: Numbers, missing: str
) -> Data:
    if input_shape is not None:
        return Data(whole=Batch({names[0] if names else "input": example_input(input_shape)}))
    if data is None:
        raise NormRewriteError(missing)
    return open_data(data, names, mean=mean, std=std)
