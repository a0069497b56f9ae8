"""The kernels in Triton for NVIDIA GPUs. Importing this package does not import Triton; its modules do."""
