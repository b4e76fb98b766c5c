"""Parts of the attention kernels for NVIDIA GPUs, `kernels/paged_attention/pallas_gpu.py`."""
