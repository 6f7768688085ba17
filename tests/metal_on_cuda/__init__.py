"""The unchanged Metal kernels, compiled by NVRTC and run on NVIDIA GPUs. See README.md."""
