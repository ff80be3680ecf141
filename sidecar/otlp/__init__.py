"""Traces of requests in the form of OpenTelemetry, sent by OTLP."""
