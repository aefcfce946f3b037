"""The OCI configuration: JSON read into frozen records."""
