"""A picture of what WardMerger's rounds do."""
