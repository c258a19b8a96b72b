"""Every use of PyTorch's private API. Each file was run on torch 2.11, 2.13 and 2.15."""
