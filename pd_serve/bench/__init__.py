"""Load generators. They know an endpoint only by its API."""
