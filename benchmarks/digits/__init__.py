"""Every method on scikit-learn's digits."""
