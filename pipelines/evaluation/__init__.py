"""Models side by side on held-out data: tasks, metrics, the report, and the gate that reads it."""
