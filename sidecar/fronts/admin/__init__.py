"""The control plane: adapters, backends, queue and replicas, for operators."""
