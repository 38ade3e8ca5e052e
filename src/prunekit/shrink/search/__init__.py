"""How a plan is searched for; one file a way."""
