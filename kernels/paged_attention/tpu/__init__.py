"""The parts of the Pallas TPU kernel; `kernels.paged_attention.pallas_tpu` is its entry."""
