"""W8A16: weights in 8 bits, activations as they are; the runtime turns the codes back into numbers inside the product.

    y = x @ (w_int8 * weight_scale).T + bias            in x's dtype (spec: runtime)

Half the memory of a float layer at nearly its accuracy. The runtime ignores `mul_scale`, so such a layer is smoothed
only where the linears in front absorb the factor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from quant_core.arithmetic.weight_codec import INT8_ROWS
from quant_core.schemes.scheme import Call, Inputs, Scheme, SchemeConfig
from quant_core.schemes.tensor_rules import WEIGHT_RULES

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.arithmetic.runtime import Tensors


class W8A16ProcessorConfig(SchemeConfig):
    """Quantize weights; activations stay float at run time."""

    key: ClassVar[str] = "w8a16"


def output(x: Tensor, tensors: Tensors, call: Call) -> Tensor:
    """Return the product of the float input with the weight that the codes stand for, rounded to x's dtype."""
    from torch.nn import functional as F

    from quant_core.arithmetic.runtime import needed

    w_OI = INT8_ROWS.decode(needed(tensors, "weight"), needed(tensors, "weight_scale")).to(x.dtype)
    bias_O = tensors.get("bias")
    return F.linear(x, w_OI, None if bias_O is None else bias_O.to(x.dtype))


SCHEME = Scheme(
    config=W8A16ProcessorConfig,
    summary="activations stay float",
    inputs=Inputs.FLOAT,
    rules=WEIGHT_RULES,
    output=output,
    multiplies_input=False,
    cost=2.0,  # it multiplies floats, at half of int8's speed
)
