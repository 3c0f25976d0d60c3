"""What a run will take, worked out before any device is touched."""
