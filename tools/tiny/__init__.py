"""Parts of the training of the embedded backbone; `tools/train_tiny.py` puts them together."""
