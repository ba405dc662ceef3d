"""What must be set before any test module is imported."""

import os

import torch

# Triton decides when it is imported, and transformers imports it: without a GPU, kernels run in
# its interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
