"""Mixture-of-experts layers of transformers as one ``secateur::experts`` node each."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from secateur.compiler import ops
from secateur.runtime.errors import UserError

EXPERTS = "secateur"
_LAYOUT = {
    "has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True, "has_post_expert_norm": False,
}  # fmt: skip
"""How the operator wants an expert: gate rows above up rows, ``[2F,D]``, and no biases."""


def register_experts() -> None:
    """Make ``experts_implementation="secateur"`` known to transformers."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _experts_function)


def use_experts(model: nn.Module) -> None:
    """Switch every mixture-of-experts layer of a model to the operator; a model without any is left as it is."""
    register_experts()
    for module in model.modules():
        if hasattr(type(module), "_apply_gate"):
            config: Any = module.config
            config._experts_implementation = EXPERTS


def _experts_function(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, **kwargs: Any
) -> Tensor:
    """``hidden_states [T,D]``, ``top_k_index [T,k]`` int64, ``top_k_weights [T,k]`` -> ``[T,D]``.

    Raises UserError for experts of another form than the operator's.
    """
    _check_form(module)
    out: Tensor = ops.experts(hidden_states, top_k_index, top_k_weights, module.gate_up_proj, module.down_proj)
    return out


def _check_form(module: nn.Module) -> None:
    from transformers.activations import SiLUActivation
    from transformers.integrations.moe import _default_apply_gate

    # What a release before 5.20 does not name its experts cannot have.
    odd = [f"{name} is {found}" for name, is_so in _LAYOUT.items() if (found := getattr(module, name, False)) != is_so]
    if getattr(type(module), "_apply_gate", None) is not _default_apply_gate:
        odd.append("it has a gate of its own")
    elif not isinstance(module.act_fn, (SiLUActivation, nn.SiLU)):
        odd.append(f"its activation is {type(module.act_fn).__name__}")
    if odd:
        raise UserError(
            f"experts of a form that cannot be compiled: {', '.join(odd)}", where=type(module).__name__,
            available=["down(silu(gate(x)) * up(x)) without biases, gate rows stacked above up rows"],
        )  # fmt: skip
