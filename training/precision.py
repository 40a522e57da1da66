"""What `train.precision: auto` comes to on this machine."""

import torch


def fastest_precision() -> str:
    """bf16 on what multiplies it (NVIDIA's GPUs since Ampere; CPUs with AVX512-BF16 or AMX), else fp32."""
    if torch.cuda.is_available():
        multiplies = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        multiplies = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if multiplies else "fp32"
