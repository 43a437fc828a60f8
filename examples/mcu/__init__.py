"""The tasks of ``examples/microcontroller.py``: data, models, training, and measuring the exported C."""
