"""Ways in through other libraries; each needs that library, and nothing else needs it."""
