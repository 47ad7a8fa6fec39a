"""Messages between processes: msgspec structs, encoded as MessagePack. No torch, no behaviour."""
