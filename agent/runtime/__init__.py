"""The OCI runtime command line `caisson-oci`: one function per verb over libcontainer, no daemon, no event loop."""
