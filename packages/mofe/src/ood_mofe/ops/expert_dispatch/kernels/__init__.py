"""The kernels of the Triton form, one a file: what runs on the device, and below it how it is launched."""
