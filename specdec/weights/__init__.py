"""Tensors from safetensors files into modules: lazily, each rank its part, strictly. Targets and draft heads load alike."""
