"""Computing a step on a device: a folder for each kind of device."""
