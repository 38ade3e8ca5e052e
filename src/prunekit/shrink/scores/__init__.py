"""How much each unit matters; one file a criterion."""
