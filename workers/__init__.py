"""The long-running processes. Each is put together in its own `main()`."""
