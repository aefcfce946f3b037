"""The OCI runtime command line `caisson-oci`: one function a verb over libcontainer, no daemon, no event loop."""
