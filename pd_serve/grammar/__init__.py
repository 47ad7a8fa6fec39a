"""What output has to be: grammars are checked for the router, and masks of permitted tokens made for the engine."""
