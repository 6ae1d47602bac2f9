"""normrewrite: batch normalisation rewritten to L1, L-infinity and Top-k norms, with the same function.

>>> import normrewrite as nr
>>> twin = nr.convert(model, to="l1")

The names are listed in __init__.pyi, and imported on their first use: the command line's --help does not wait for torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
