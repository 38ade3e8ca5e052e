"""Text in, token windows out: where text comes from (`text.py`, `builtin.py`) and how windows are cut (`windows.py`)."""
