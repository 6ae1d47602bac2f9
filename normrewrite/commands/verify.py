"""The command `verify`."""

from collections.abc import Callable

from normrewrite.api.verify import verify as verify_networks
from normrewrite.commands.audit import Audit, audit
from normrewrite.commands.results import Verified
from normrewrite.commands.source import Source, inputs_of, networks_of
from normrewrite.diagnostics.comparison import Comparison
from normrewrite.diagnostics.layers import compare_layers
from normrewrite.options.fields import part
from normrewrite.options.verify import Verify, VerifyOptions


def verify(source: Source, options: Verify, progress: Callable[..., object]) -> Comparison | Verified | Audit:
    """Compare two files, torch or ONNX, on the same inputs; or check a manifest. The source's architecture serves both."""
    if options.other is None:
        return audit(source, options.manifest, options.original)
    networks, names = networks_of(source, options.other)
    missing = "compared on what? Give --data FILE, or --input-shape 1,3,32,32 for random inputs."
    inputs = inputs_of(options, names, missing)
    compared = verify_networks(*networks, inputs, progress=progress, **part(options, VerifyOptions))
    return Verified(compared, compare_layers(*networks, inputs.first(8))) if options.layers else compared
