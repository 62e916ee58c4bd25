"""Pure-PyTorch stand-ins for the Triton kernels of flash-linear-attention, for hosts without a GPU."""

from refine_verl.kernels.patch import cpu_kernels, cpu_kernels_in_use, ensure_kernels, use_cpu_kernels
