"""Text from a model in memory, token by token: how a token is chosen, how tokens become text, and the loop that does both."""
