"""From files or the hub to batches: rows, columns, token ids, missing targets."""
