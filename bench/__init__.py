"""What headrace costs and how fast it is, measured on the embedded stack: `python -m bench`."""
