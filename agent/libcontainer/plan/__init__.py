"""Turn configuration records into the messages that nsexec executes."""
