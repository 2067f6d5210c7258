"""Examples: what records become for a task, stored, mapped and put into batches."""
