"""The number formats a network can compute in, and which one this hardware prefers."""

import torch

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}      # autocast's dtype; None: no autocast


def choose_precision(precision: str, device: torch.device) -> str:
    """"auto" -> bf16 where the hardware multiplies it natively, else fp32."""
    if precision == "auto":
        native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return "bf16" if native else "fp32"
    return precision
