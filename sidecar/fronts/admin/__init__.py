"""The control plane for operators: adapters, backends, queue and replicas."""
