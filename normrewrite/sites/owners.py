"""Modules whose own forward uses a norm that they hold in other ways than to call it.

>>> print(why_owned(site))
is a part of ConvBn2d, whose forward reads its tensors
"""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from normrewrite.sites import Site
from normrewrite.sites.kinds import recognise
from normrewrite.sites.refusal import Refusal


def why_owned(site: Site) -> Refusal | None:
    """The reason, where a module around the site is a norm that does more, or one of torch's for training in int8."""
    for outer in site.inside:
        quantised = str(type(outer).__module__).startswith(_QUANTISED)
        if quantised and type(outer).forward is not nn.Sequential.forward:
            return Refusal(f"is a part of {type(outer).__name__}, whose forward reads its tensors")
        if isinstance(outer, _BatchNorm) and isinstance(recognise(outer), Refusal):
            return Refusal(f"is a part of {type(outer).__name__}, a norm of its own")
    return None


_QUANTISED = ("torch.ao.nn.", "torch.nn.intrinsic.", "torch.nn.qat.")
