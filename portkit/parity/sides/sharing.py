"""One copy of the weights for both sides, as far as they hold the same.

Port and reference read one file, each by its own map, and then hold it twice. What is equal in
every value is held once from then on; what is not stays apart, and is told of as any difference.
Knows nothing of what is compared afterwards.
"""

from __future__ import annotations

import torch
from torch import nn

from portkit.parity.sides.sites import Side, parameters_of


@torch.no_grad()
def share_parameters(port: Side, reference: Side) -> None:
    """Have `reference` hold the port's tensors where its own are equal and laid out alike.

    To be called before anybody keeps a tensor of the reference's. A matrix that the reference holds
    as a part of a larger one, as an expert's, stays its own.
    """
    ours = parameters_of(port)
    for name, theirs in reference.parameters(ours).items():
        own = ours[name]
        if (
            isinstance(theirs, nn.Parameter)
            and theirs.stride() == own.stride()
            and theirs.dtype == own.dtype
            and torch.equal(theirs, own)
        ):
            theirs.data = own.data
