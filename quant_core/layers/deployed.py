"""Linear layers that compute as the hardware does, from stored codes instead of fake-quantized floats.

What they compute is their scheme's (`quant_core.arithmetic.runtime` has the formulas). A layer changes its class, never
its place, so hooks (the collectives of tensor parallelism) stay: a row-split layer dequantizes its own partial sum, and
the hook adds the parts up. Its codes take the place of the float weight, a half to a quarter of the memory. The tensors
keep their stored form, so casting a deployed model to a narrower dtype would change its scales: move it between
devices, or widen it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from quant_core.arithmetic.runtime import Tensors
from quant_core.calibration.timestep import TimestepManager
from quant_core.layers.calibrated import CalibratedLinear
from quant_core.schemes.scheme import Call, Scheme

# Not computed with: symmetric weights have no offset, and the consumer reads none.
_UNUSED = frozenset({"weight", "bias", "weight_offset"})


@dataclass(frozen=True)
class DeployedArithmetic:
    """Say how one layer computes: by its scheme.

    name: for errors. timestep_sep: the first static step of a scheme that knows the step.
    """

    name: str
    scheme: Scheme
    timestep_sep: int | None = None

    def output(self, x: Tensor, tensors: Tensors, step: int | None) -> Tensor:
        """Return the layer's output (..., O) in x's dtype; x: (..., I), step: index of the denoising step, if any.

        Raises ConfigurationError when the scheme needs the step and it is unknown or has no row.
        """
        mul_scale_I = tensors.get("mul_scale")
        call = Call(self.name, step, self.timestep_sep)
        return self.scheme.output(x if mul_scale_I is None else x * mul_scale_I, tensors, call)


@dataclass(frozen=True)
class DeployedLayer:
    """Bind the arithmetic of a layer to its tensors, on one device: call it with an input."""

    arithmetic: DeployedArithmetic
    tensors: Mapping[str, Tensor]

    def __call__(self, x: Tensor, step: int | None = None) -> Tensor:
        """Return the layer's output (..., O); see `DeployedArithmetic.output`."""
        return self.arithmetic.output(x, self.tensors, step)


class DeployedLinear(nn.Linear):
    """A linear layer that computes from what is stored: `weight` holds int8 codes, the other tensors are buffers."""

    arithmetic: DeployedArithmetic

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output in the step that `TimestepManager` says; input: (..., in_features)."""
        # Read anew in each call, because offloading moves them.
        tensors = {**self._parameters, **self._buffers}
        return self.arithmetic.output(input, tensors, TimestepManager.get_timestep_idx())


def deploy(model: nn.Module, *, timestep_sep: int | None = None) -> None:
    """Turn every calibrated linear of the model into a deployed one, in place, on the device where it is."""
    for module in model.modules():
        if isinstance(module, CalibratedLinear):
            layer = module.layer
            del module.layer
            smoothing = {} if layer.mul_scale_I is None else {"mul_scale": layer.mul_scale_I}
            arithmetic = DeployedArithmetic(layer.name, layer.scheme, timestep_sep)
            deploy_linear(module, DeployedLayer(arithmetic, {**layer.tensors, **smoothing}))


def deploy_linear(linear: nn.Linear, layer: DeployedLayer) -> None:
    """Make a linear compute as `layer` does: exchange its class and its tensors; shapes must fit already."""
    tensors = layer.tensors
    device = tensors["weight"].device if linear.weight.is_meta else linear.weight.device
    linear.weight = nn.Parameter(tensors["weight"].to(device), requires_grad=False)
    bias_O = tensors.get("bias")
    bias = None if bias_O is None else nn.Parameter(bias_O.to(device), requires_grad=False)
    linear.register_parameter("bias", bias)
    for name, tensor in tensors.items():
        if name not in _UNUSED:
            linear.register_buffer(name, tensor.to(device))
    linear.__class__ = DeployedLinear
    linear.arithmetic = layer.arithmetic  # type: ignore[assignment]
