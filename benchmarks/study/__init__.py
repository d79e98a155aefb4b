"""The study: do methods that merge for diversity keep more accuracy than those that keep what is
important?
"""
