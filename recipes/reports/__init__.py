"""What is reported: measurements, HTML reports, comparisons, verification, benchmarks and the demo."""
