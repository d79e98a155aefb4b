"""Where a merged token stands: two rules, measured."""
