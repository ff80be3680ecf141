"""The chart's files held against the product; what needs Helm is in tests/e2e/helm."""
