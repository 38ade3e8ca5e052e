"""What the linear that loses inputs makes of those it keeps; one file a way."""
