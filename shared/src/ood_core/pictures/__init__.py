"""Pictures: panels side by side with Pillow, plots with matplotlib where it is installed."""
