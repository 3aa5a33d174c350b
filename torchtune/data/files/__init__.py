"""Files of every kind as rows: found, opened, and read by index without being held in memory."""
