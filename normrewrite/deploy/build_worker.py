"""One engine built, in a process of its own: a fault in the library ends this process and no other.

Run as a file: reads one JSON request from stdin, writes one JSON event a line to stdout. normrewrite is imported only where its
plugins are asked for. TensorRT-RTX and TensorRT share the API; what only one has is asked for by name.
"""

import importlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

_LAYERS = "Layers:\nName:"  # how the builder's verbose log begins the list of the engine's layers


def build(request: dict[str, Any], tell: Any) -> None:
    """request: module, onnx, engine (paths), gpus, profile {input: [min, opt, max]}, timing_cache (path or None; what is
    measured now goes to `measured`), and plugins (arguments of normrewrite.plugins.register, or None)."""
    trt = importlib.import_module(request["module"])
    creators, registered = _registered(trt, request["plugins"])
    log = _logger(trt)
    try:
        _build(trt, log, creators, request, tell, registered)
    except Exception as error:  # TensorRT doesn't tell what a plugin of ours had against a node
        problems = [problem for creator in creators for problem in creator.problems]
        if not problems:
            raise
        raise RuntimeError("; ".join(problems)) from error


def _registered(trt: Any, asked: Any) -> tuple[list[Any], list[str]]:
    """The creators of normrewrite's plugins in Python, and the operators that there are plugins for, of whichever kind."""
    if not asked:
        return [], []
    registry = importlib.import_module("normrewrite.plugins.registry")
    return registry.register(**asked), registry.known(trt.get_plugin_registry())


def _build(trt: Any, log: Any, creators: list[Any], request: dict[str, Any], tell: Any, registered: list[str]) -> None:
    builder = trt.Builder(log)
    network, _parser = _parsed(trt, builder, log, request["onnx"])  # the parser owns the weights
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = _monitor(trt, tell)
    _choose_gpus(trt, config, request["gpus"])
    _add_profile(builder, config, request["profile"])
    cache = _timing_cache(config, request["timing_cache"])
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("; ".join(log.errors) or "the builder gave no engine and no reason")
    Path(request["engine"]).write_bytes(plan)
    if cache is not None:
        Path(request["measured"]).write_bytes(cache.serialize())
    parsed = [network.get_layer(i) for i in range(network.num_layers)]
    tell(
        done=True,
        layers=log.layers or _inspected(trt, log, plan),
        version=trt.__version__,
        registered=registered,
        parsed=[(layer.type.name, layer.metadata) for layer in parsed],
        attributes={name: values for creator in creators for name, values in creator.made.items()},
    )


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.layers = ""

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)
            elif message.startswith(_LAYERS):
                self.layers += message

    return Log()


def _monitor(trt: Any, tell: Any) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.steps[name] = steps
            tell(phase=name, step=0, steps=steps)

        def step_complete(self, name: str, step: int) -> bool:
            tell(phase=name, step=step + 1, steps=self.steps.get(name, 0))
            return True  # go on

        def phase_finish(self, name: str) -> None:
            pass

    return Monitor()


def _parsed(trt: Any, builder: Any, log: Any, path: str) -> tuple[Any, Any]:
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(path):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        raise RuntimeError("; ".join(f"node {error.node_name()}: {error.desc()}" for error in errors))
    return network, parser


def _choose_gpus(trt: Any, config: Any, gpus: list[str]) -> None:
    known = {name: value for name, value in vars(getattr(trt, "ComputeCapability", object)).items() if name[:2] == "SM"}
    unknown = [gpu for gpu in gpus if gpu.upper() not in known]
    if unknown:
        raise ValueError(f"--gpu {','.join(unknown)}: this version builds for {', '.join(sorted(known)).lower()}.")
    if gpus:
        config.num_compute_capabilities = len(gpus)
    for i, gpu in enumerate(gpus):
        config.set_compute_capability(known[gpu.upper()], i)


def _add_profile(builder: Any, config: Any, shapes: dict[str, list[list[int]]]) -> None:
    if not shapes:
        return
    profile = builder.create_optimization_profile()
    for name, (low, middle, high) in shapes.items():
        profile.set_shape(name, low, middle, high)
    config.add_optimization_profile(profile)


def _timing_cache(config: Any, path: str | None) -> Any:
    if path is None:
        return None
    cache = config.create_timing_cache(Path(path).read_bytes() if Path(path).is_file() else b"")
    config.set_timing_cache(cache, False)
    return cache


def _inspected(trt: Any, log: Any, plan: Any) -> str:
    """The engine's layers as the inspector lists them; it needs the engine's GPU."""
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        return ""
    return str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.ONELINE))


def main() -> None:
    events = os.fdopen(os.dup(1), "w", buffering=1)  # what the library prints goes to stderr
    os.dup2(2, 1)

    def tell(**event: Any) -> None:
        events.write(json.dumps(event) + "\n")

    warnings.simplefilter("ignore")
    try:
        build(json.loads(sys.stdin.read()), tell)
    except Exception as error:  # the one place where it can be told
        tell(error=f"{error}" or type(error).__name__)


if __name__ == "__main__":
    main()
