"""Which blocks changed, undo files, generations, rollback: live weights on disk as a safetensors model directory."""
