"""Services of the agent beside Kata's API."""
