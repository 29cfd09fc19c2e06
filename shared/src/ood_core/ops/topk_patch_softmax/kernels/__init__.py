"""The kernels of the Triton form, one a file: how each is launched, and what runs on the device."""
