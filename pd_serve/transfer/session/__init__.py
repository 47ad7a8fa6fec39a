"""What two engines agree on before and while one reads the other's KV: connection, handshake, lanes, self-test."""
