"""Whom the router speaks to: nodes of pd-serve, and the servers of other engines, behind one interface."""
