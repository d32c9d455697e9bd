"""In the place of apex's CUDA kernels, which apex/optimizers.py beside it does not need."""
