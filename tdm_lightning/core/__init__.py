"""What everything else speaks of: tokens, what became of them, and plain-value configuration."""
