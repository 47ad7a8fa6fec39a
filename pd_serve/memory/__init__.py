"""Memory that peers may read: allocated once, at an address that never changes."""
