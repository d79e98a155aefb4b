"""What the library is measured with; run as ``python -m benchmarks.NAME``, from the checkout."""
