"""Zero individual weights: budget → score → pattern, each a pure function; `linear.py` applies them to one weight matrix."""
