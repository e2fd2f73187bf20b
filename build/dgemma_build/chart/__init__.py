"""The Helm chart and the Kubernetes samples, checked without a cluster. Knows nothing of the runtime."""
